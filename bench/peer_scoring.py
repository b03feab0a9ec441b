"""One scorer for both editors: it asks a Hugging Face model, whatever was put into it.

The metrics are those of `wise_ext.evaluation`; what differs is how "unedited" comes about: there
the side memory is switched off, here the answers of the bare model are taken down beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import percentile
from wise_ext.editing.edits import Edit
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.evaluation.generation import generate_answers
from wise_ext.evaluation.metrics import contains, mean, same_text, share_equal
from wise_ext.evaluation.scoring import TokenPair, greedy_tokens

MAX_NEW_TOKENS = 32
METRICS = (
    "reliability",
    "generalization",
    "locality",
    "generated_reliability",
    "generated_generalization",
    "generated_contains",
    "generated_locality",
)
_PREFILL = 128
_DECODED = 4


@dataclass(frozen=True)
class Local:
    """What the bare model says to an edit's locality prompt: under teacher forcing, and freely."""

    tokens: list[int] | None
    answer: str | None


class Scorer:
    """Scores edits on one model; the bare model's answers are asked for once an edit.

    Args:
        model: bare while the scorer asks for references, edited while it scores.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._local: dict[str, Local] = {}

    def refer(self, edits: Sequence[Edit], batch_size: int = 16) -> None:
        """Take down what the model, now unedited, says to the edits' locality prompts."""
        new = [edit for edit in edits if edit.id not in self._local]
        for edit, tokens, answer in zip(
            new, self._forced_locality(new, batch_size), self._said(new, batch_size), strict=True
        ):
            self._local[edit.id] = Local(tokens, answer)

    def details(self, edits: Sequence[Edit], batch_size: int) -> list[dict[str, Any]]:
        """One dict of `METRICS` an edit, by the model as it is now; None where a field is absent.

        Locality is the share of an edit's own answer tokens on which both models agree.
        """
        n = len(edits)
        targets = [self._pair(e.prompt, e.target_new) for e in edits]
        others = [self._pair(e.rephrase_prompt, e.target_new) for e in edits]
        forced = [self._shares(pairs, batch_size) for pairs in (targets, others)]
        local = self._forced_locality(edits, batch_size)
        answers = self._answers([e.prompt for e in edits], batch_size)
        rephrased = self._answers([e.rephrase_prompt for e in edits], batch_size)
        said = self._said(edits, batch_size)
        found = []
        for i in range(n):
            edit, bare, tokens, answer = edits[i], self._local[edits[i].id], local[i], answers[i]
            agree = None
            if tokens is not None and bare.tokens is not None:
                agree = share_equal(tokens, bare.tokens)
            other = rephrased[i]
            found.append(
                {
                    "id": edit.id,
                    "reliability": forced[0][i],
                    "generalization": forced[1][i],
                    "locality": agree,
                    "generated_reliability": answer and same_text(answer, edit.target_new),
                    "generated_generalization": None
                    if other is None
                    else same_text(other, edit.target_new),
                    "generated_contains": answer and contains(answer, edit.target_new),
                    "generated_locality": None if said[i] is None else said[i] == bare.answer,
                }
            )
            for name in ("generated_reliability", "generated_contains"):
                found[-1][name] = bool(found[-1][name])
        return found

    def _pair(self, prompt: str | None, answer: str | None) -> TokenPair | None:
        if prompt is None or answer is None:
            return None
        return (
            encode_prompt(self._tokenizer, prompt),
            encode_target(self._tokenizer, answer, stop=False),
        )

    def _greedy(self, pairs: Sequence[TokenPair | None], batch_size: int) -> list[list[int] | None]:
        present = [(i, pair) for i, pair in enumerate(pairs) if pair is not None]
        found: list[list[int] | None] = [None] * len(pairs)
        for row, tokens in greedy_tokens(self._model, [p for _, p in present], batch_size):
            found[present[row][0]] = tokens
        return found

    def _shares(self, pairs: Sequence[TokenPair | None], batch_size: int) -> list[float | None]:
        return [
            None if tokens is None or pair is None else share_equal(tokens, pair[1])
            for tokens, pair in zip(self._greedy(pairs, batch_size), pairs, strict=True)
        ]

    def _forced_locality(self, edits: Sequence[Edit], batch_size: int) -> list[list[int] | None]:
        pairs = [self._pair(e.locality_prompt, e.locality_ground_truth) for e in edits]
        return self._greedy(pairs, batch_size)

    def _said(self, edits: Sequence[Edit], batch_size: int) -> list[str | None]:
        return self._answers([e.locality_prompt for e in edits], batch_size)

    def _answers(self, prompts: Sequence[str | None], batch_size: int) -> list[str | None]:
        present = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
        found: list[str | None] = [None] * len(prompts)
        if present:
            written = generate_answers(
                self._model,
                self._tokenizer,
                [prompt for _, prompt in present],
                batch_size=batch_size,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            for (i, _), answer in zip(present, written, strict=True):
                found[i] = answer.text
        return found


def summary(details: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over edits, and how many there were."""
    return {"n": len(details), **{name: mean(d[name] for d in details) for name in METRICS}}


def repeated(tokenizer: Any, text: str) -> list[int]:
    """`text` over and over, cut to the length of a prefill."""
    ids = encode_prompt(tokenizer, text)
    return (ids * -(-_PREFILL // len(ids)))[:_PREFILL]


@torch.no_grad()
def overhead(
    model: Any, ids: list[int], switch: Callable[[bool], object], pairs: int
) -> dict[str, Any]:
    """What an edited model costs beside the bare one: a prefill of 128 tokens and a decoded token,
    alternating; CPU time with one thread, wall time with more, as `bench.timing`.

    Args:
        model: the model.
        ids: what is read.
        switch: called with True, the model is edited from then on; with False, bare.
        pairs: how often each side is timed.

    Returns:
        the medians of the paired ratios, edited over bare, and the bare milliseconds.
    """
    prompt = torch.tensor([ids], device=model.device)
    samples: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(pairs + 1):
        for edited in (True, False) if number % 2 else (False, True):
            switch(edited)
            samples[edited].append(_read_and_write(model, prompt))
    # The first pair warms up.
    edited_times, bare = samples[True][1:], samples[False][1:]
    clock = "process" if torch.get_num_threads() == 1 else "wall"
    found: dict[str, Any] = {"pairs": pairs, "clock": clock}
    for place, name in enumerate(("prefill", "decode")):
        ratios = [e[place] / b[place] for e, b in zip(edited_times, bare, strict=True)]
        found[name] = percentile(ratios, 0.5)
        found[f"{name}_low"], found[f"{name}_high"] = (percentile(ratios, s) for s in (0.2, 0.8))
        found[f"{name}_bare_ms"] = percentile([b[place] for b in bare], 0.5) * 1e3
    return found


def _read_and_write(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds of a prefill, and of a token decoded after it."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    read = now() - start
    start = now()
    for _ in range(_DECODED):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return read, (now() - start) / _DECODED
