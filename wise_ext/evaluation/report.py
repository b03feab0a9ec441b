"""What an edited model is measured by: did edits take, generalise, and leave the rest alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import models
from ..editing.edits import Edit
from ..editing.progress import ProgressCallback, counted
from ..editing.prompts import encode_prompt, encode_target
from ..errors import ConfigError, DataError
from .generation import Answer, generate_answers
from .metrics import contains, mean, same_text, share_equal
from .scoring import TokenPair, greedy_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    chat: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: bool | ProgressCallback = True,
    details: bool = False,
) -> dict[str, Any]:
    """Measure an edited model on its edits.

    * ``n``: how many edits were measured.
    * ``reliability``, ``generalization``: mean over edits of the share of target tokens (without
      the stop token) that are greedy under teacher forcing, after the prompt and the rephrasing.
    * ``locality``: share of the locality answers' tokens, all edits together, at which the edited
      and the unedited model are greedily of the same mind.
    * ``generation.reliability``, ``generation.generalization``: share of greedy answers that are
      the target as a whole (trimmed, case folded, punctuation at the ends stripped);
      ``generation.contains``: that hold it somewhere; ``generation.locality``: that equal the
      unedited model's, character for character.
    * ``routing.edit_to_side``, ``rephrase_to_side``, ``locality_to_main``: share of prompts sent
      there; ``routing.right_shard``: share of edit prompts sent to the very shard that holds the
      edit, among the edits the memory has.
    * ``unedited``: reliability and generalization of the model without its memory.
    * ``seconds``: wall time.

    A mean that no edit has the fields for is ``None``. The model is left as it was.

    Args:
        model: a patched model (a model without a memory is measured as it is).
        tokenizer: its tokenizer.
        edits: what to measure; not empty.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest generated answer, in tokens.
        progress: a bar on standard error, or a function called with (done, total).
        details: add ``details``, one row an edit: its own scores, answers and routes.

    Raises:
        ConfigError: ``batch_size`` or ``max_new_tokens`` is not positive, no chat template.
        DataError: there are no edits, or a text has no tokens.
    """
    if not edits:
        raise DataError("there are no edits to evaluate: give at least one")
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError("batch size and max_new_tokens must be at least 1")
    start = time.perf_counter()
    training = model.training
    model.train(False)
    try:
        with counted("evaluating", _passes(edits), progress) as tick:
            run = _Run(model, tokenizer, chat, batch_size, max_new_tokens, tick)
            rows = _measure(run, edits)
    finally:
        model.train(training)
    report = _summary(rows)
    report["seconds"] = time.perf_counter() - start
    if details:
        report["details"] = [
            {key: value for key, value in row.items() if key not in _COUNTS} for row in rows
        ]
    return report


#: per-edit counts behind ``locality``, which weighs positions and not edits
_COUNTS = ("locality_hits", "locality_positions")


class _Run:
    """One model with one way of asking it; texts missing from an edit stay missing (None)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
        batch_size: int,
        max_new_tokens: int,
        tick: Callable[[int], None],
    ) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.batch_size, self.max_new_tokens, self.tick = batch_size, max_new_tokens, tick

    def unedited(self) -> AbstractContextManager[Any]:
        patched = models.is_patched(self.model)
        return models.disabled(self.model) if patched else nullcontext()

    def pairs(self, texts: Sequence[tuple[str | None, str | None]]) -> list[TokenPair | None]:
        return [
            None
            if prompt is None or answer is None
            else (
                encode_prompt(self.tokenizer, prompt, self.chat),
                encode_target(self.tokenizer, answer, stop=False, chat=self.chat),
            )
            for prompt, answer in texts
        ]

    def greedy(self, pairs: Sequence[TokenPair | None]) -> list[list[int] | None]:
        present = [(i, pair) for i, pair in enumerate(pairs) if pair is not None]
        result: list[list[int] | None] = [None] * len(pairs)
        rows = [pair for _, pair in present]
        for row, tokens in greedy_tokens(self.model, rows, self.batch_size):
            result[present[row][0]] = tokens
            self.tick(1)
        return result

    def scores(self, pairs: Sequence[TokenPair | None]) -> list[float | None]:
        return [
            None if tokens is None or pair is None else share_equal(tokens, pair[1])
            for tokens, pair in zip(self.greedy(pairs), pairs, strict=True)
        ]

    def answers(self, prompts: Sequence[str | None]) -> list[Answer | None]:
        present = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
        written = generate_answers(
            self.model,
            self.tokenizer,
            [prompt for _, prompt in present],
            chat=self.chat,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            progress=self.tick,
        )
        result: list[Answer | None] = [None] * len(prompts)
        for (i, _), answer in zip(present, written, strict=True):
            result[i] = answer
        return result


def _passes(edits: Sequence[Edit]) -> int:
    """How many rows are run altogether."""
    rephrased = sum(e.rephrase_prompt is not None for e in edits)
    local = sum(e.locality_prompt is not None for e in edits)
    answered = sum(
        e.locality_prompt is not None and e.locality_ground_truth is not None for e in edits
    )
    return 3 * len(edits) + 3 * rephrased + 2 * local + 2 * answered


def _measure(run: _Run, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    direct = run.pairs([(e.prompt, e.target_new) for e in edits])
    rephrased = run.pairs([(e.rephrase_prompt, e.target_new) for e in edits])
    local = run.pairs([(e.locality_prompt, e.locality_ground_truth) for e in edits])

    reliability, generalization = run.scores(direct), run.scores(rephrased)
    local_edited = run.greedy(local)
    answers = run.answers([e.prompt for e in edits])
    rephrase_answers = run.answers([e.rephrase_prompt for e in edits])
    local_answers = run.answers([e.locality_prompt for e in edits])
    with run.unedited():
        plain_reliability, plain_generalization = run.scores(direct), run.scores(rephrased)
        local_plain = run.greedy(local)
        plain_answers = run.answers([e.locality_prompt for e in edits])

    memory = models.current_memory(run.model) if models.is_patched(run.model) else None
    rows = []
    for i, edit in enumerate(edits):
        answer, other, near = answers[i], rephrase_answers[i], local_answers[i]
        assert answer is not None  # every edit has a prompt
        plain = plain_answers[i]
        edited_tokens, plain_tokens = local_edited[i], local_plain[i]
        agree = None
        if edited_tokens is not None and plain_tokens is not None:
            agree = sum(a == b for a, b in zip(edited_tokens, plain_tokens, strict=True))
        held = None if memory is None else memory.shard_of(edit.id)
        rows.append(
            {
                "id": edit.id,
                "prompt": edit.prompt,
                "target_new": edit.target_new,
                "reliability": reliability[i],
                "unedited_reliability": plain_reliability[i],
                "answer": answer.text,
                "answer_is_target": same_text(answer.text, edit.target_new),
                "answer_contains": contains(answer.text, edit.target_new),
                "route": answer.route,
                "right_shard": None if held is None else answer.route == held,
                "rephrase_prompt": edit.rephrase_prompt,
                "generalization": generalization[i],
                "unedited_generalization": plain_generalization[i],
                "rephrase_answer": None if other is None else other.text,
                "rephrase_is_target": (
                    None if other is None else same_text(other.text, edit.target_new)
                ),
                "rephrase_route": None if other is None else other.route,
                "locality_prompt": edit.locality_prompt,
                "locality_hits": agree,
                "locality_positions": None if plain_tokens is None else len(plain_tokens),
                "locality_answer": None if near is None else near.text,
                "locality_unedited_answer": None if plain is None else plain.text,
                "locality_route": None if near is None else near.route,
            }
        )
    return rows


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def average(key: str) -> float | None:
        return mean(row[key] for row in rows)

    def share(key: str, side: bool) -> float | None:
        return mean(None if row[key] is None else (row[key] >= 0) is side for row in rows)

    hits = [row["locality_hits"] for row in rows if row["locality_hits"] is not None]
    positions = [row["locality_positions"] for row in rows if row["locality_hits"] is not None]
    return {
        "n": len(rows),
        "reliability": average("reliability"),
        "generalization": average("generalization"),
        "locality": sum(hits) / sum(positions) if positions else None,
        "generation": {
            "reliability": average("answer_is_target"),
            "generalization": average("rephrase_is_target"),
            "contains": average("answer_contains"),
            "locality": mean(
                None
                if row["locality_answer"] is None
                else row["locality_answer"] == row["locality_unedited_answer"]
                for row in rows
            ),
        },
        "routing": {
            "edit_to_side": share("route", side=True),
            "rephrase_to_side": share("rephrase_route", side=True),
            "locality_to_main": share("locality_route", side=False),
            "right_shard": average("right_shard"),
        },
        "unedited": {
            "reliability": average("unedited_reliability"),
            "generalization": average("unedited_generalization"),
        },
    }
