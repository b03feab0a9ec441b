"""Temporary changes of how a patched model routes, and a look at what it decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from wise_ext.errors import ModelError
from wise_ext.memory import Decision, uncued
from wise_ext.models.installed import Patch, memories_of, patch_of

#: A memory's name, or None for the unedited model; or one of these a row or request.
Choice: TypeAlias = str | Sequence[str | None] | None

#: In the place of a choice: none was made, and the first memory is used.
UNSAID: Any = object()
# By model, which memories the work begun in this context uses.
_CHOSEN: ContextVar[Mapping[int, Choice]] = ContextVar(
    "wise_ext_memories", default=MappingProxyType({})
)


def chosen(model: nn.Module) -> Any:
    """What was chosen for a model in this context (a thread's or an asynchronous task's), a
    `Choice` or `UNSAID`."""
    return _CHOSEN.get().get(id(model), UNSAID)


def choose(model: nn.Module, memory: Choice) -> Token[Mapping[int, Choice]]:
    """Choose for what begins in this context: calls of `generate`, and requests that are added to
    continuous batching. `unchoose` takes it back, as does the end of the context."""
    return _CHOSEN.set({**_CHOSEN.get(), id(model): memory})


def unchoose(token: Token[Mapping[int, Choice]]) -> None:
    """Take back what `choose` gave this token for."""
    _CHOSEN.reset(token)


@contextmanager
def use_memory(model: nn.Module, memory: Choice) -> Iterator[None]:
    """Choose by name which memory answers, of several that were loaded.

    Holds for forward passes, `generate`, and requests that are added to continuous batching.

    Args:
        model: a patched model.
        memory: a name, for all rows, or one a row (or request); None is the unedited model.

    Raises:
        ModelError: the model is not patched, or has no memory of that name.
    """
    installed = memories_of(model)
    names = [memory] if memory is None or isinstance(memory, str) else list(memory)
    for name in names:
        if name is not None:
            installed.named(name)
    states = {name: patch.routing.state for name, patch in installed.patches.items()}
    outer = {name: state.admitted for name, state in states.items()}
    for name, state in states.items():
        rows = [name == one for one in names]
        state.admitted = rows[0] if len(set(rows)) == 1 else torch.tensor(rows)
    token = choose(model, names[0] if len(names) == 1 else names)
    try:
        yield
    finally:
        unchoose(token)
        for name, state in states.items():
            state.admitted = outer[name]


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
    patches = memories_of(model).patches.values()
    limits = torch.as_tensor(lengths).reshape(-1)
    if limits.is_floating_point() or limits.numel() == 0 or int(limits.min()) < 1:
        raise ModelError("prompt lengths are counted in tokens: give one number >= 1 a row")
    states = [patch.routing.state for patch in patches]
    outer = [state.limits for state in states]
    for patch in patches:
        patch.routing.state.limits = _near(patch, limits.to(torch.int64))
    try:
        yield
    finally:
        for state, limit in zip(states, outer, strict=True):
            state.limits = limit


@contextmanager
def force_route(
    model: nn.Module,
    route: int | Sequence[int] | Tensor,
    cue: Sequence[int] | Tensor | None = None,
    name: str | None = None,
) -> Iterator[None]:
    """Send rows where the caller says, whatever the router would decide.

    Args:
        model: a patched model.
        route: a shard, or -1 for main memory: one for all rows, or one a row.
        cue: the number of the cue that goes with each route, as ``last_decision`` has it; None
            gives none, and the shard then knows an edit by its wording alone.
        name: of the memory whose shards are meant, the others being left out; None is the first.

    Raises:
        ModelError: the model is not patched, there is no such shard, or there are not as many cues
            as routes.
    """
    installed = patch_of(model, name)
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
    forced = _near(installed, routes.to(torch.int32))
    decision = uncued(forced) if numbers is None else Decision(forced, numbers)
    states = [patch.routing.state for patch in memories_of(model).patches.values()]
    outer = [(state.forced, state.admitted) for state in states]
    for state in states:
        state.forced, state.admitted = None, False
    state = installed.routing.state
    state.forced, state.admitted = installed.routing.course(decision), True
    try:
        yield
    finally:
        for state, (course, admitted) in zip(states, outer, strict=True):
            state.forced, state.admitted = course, admitted


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block a patched model behaves exactly as the unedited one.

    Raises:
        ModelError: the model is not patched.
    """
    states = [patch.routing.state for patch in memories_of(model).patches.values()]
    outer = [state.enabled for state in states]
    for state in states:
        state.enabled = False
    try:
        yield
    finally:
        for state, enabled in zip(states, outer, strict=True):
            state.enabled = enabled


def last_route(model: nn.Module, name: str | None = None) -> Tensor | None:
    """The latest decision of a patched model, int32 `[B]`; None before its first forward pass.

    Of the first memory, or the one of this name.

    A row that continues a generation decides nothing; -1 is main memory.

    Raises:
        ModelError: the model is not patched.
    """
    decision = last_decision(model, name)
    return None if decision is None else decision.route


def last_decision(model: nn.Module, name: str | None = None) -> Decision | None:
    """``last_route``, and the numbers of the cues that came with it.

    Raises:
        ModelError: the model is not patched.
    """
    return patch_of(model, name).routing.state.decision


def decide_routes(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    name: str | None = None,
) -> Decision:
    """The routes prompts would take; the model runs only as far as that needs.

    Args:
        model: a patched model.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, or None where every token is real.
        name: of the memory that is asked; None is the first.

    Returns:
        The route of each row, and the number of its cue.

    Raises:
        ModelError: the model is not patched.
    """
    memory = next(iter(memories_of(model).patches)) if name is None else name
    with use_memory(model, memory):
        return patch_of(model, memory).routing.decision_for(model, input_ids, attention_mask)


def _near(installed: Patch, values: Tensor) -> Tensor:
    """Bring values to the model's device once, and not in every forward pass."""
    return values.to(installed.dual.bank.values.device)
