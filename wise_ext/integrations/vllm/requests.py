"""Routes on requests: what vLLM carries from the engine's door to the worker.

A route is part of the request, in its sampling parameters' ``extra_args``. Whatever vLLM does with
a request (chunks of its prompt, preemption, recomputation, another place in the batch), it comes to
the worker with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wise_ext.integrations.vllm.settings import NAME
from wise_ext.memory import MAIN
from wise_ext.memory.cues import NO_CUE


class RequestRoute(NamedTuple):
    """Where a request goes: a shard, or -1 for main memory, and the number of its cue."""

    shard: int
    cue: int


MAIN_ROUTE = RequestRoute(MAIN, NO_CUE)


def marked(extra_args: Mapping[str, Any] | None, route: RequestRoute) -> dict[str, Any] | None:
    """A request's ``extra_args`` with its route; what a client wrote in its place is dropped."""
    rest = {key: value for key, value in (extra_args or {}).items() if key != NAME}
    if route != MAIN_ROUTE:
        rest[NAME] = route._asdict()
    return rest or None


def route_of(extra_args: Mapping[str, Any] | None) -> RequestRoute:
    """The route that ``marked`` wrote; main memory where there is none."""
    found = (extra_args or {}).get(NAME)
    return MAIN_ROUTE if found is None else RequestRoute(**found)


def salted(salt: str | None, route: RequestRoute, checksum: str) -> str | None:
    """The salt of a request's prefix blocks: those computed under one route of one memory are never
    taken for another's, and those of main memory are the unedited model's."""
    if route == MAIN_ROUTE:
        return salt
    mark = f"{NAME}:{checksum}:{route.shard}:{route.cue}"
    return mark if salt is None else f"{salt}\n{mark}"


class HeldRoutes:
    """The routes of the requests that a worker knows of, from admission to the end."""

    def __init__(self) -> None:
        self._held: dict[str, RequestRoute] = {}

    def update(
        self, finished: Iterable[str], new: Iterable[tuple[str, Mapping[str, Any] | None]]
    ) -> None:
        """Take note of a step.

        Args:
            finished: requests that are over.
            new: id and ``extra_args`` of those that come in, or come back; an id that is over may
                come in again in the same step.
        """
        for name in finished:
            self._held.pop(name, None)
        for name, extra_args in new:
            route = route_of(extra_args)
            self._held.pop(name, None)
            if route != MAIN_ROUTE:
                self._held[name] = route

    def of(self, names: Iterable[str]) -> list[RequestRoute]:
        """The routes of these requests, in order."""
        return [self._held.get(name, MAIN_ROUTE) for name in names]

    def __len__(self) -> int:
        """How many of them go to a shard."""
        return len(self._held)


def token_values(
    values: Sequence[int], counts: Sequence[int] | NDArray[np.int32], rest: int, length: int
) -> NDArray[np.int64]:
    """One value a token of a step.

    Args:
        values: one a request.
        counts: how many tokens of each request the step computes, one request after the other.
        rest: what the tokens behind them get.
        length: of the result; at least the sum of ``counts``.

    Returns:
        int64 ``[length]``.
    """
    tokens = np.full(length, rest, dtype=np.int64)
    own = np.repeat(np.asarray(values, dtype=np.int64), counts)
    tokens[: len(own)] = own
    return tokens
