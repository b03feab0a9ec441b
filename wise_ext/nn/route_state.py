"""Which rows of the running forward pass use which shard."""

from __future__ import annotations

import torch
from torch import Tensor


class RouteState:
    """Shared by the pieces of one patched model: what is forced, and the forward in progress.

    Attributes:
        enabled: False makes the model behave exactly as the unedited one.
        forced: int32 `[n]`, the route of each row whatever the router would say (n = 1: of all
            rows); None leaves the choice to the router.
        limits: int64 `[n]`, how many real tokens of each row decide; None means all of them.
        route: int32 `[B]`, the route of each row of the running forward pass, -1 for main memory;
            None where there is none, or not yet one.
        real: bool `[B, T]`, the tokens that decide, while a decision is due.
        decide: whether the running forward pass has to decide.
        active: whether any row is routed to a shard. Outside compiled code it lets a forward pass
            without one skip the side memory; compiled code never reads it.
        last_route: int32 `[B]`, the latest decision; None before the first.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.forced: Tensor | None = None
        self.limits: Tensor | None = None
        self.route: Tensor | None = None
        self.real: Tensor | None = None
        self.decide = False
        self.active = True
        self.last_route: Tensor | None = None

    def await_decision(self, real: Tensor) -> None:
        """The router's layer will decide from the tokens marked in `real`, bool `[B, T]`."""
        self.clear()
        self.real = real
        self.decide = True

    def settle(self, route: Tensor, active: bool | None = None) -> None:
        """This is the route, int32 `[B]`, of the running forward pass.

        Args:
            route: -1 or a shard for each row.
            active: whether it names a shard at all; None looks.
        """
        self.clear()
        self.route = route
        if not torch.compiler.is_compiling():
            # One look a decision, not one a layer call: on a GPU looking waits for the device.
            self.active = bool((route >= 0).any()) if active is None else active

    def clear(self) -> None:
        """Forget the forward pass: without a route every module gives main memory's output."""
        self.route = None
        self.real = None
        self.decide = False
