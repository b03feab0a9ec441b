"""One row an edit: everything the report is made of, with as few forward passes as it takes.

What need not be run is not:

* A locality prompt that is routed to main memory computes the unedited model, bit for bit. Its
  tokens and its answer agree with the unedited model's by construction.
* Where an answer that was generated starts with the target's own tokens, each of them was the
  greedy one after those before it, which is what teacher forcing asks.
* Routes are decided once a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import models
from ..editing.edits import Edit
from ..editing.prompts import encode_prompt, encode_target, stop_token
from .decoding import Taken, Written
from .generation import text_of, write_answers
from .metrics import contains, same_text, share_equal
from .scoring import Scored, TokenPair, prompt_routes, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is asked of every edit.

    Attributes:
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest generated answer, in tokens.
        generation: generate answers; else only routes and teacher forcing.
        unedited: the unedited model's scores beside the edited one's.
        perplexity: of the target, for both models.
        texts: the texts of all answers, also of those that need not be generated for a score.
    """

    chat: bool = False
    batch_size: int = 32
    max_new_tokens: int = 32
    generation: bool = True
    unedited: bool = True
    perplexity: bool = False
    texts: bool = False


def count_units(edits: Sequence[Edit], wanted: Wanted) -> int:
    """How often ``tick`` is told of one, altogether."""
    rephrased = sum(e.rephrase_prompt is not None for e in edits)
    local = sum(e.locality_prompt is not None for e in edits)
    return (len(edits) + rephrased) * (2 + wanted.unedited) + 2 * local


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    wanted: Wanted,
    tick: Callable[[int], None] = lambda rows: None,
) -> list[Row]:
    """Measure each edit by itself; ``summary.summarise`` makes the report of the rows.

    Raises:
        ConfigError: ``batch_size`` or ``max_new_tokens`` is not positive, no chat template.
        DataError: a text has no tokens.
    """
    run = _Run(model, tokenizer, wanted, tick)
    direct = _Questions(run, [(e.prompt, e.target_new) for e in edits])
    rephrased = _Questions(run, [(e.rephrase_prompt, e.target_new) for e in edits])
    local = _Neighbours(run, edits)
    memory = models.current_memory(model) if models.is_patched(model) else None
    rows = []
    for i, edit in enumerate(edits):
        held = None if memory is None else memory.shard_of(edit.id)
        row: Row = {"id": edit.id, "prompt": edit.prompt, "target_new": edit.target_new}
        row |= direct.row(i, edit.target_new, held, _DIRECT)
        row["rephrase_prompt"] = edit.rephrase_prompt
        row |= rephrased.row(i, edit.target_new, held, _REPHRASED)
        row["locality_prompt"] = edit.locality_prompt
        rows.append(row | local.row(i))
    return rows


# What a question's figures are called in a row, for the edit's prompt and for its rephrasing.
_DIRECT = {
    "score": "reliability",
    "plain": "unedited_reliability",
    "answer": "answer",
    "same": "answer_is_target",
    "inside": "answer_contains",
    "route": "route",
    "right": "right_shard",
    "perplexity": "perplexity",
    "plain_perplexity": "unedited_perplexity",
}
_REPHRASED = {
    "score": "generalization",
    "plain": "unedited_generalization",
    "answer": "rephrase_answer",
    "same": "rephrase_is_target",
    "inside": "rephrase_contains",
    "route": "rephrase_route",
    "right": "rephrase_right_shard",
    "perplexity": "rephrase_perplexity",
    "plain_perplexity": "unedited_rephrase_perplexity",
}


class _Run:
    """One model with one way of asking it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        wanted: Wanted,
        tick: Callable[[int], None],
    ) -> None:
        self.model, self.tokenizer, self.wanted, self._tick = model, tokenizer, wanted, tick

    def tick(self, rows: int) -> None:
        if rows:
            self._tick(rows)

    def unedited(self) -> AbstractContextManager[Any]:
        patched = models.is_patched(self.model)
        return models.disabled(self.model) if patched else nullcontext()

    def prompt(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text, self.wanted.chat)

    def target(self, text: str) -> list[int]:
        return encode_target(self.tokenizer, text, stop=False, chat=self.wanted.chat)

    def text(self, written: Written | None) -> str | None:
        return None if written is None else text_of(self.tokenizer, written.tokens)

    def routes(self, prompts: Sequence[list[int]]) -> list[Taken]:
        pad_id = self.tokenizer.pad_token_id
        pad_id = stop_token(self.tokenizer) if pad_id is None else pad_id
        return prompt_routes(self.model, prompts, self.wanted.batch_size, int(pad_id))

    def write(
        self,
        prompts: Sequence[list[int]],
        routes: Sequence[Taken] | None = None,
        count: bool = True,
    ) -> list[Written]:
        return write_answers(
            self.model,
            self.tokenizer,
            prompts,
            routes=routes,
            batch_size=self.wanted.batch_size,
            max_new_tokens=self.wanted.max_new_tokens,
            progress=self.tick if count else None,
        )

    def score(
        self, pairs: Sequence[TokenPair], routes: Sequence[Taken] | None, likelihood: bool = False
    ) -> list[Scored]:
        found: list[Scored | None] = [None] * len(pairs)
        size = self.wanted.batch_size
        rows = score_rows(self.model, pairs, size, routes=routes, likelihood=likelihood)
        for index, scored in rows:
            found[index] = scored
            self.tick(1)
        return [scored for scored in found if scored is not None]


class _Questions:
    """Prompts that are to be answered with the target; those that are missing stay so."""

    def __init__(self, run: _Run, texts: Sequence[tuple[str | None, str]]) -> None:
        self.run = run
        asked = [(i, prompt, target) for i, (prompt, target) in enumerate(texts) if prompt]
        self.places = {i: n for n, (i, _, _) in enumerate(asked)}
        pairs = [(run.prompt(prompt), run.target(target)) for _, prompt, target in asked]
        prompts = [prompt for prompt, _ in pairs]
        self.pairs = pairs
        self.written: list[Written] | None = None
        if run.wanted.generation:
            self.written = run.write(prompts)
            self.routes = [written.taken for written in self.written]
        else:
            self.routes = run.routes(prompts)
            run.tick(len(prompts))
        self.scored = self._scores()
        self.plain: list[Scored] | None = None
        if run.wanted.unedited:
            with run.unedited():
                self.plain = run.score(pairs, None, run.wanted.perplexity)

    def _scores(self) -> list[Scored]:
        likelihood = self.run.wanted.perplexity
        known: dict[int, Scored] = {}
        if self.written is not None and not likelihood:
            for n, (written, (_, target)) in enumerate(zip(self.written, self.pairs, strict=True)):
                if written.tokens[: len(target)] == target:
                    known[n] = Scored(target, None)
            self.run.tick(len(known))
        rest = [n for n in range(len(self.pairs)) if n not in known]
        pairs, routes = [self.pairs[n] for n in rest], [self.routes[n] for n in rest]
        known.update(zip(rest, self.run.score(pairs, routes, likelihood), strict=True))
        return [known[n] for n in range(len(self.pairs))]

    def row(self, i: int, target: str, held: int | None, names: dict[str, str]) -> Row:
        found: Row = dict.fromkeys(names)
        if (n := self.places.get(i)) is not None:
            expected = self.pairs[n][1]
            found["score"] = share_equal(self.scored[n].tokens, expected)
            found["perplexity"] = _perplexity(self.scored[n])
            found["route"] = route = self.routes[n].route
            found["right"] = None if held is None else route == held
            if self.plain is not None:
                found["plain"] = share_equal(self.plain[n].tokens, expected)
                found["plain_perplexity"] = _perplexity(self.plain[n])
            if self.written is not None:
                answer = self.run.text(self.written[n]) or ""
                found["answer"] = answer
                found["same"] = same_text(answer, target)
                found["inside"] = contains(answer, target)
        return {names[key]: value for key, value in found.items()}


class _Neighbours:
    """Locality prompts: does the edited model do what the unedited one does."""

    def __init__(self, run: _Run, edits: Sequence[Edit]) -> None:
        self.run = run
        asked = [(i, e.locality_prompt, e.locality_ground_truth) for i, e in enumerate(edits)]
        present = [(i, prompt, answer) for i, prompt, answer in asked if prompt is not None]
        self.places = {i: n for n, (i, _, _) in enumerate(present)}
        self.prompts = [run.prompt(prompt) for _, prompt, _ in present]
        self.answers = [None if answer is None else run.target(answer) for _, _, answer in present]
        self.routes = run.routes(self.prompts)
        self.aside = [n for n, taken in enumerate(self.routes) if taken.route >= 0]
        run.tick(len(present) - len(self.aside))
        self.agree = self._agreement()
        self.edited: dict[int, Written] = {}
        self.plain: dict[int, Written] = {}
        if run.wanted.generation:
            self._generate()

    def _agreement(self) -> list[tuple[int, int] | None]:
        """(positions at which both models are greedily of one mind, positions), a row."""
        found = [None if a is None else (len(a), len(a)) for a in self.answers]
        rows = [(n, answer) for n in self.aside if (answer := self.answers[n]) is not None]
        self.run.tick(len(self.prompts) - len(rows))
        pairs = [(self.prompts[n], answer) for n, answer in rows]
        edited = self.run.score(pairs, [self.routes[n] for n, _ in rows])
        with self.run.unedited():
            plain = [
                scored
                for _, scored in sorted(
                    score_rows(self.run.model, pairs, self.run.wanted.batch_size)
                )
            ]
        for (n, answer), ours, theirs in zip(rows, edited, plain, strict=True):
            hits = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
            found[n] = (hits, len(answer))
        return found

    def _generate(self) -> None:
        prompts = [self.prompts[n] for n in self.aside]
        written = self.run.write(prompts, [self.routes[n] for n in self.aside])
        self.edited.update(zip(self.aside, written, strict=True))
        needed = list(range(len(self.prompts))) if self.run.wanted.texts else self.aside
        with self.run.unedited():
            plain = self.run.write([self.prompts[n] for n in needed], count=False)
        self.plain.update(zip(needed, plain, strict=True))

    def row(self, i: int) -> Row:
        n = self.places.get(i)
        if n is None:
            return dict.fromkeys(_LOCAL)
        agree = self.agree[n]
        # Main memory is the unedited model: one answer stands for both.
        edited, plain = self.edited.get(n, self.plain.get(n)), self.plain.get(n)
        same = None
        if self.run.wanted.generation:
            same = self.routes[n].route < 0 or self.run.text(edited) == self.run.text(plain)
        return {
            "locality_hits": None if agree is None else agree[0],
            "locality_positions": None if agree is None else agree[1],
            "locality_same": same,
            "locality_answer": self.run.text(edited),
            "locality_unedited_answer": self.run.text(plain),
            "locality_route": self.routes[n].route,
        }


_LOCAL = (
    "locality_hits",
    "locality_positions",
    "locality_same",
    "locality_answer",
    "locality_unedited_answer",
    "locality_route",
)


def _perplexity(scored: Scored) -> float | None:
    # exp(709) is the largest a float holds
    return None if scored.nll is None else math.exp(min(scored.nll, 700.0))
