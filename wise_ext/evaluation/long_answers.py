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
from .generation import text_of, write_answers
from .scoring import length_batches, prompt_routes, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

K = TypeVar("K", bound=Hashable)

# Tokens by which an answer may be longer than its target.
_SPARE = 32
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
    """Prompt ids, and how many tokens the answer may have."""

    prompt: list[int]
    room: int


class Asker:
    """One model with one way of asking it.

    Args:
        model: patched or not.
        tokenizer: its tokenizer.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest answer; None: 32 tokens more than its target.
        tick: told how many rows are done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
        batch_size: int,
        max_new_tokens: int | None,
        tick: Callable[[int], None],
    ) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.batch_size, self.max_new_tokens, self.tick = batch_size, max_new_tokens, tick

    def unedited(self) -> AbstractContextManager[Any]:
        """Within the block the model is without its memory."""
        patched = models.is_patched(self.model)
        return models.disabled(self.model) if patched else nullcontext()

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return encode_prompt(self.tokenizer, text, self.chat)

    def question(self, prompt: str, *targets: str) -> Question:
        """A prompt with room for the longest of the targets."""
        if self.max_new_tokens is not None:
            return Question(self.prompt(prompt), self.max_new_tokens)
        encoded = [encode_target(self.tokenizer, t, stop=False, chat=self.chat) for t in targets]
        return Question(self.prompt(prompt), max(map(len, encoded)) + _SPARE)

    def answers(self, questions: Mapping[K, Question]) -> dict[K, Written]:
        """Greedy answers to their natural stop.

        What runs together has similar room, and each answer is cut to its own: it does not depend
        on the others.
        """
        keys = list(questions)
        found: dict[K, Written] = {}
        for batch in length_batches([questions[key].room for key in keys], self.batch_size):
            rows = [questions[keys[i]] for i in batch]
            written = write_answers(
                self.model,
                self.tokenizer,
                [row.prompt for row in rows],
                batch_size=self.batch_size,
                max_new_tokens=rows[0].room,
                progress=self.tick,
            )
            for i, row, (tokens, taken) in zip(batch, rows, written, strict=True):
                found[keys[i]] = Written(tokens[: row.room], taken)
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
        """At how many tokens of each answer the model is greedily of the same mind.

        Args:
            prompts: token ids.
            answers: what another model wrote, the stop token included.
            routes: where the prompts go.
        """
        hits = [0] * len(prompts)
        pairs = [(prompt, list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        for i, scored in score_rows(self.model, pairs, self.batch_size, routes=routes):
            hits[i] = sum(a == b for a, b in zip(scored.tokens, answers[i], strict=True))
            self.tick(1)
        return hits
