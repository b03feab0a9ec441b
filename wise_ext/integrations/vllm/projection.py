"""The side memory beside a served down projection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wise_ext.integrations.vllm.requests import RequestRoute, token_values
from wise_ext.memory import MAIN, Cues, MixedBank, PackedBank
from wise_ext.memory.cues import NO_CUE
from wise_ext.memory.growing import Growing


class SideProjection:
    """Adds ``D_route (a + cue)`` to what a projection gives, token by token.

    Routes and cues lie in tensors that stay where they are from the first step to the last, longer
    than any step: compiled code and captured graphs read them there, and hold no route themselves.

    Args:
        bank: the shards, where the projection computes and in its dtype.
        cues: what the numbers of cues stand for; None where there are none.
        tokens: the most that one step computes, padding included.
        requests: the most that one step has.
        dtype: of the activations.
        device: of the activations.
    """

    def __init__(
        self,
        bank: PackedBank | MixedBank,
        cues: Cues | None,
        tokens: int,
        requests: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bank, self.cues = _of_fixed_shapes(bank), cues
        self._pinned = device.type == "cuda"
        self._route = torch.full((tokens,), MAIN, dtype=torch.int32, device=device)
        # Which line of the table enters the shard with a token; the first is no cue.
        self._line = torch.zeros(tokens, dtype=torch.int64, device=device)
        lines = requests + 1 if cues is not None else 1
        self._table = torch.zeros(lines, bank.shape[1], dtype=dtype, device=device)
        self._lines = CueLines(lines)
        self._used = 0
        # Warm-up and capture, before the first step, run what a routed step runs.
        self._routed = True

    def begin(
        self, routes: Sequence[RequestRoute], counts: Sequence[int] | NDArray[np.int32]
    ) -> None:
        """Make ready for a step.

        Args:
            routes: of its requests, in the order in which their tokens lie.
            counts: how many tokens each has in this step.
        """
        self._routed = any(route.shard != MAIN for route in routes)
        length = max(int(np.sum(counts)), self._used)
        if not self._routed and not self._used:
            return
        self._used = int(np.sum(counts)) if self._routed else 0
        shards = [route.shard for route in routes]
        self._put(self._route, torch.from_numpy(token_values(shards, counts, MAIN, length)))
        if self.cues is not None:
            lines, fresh = self._lines.of([route.cue for route in routes])
            for line, number in fresh:
                self._put(self._table[line], self.cues.vectors(torch.tensor([number]))[0])
            self._put(self._line, torch.from_numpy(token_values(lines, counts, 0, length)))

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add the side memory in place.

        Args:
            y: what the projection gives, ``[N, d_out]``; N may be more than the step's tokens.
            x: what enters it, ``[N, d_in]``.
        """
        if not torch.compiler.is_compiling() and not self._due():
            return
        count = x.shape[0]
        if self.cues is not None:
            x = x + self._table.index_select(0, self._line[:count])
        self.bank.add_side_(y, x, self._route[:count])

    def _due(self) -> bool:
        """Whether this pass may have a routed token, or is being captured for others that do."""
        return self._routed or (self._pinned and torch.cuda.is_current_stream_capturing())

    def _put(self, there: Tensor, values: Tensor) -> None:
        fresh = values.to(there.dtype)
        if self._pinned:  # does not wait, and the step before may still be reading its own
            fresh = fresh.pin_memory()
        there[: len(fresh)].copy_(fresh, non_blocking=True)


def _of_fixed_shapes(bank: PackedBank | MixedBank) -> PackedBank | MixedBank:
    """The bank with its tensors' first dimension no longer open to growth: vLLM's compiled pieces
    take the one open size they are given for the number of tokens."""
    for part in bank.modules():
        if isinstance(part, Growing):
            for name, tensor in part.held().items():
                setattr(part, name, tensor.detach())
    return bank


class CueLines:
    """Which line of a table holds which cue, while requests come and go.

    Args:
        lines: how many there are; line 0 stays empty.
    """

    def __init__(self, lines: int) -> None:
        self._line_of: dict[int, int] = {}
        self._free = list(range(1, lines))

    def of(self, numbers: Iterable[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The lines of these cues, 0 for none; and those to be written, with their numbers."""
        wanted = list(numbers)
        for number in set(self._line_of) - set(wanted):
            self._free.append(self._line_of.pop(number))
        fresh = []
        for number in dict.fromkeys(wanted):
            if number != NO_CUE and number not in self._line_of:
                self._line_of[number] = self._free.pop()
                fresh.append((self._line_of[number], number))
        return [self._line_of.get(number, 0) for number in wanted], fresh
