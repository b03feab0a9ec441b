"""Temporary changes of how a patched model routes, and a look at what it decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wise_ext.errors import ModelError
from wise_ext.memory import Decision, uncued
from wise_ext.models.generation import decision_of
from wise_ext.models.installed import Patch, patch_of


@contextmanager
def prompt_lengths(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """Score texts by the route their prompts take, as generation would.

    Within the block only the first `lengths[b]` real tokens of row b decide, wherever its pads
    are; what follows them uses that route.

    Args:
        model: a patched model.
        lengths: tokens of each row's prompt, one a row (or one for n rows each).

    Raises:
        ModelError: the model is not patched, or a length is not a positive whole number.
    """
    installed = patch_of(model)
    state = installed.routing.state
    limits = torch.as_tensor(lengths).reshape(-1)
    if limits.is_floating_point() or limits.numel() == 0 or int(limits.min()) < 1:
        raise ModelError("prompt lengths are counted in tokens: give one number >= 1 a row")
    outer, state.limits = state.limits, _near(installed, limits.to(torch.int64))
    try:
        yield
    finally:
        state.limits = outer


@contextmanager
def force_route(
    model: nn.Module,
    route: int | Sequence[int] | Tensor,
    cue: Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Send rows where the caller says, whatever the router would decide.

    Args:
        model: a patched model.
        route: a shard, or -1 for main memory: one for all rows, or one a row.
        cue: the number of the cue that goes with each route, as ``last_decision`` has it; None
            gives none, and the shard then knows an edit by its wording alone.

    Raises:
        ModelError: the model is not patched, there is no such shard, or there are not as many cues
            as routes.
    """
    installed = patch_of(model)
    count = len(installed.memory.shards)
    routes = torch.as_tensor(route).reshape(-1)
    wrong = [int(r) for r in routes if not -1 <= r < count or r != int(r)]
    if wrong or routes.numel() == 0:
        what = f"shard {wrong[0]}" if wrong else "an empty list of routes"
        raise ModelError(f"cannot force {what}: there are {count} shards (-1 is main memory)")
    numbers = None
    if cue is not None:
        numbers = _near(installed, torch.as_tensor(cue, dtype=torch.int64).reshape(-1))
        if len(numbers) != len(routes):
            raise ModelError(f"{len(numbers)} cues for {len(routes)} routes: give one a route")
    state = installed.routing.state
    forced = _near(installed, routes.to(torch.int32))
    decision = uncued(forced) if numbers is None else Decision(forced, numbers)
    outer, state.forced = state.forced, installed.routing.course(decision)
    try:
        yield
    finally:
        state.forced = outer


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block a patched model behaves exactly as the unedited one.

    Raises:
        ModelError: the model is not patched.
    """
    state = patch_of(model).routing.state
    outer, state.enabled = state.enabled, False
    try:
        yield
    finally:
        state.enabled = outer


def last_route(model: nn.Module) -> Tensor | None:
    """The latest decision of a patched model, int32 `[B]`; None before its first forward pass.

    A row that continues a generation decides nothing; -1 is main memory.

    Raises:
        ModelError: the model is not patched.
    """
    decision = last_decision(model)
    return None if decision is None else decision.route


def last_decision(model: nn.Module) -> Decision | None:
    """``last_route``, and the numbers of the cues that came with it.

    Raises:
        ModelError: the model is not patched.
    """
    return patch_of(model).routing.state.decision


def decide_routes(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Decision:
    """The routes prompts would take; the model runs only as far as that needs.

    Args:
        model: a patched model.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, or None where every token is real.

    Returns:
        The route of each row, and the number of its cue.

    Raises:
        ModelError: the model is not patched.
    """
    return decision_of(model, patch_of(model).routing, input_ids, attention_mask)


def _near(installed: Patch, values: Tensor) -> Tensor:
    """Bring values to the model's device once, and not in every forward pass."""
    return values.to(installed.dual.bank.values.device)
