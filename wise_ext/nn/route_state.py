"""Which rows of the running forward pass use which shard."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext.memory import Decision


class Course(NamedTuple):
    """Where rows go and what comes with them: a decision about `n` rows, and the cues that its
    numbers stand for, fp32 `[n, d_in]`, which enter a shard with every token of a routed row
    besides the token's activation; None where there are none."""

    decision: Decision
    cue: Tensor | None


class Glance:
    """Whether a route names a shard at all: seen once, and without waiting for a GPU.

    Args:
        route: int32 `[B]`.
    """

    def __init__(self, route: Tensor) -> None:
        self._on_gpu = route.device.type == "cuda"
        self._routed: bool | None = None
        if route.device.type == "cpu":
            self._routed = bool((route >= 0).any())
        elif not self._on_gpu or torch.cuda.is_current_stream_capturing():
            self._routed = True
        else:
            # The answer travels to the host behind the work queued so far; `routed` asks whether
            # it has arrived.
            with torch.cuda.device(route.device):
                self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
                self._flag.copy_((route >= 0).any(), non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def routed(self) -> bool:
        """False only when it is known that no row is routed to a shard."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            # A captured graph runs again with other routes in the same place.
            return True
        if self._routed is None and self._arrived.query():
            self._routed = bool(self._flag)
        return self._routed is not False


class RouteState:
    """Shared by the pieces of one patched model: what is forced, and the forward in progress.

    Attributes:
        enabled: False makes the model behave exactly as the unedited one.
        admitted: which rows may use this memory: all (True), none, or bool `[n]`, one a row.
        forced: where each row goes whatever the router would say (n = 1: all rows); None leaves
            the choice to the router.
        limits: int64 `[n]`, how many real tokens of each row decide; None means all of them.
        course: where each of the `B` rows of the running forward pass goes; None where there is
            none, or not yet one.
        real: bool `[B, T]`, the tokens that decide, while a decision is due.
        decide: whether the running forward pass has to decide.
        glance: a look at the route. Outside compiled code it lets a forward pass in which no row
            is routed skip the side memory; compiled code never reads it.
        decision: the latest one; None before the first.
        packed: where each token of a packed pass goes (continuous batching).
    """

    def __init__(self) -> None:
        self.admitted: bool | Tensor = True
        self.packed: Decision | None = None
        self.reset()

    def reset(self) -> None:
        """Nothing forced, limited or known, as after a fresh patch."""
        self.enabled = True
        self.forced: Course | None = None
        self.limits: Tensor | None = None
        self.course: Course | None = None
        self.real: Tensor | None = None
        self.decide = False
        self.glance: Glance | None = None
        self.decision: Decision | None = None

    def await_decision(self, real: Tensor) -> None:
        """The router's layer will decide from the tokens marked in `real`, bool `[B, T]`."""
        self.clear()
        self.real = real
        self.decide = True

    def settle(self, course: Course, glance: Glance | None = None) -> None:
        """This is where the `B` rows of the running forward pass go.

        Args:
            course: one row of it for each.
            glance: a look at its route from an earlier pass; None looks.
        """
        self.clear()
        self.course = course
        if not torch.compiler.is_compiling():
            # One look a decision, not one a layer call.
            self.glance = Glance(course.decision.route) if glance is None else glance

    def clear(self) -> None:
        """Forget the forward pass: without a course every module gives main memory's output."""
        self.course = None
        self.real = None
        self.decide = False
