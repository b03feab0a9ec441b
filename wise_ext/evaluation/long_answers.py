"""Asking a model for long answers, and whether it still says what another one said."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .. import models
from ..editing.prompts import encode_prompt, encode_target, stop_token
from .decoding import Taken, Written
from .generation import stop_tokens, text_of, write_answers
from .scoring import length_batches, prompt_routes, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

K = TypeVar("K", bound=Hashable)

# Tokens by which an answer may be longer than its target.
_SPARE = 32
# Tokens of a draft that are looked at first: most drafts that fail do so here.
_GLANCE = 8
# Tokens of drafts whose logits are there at a time.
_TOGETHER = 1024
#: the longest answer to an unrelated prompt, in tokens
UNRELATED_TOKENS = 32


@cache
def unrelated_prompts() -> tuple[str, ...]:
    """Prompts of many kinds that no edit is about (written for this project).

    None of them is a neutral text (``editing.prompts.neutral_prompts``), which a router knows.
    """
    text = resources.files("wise_ext").joinpath("data/unrelated.jsonl").read_text("utf-8")
    return tuple(json.loads(line)["text"] for line in text.split("\n") if line)


class Question(NamedTuple):
    """Something to ask.

    Attributes:
        prompt: token ids.
        room: how many tokens the answer may have.
        draft: token ids that the answer may well begin with.
    """

    prompt: list[int]
    room: int
    draft: Sequence[int] = ()


class Asker:
    """One model with one way of asking it.

    Args:
        model: patched or not.
        tokenizer: its tokenizer.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest answer; None: 32 tokens more than its target.
        one_pass: whether a prompt and what follows it may be read in one pass; see
            ``evaluate_long``.
        tick: told how many rows are done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
        batch_size: int,
        max_new_tokens: int | None,
        one_pass: bool,
        tick: Callable[[int], None],
    ) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.one_pass, self.tick = one_pass, tick

    def unedited(self) -> AbstractContextManager[Any]:
        """Within the block the model is without its memory."""
        patched = models.is_patched(self.model)
        return models.disabled(self.model) if patched else nullcontext()

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return encode_prompt(self.tokenizer, text, self.chat)

    def question(self, prompt: str, target: str, *others: str) -> Question:
        """A prompt with room for the longest of some targets; the first may well be the answer."""
        encoded = [self._target(text) for text in (target, *others)]
        room = self.max_new_tokens or max(map(len, encoded)) - 1 + _SPARE
        return Question(self.prompt(prompt), room, encoded[0][:room] if self.one_pass else ())

    def _target(self, text: str) -> list[int]:
        return encode_target(self.tokenizer, text, chat=self.chat)

    def answers(self, questions: Mapping[K, Question]) -> dict[K, Written]:
        """Greedy answers to their natural stop.

        An answer that is its draft is read, not written: one pass in place of one a token. What is
        written together has similar room, and each answer is cut to its own: it does not depend on
        the others.
        """
        asked = list(questions.values())
        routes = self.routes([question.prompt for question in asked])
        found = self._followed(asked, routes)
        stops = stop_tokens(self.model, self.tokenizer)
        left = [q.room - len(said) for q, said in zip(asked, found, strict=True)]
        going = [i for i, said in enumerate(found) if left[i] and not stops.intersection(said)]
        self.tick(len(asked) - len(going))
        for batch in length_batches([left[i] for i in going], self.batch_size):
            rows = [going[n] for n in batch]
            written = write_answers(
                self.model,
                self.tokenizer,
                [asked[i].prompt + found[i] for i in rows],
                routes=[routes[i] for i in rows],
                batch_size=self.batch_size,
                max_new_tokens=left[rows[0]],
                progress=self.tick,
            )
            for i, (tokens, _) in zip(rows, written, strict=True):
                found[i] += tokens[: left[i]]
        return {
            key: Written(said, route)
            for key, said, route in zip(questions, found, routes, strict=True)
        }

    def _followed(self, questions: Sequence[Question], routes: Sequence[Taken]) -> list[list[int]]:
        """How answers begin: as far as the model goes along with a question's draft, and then its
        own next token."""
        found: list[list[int]] = [[] for _ in questions]
        for most in (_GLANCE, max((len(question.draft) for question in questions), default=0)):
            drafts = [list(question.draft[:most]) for question in questions]
            going = [i for i, said in enumerate(found) if said == drafts[i][: len(said)]]
            going = [i for i in going if len(found[i]) < len(drafts[i])]
            pairs = [(questions[i].prompt, drafts[i]) for i in going]
            taken = [routes[i] for i in going]
            size = max(min(self.batch_size, _TOGETHER // most), 1) if pairs else 1
            for n, scored in score_rows(self.model, pairs, size, routes=taken):
                same = [a == b for a, b in zip(scored.tokens, pairs[n][1], strict=True)]
                found[going[n]] = scored.tokens[: [*same, False].index(False) + 1]
        return found

    def text(self, written: Written) -> str:
        """The text of an answer."""
        return text_of(self.tokenizer, written.tokens).strip()

    def routes(self, prompts: Sequence[list[int]]) -> list[Taken]:
        """Where prompts go."""
        pad_id = self.tokenizer.pad_token_id
        pad_id = stop_token(self.tokenizer) if pad_id is None else pad_id
        return prompt_routes(self.model, prompts, self.batch_size, int(pad_id))

    def agreement(
        self,
        prompts: Sequence[list[int]],
        answers: Sequence[Sequence[int]],
        routes: Sequence[Taken],
    ) -> list[int]:
        """At how many tokens of each answer the model is greedily of the same mind: the true tokens
        before them given, or, without ``one_pass``, its own.

        Args:
            prompts: token ids.
            answers: what another model wrote, the stop token included.
            routes: where the prompts go.
        """
        hits = [0] * len(prompts)
        if not self.one_pass:
            own = self.answers(
                {i: Question(p, UNRELATED_TOKENS, []) for i, p in enumerate(prompts)}
            )
            return [
                sum(a == b for a, b in zip(own[i].tokens, answer, strict=False))
                for i, answer in enumerate(answers)
            ]
        pairs = [(prompt, list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        for i, scored in score_rows(self.model, pairs, self.batch_size, routes=routes):
            hits[i] = sum(a == b for a, b in zip(scored.tokens, answers[i], strict=True))
            self.tick(1)
        return hits
