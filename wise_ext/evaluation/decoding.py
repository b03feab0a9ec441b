"""Greedy decoding of a batch whose rows leave it once they have stopped.

``model.generate`` carries every row to the end of the slowest one. Here rows that have stopped are
cut out of the cache, so their columns cost nothing. What is written is what ``generate`` writes:
the same prefill, mask and positions, and rows never influence one another.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..memory import Decision

# Cutting rows out copies the rest of the cache: only done when this share of the rows has stopped.
_IDLE_SHARE = 0.2
# What a cache needs for that.
_CUT = "batch_select_indices"


class Taken(NamedTuple):
    """Where a row went: -1 for main memory, else a shard, and the number of its cue there."""

    route: int
    cue: int


class Written(NamedTuple):
    """Tokens of an answer, the stop token included, and where its row went."""

    tokens: list[int]
    taken: Taken


@torch.no_grad()
def decode_greedily(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    stop_ids: Collection[int],
    max_new_tokens: int,
    routes: Sequence[Taken] | None = None,
) -> list[Written]:
    """Continue every row of a batch greedily to its stop token.

    Args:
        model: patched or not; ``generate`` takes over where its cache cannot be cut, and must be
            set to greedy decoding with these stop tokens and this length.
        ids: prompts padded on the left, int64 ``[B, T]``.
        mask: ``[B, T]``, 1 for real tokens.
        stop_ids: tokens that end an answer.
        max_new_tokens: the longest answer.
        routes: where the rows go, one a row; None lets the model decide at prefill.

    Returns:
        One answer a row.
    """
    with forced(model, routes):
        output = model(input_ids=ids, attention_mask=mask, **_options(model, mask, ids.shape[1]))
    cache: Any = getattr(output, "past_key_values", None)
    if not hasattr(cache, _CUT):
        return _generated(model, ids, mask, stop_ids, routes)
    taken = routes or taken_by(model, ids.shape[0])
    answers: list[list[int]] = [[] for _ in taken]
    active = list(range(len(answers)))  # rows of the cache, by their place in the batch
    running = set(active)
    last: Tensor = output.logits[:, -1]
    while True:
        following = last.argmax(dim=-1)
        for place, token in zip(active, following.tolist(), strict=True):
            if place in running:
                answers[place].append(token)
                if token in stop_ids or len(answers[place]) == max_new_tokens:
                    running.discard(place)
        if not running:
            return [Written(a, r) for a, r in zip(answers, taken, strict=True)]
        if len(running) <= (1 - _IDLE_SHARE) * len(active):
            kept = [row for row, place in enumerate(active) if place in running]
            rows = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(rows)
            following, mask = following[rows], mask[rows]
            active = [active[row] for row in kept]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        # Forced, because the route that the cache carries still has the rows that have left.
        with forced(model, [taken[place] for place in active]):
            output = model(
                input_ids=following.unsqueeze(1),
                attention_mask=mask,
                past_key_values=cache,
                **_options(model, mask, 1),
            )
        last = output.logits[:, -1]


def forced(model: PreTrainedModel, routes: Sequence[Taken] | None) -> AbstractContextManager[None]:
    """Send the rows of a patched model where ``routes`` says; None leaves it to the model."""
    if routes is None or not models.is_patched(model):
        return nullcontext()
    return models.force_route(model, [t.route for t in routes], [t.cue for t in routes])


def taken_by(model: PreTrainedModel, rows: int) -> list[Taken]:
    """The model's latest decision; main memory throughout where there is no other."""
    latest = models.last_decision(model) if models.is_patched(model) else None
    return [Taken(-1, 0)] * rows if latest is None else each(latest)


def each(decision: Decision) -> list[Taken]:
    """A decision row by row."""
    return [
        Taken(*pair) for pair in zip(decision.route.tolist(), decision.cue.tolist(), strict=True)
    ]


def _options(model: PreTrainedModel, mask: Tensor, width: int) -> dict[str, Any]:
    """What ``generate`` passes along too: positions without the pads, one row of logits."""
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True}
    if "position_ids" in known:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1
    return options


def _generated(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    stop_ids: Collection[int],
    routes: Sequence[Taken] | None,
) -> list[Written]:
    generator: Any = model
    with forced(model, routes):
        output = generator.generate(input_ids=ids, attention_mask=mask)
    taken = routes or taken_by(model, ids.shape[0])
    rows = []
    for written in output[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(written) if token in stop_ids), len(written))
        rows.append(written[: end + 1])
    return [Written(tokens, place) for tokens, place in zip(rows, taken, strict=True)]
