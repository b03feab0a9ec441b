"""A bank of packed and of low-rank shards, under one numbering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wise_ext.memory.bank import PackedBank
from wise_ext.memory.growing import Growing
from wise_ext.memory.low_rank import LowRankBank


class MixedBank(Growing):
    """``k`` shards of one projection, each either in the packed or in the low-rank bank.

    Attributes:
        packed: those with a mask.
        low: the others.
        packed_place: int32 ``[k + 1]``: a shard's place in ``packed``, -1 for the others; the last
            entry stands for main memory.
        low_place: the same for ``low``.
        shape: ``(d_out, d_in)`` of the projection.
    """

    packed_place: Tensor
    low_place: Tensor
    columns = None  # all of them

    def __init__(self, packed: PackedBank, low: LowRankBank, is_low: list[bool]) -> None:
        super().__init__()
        self.packed, self.low = packed, low
        self.shape = packed.shape
        where = torch.tensor(is_low, dtype=torch.bool)
        device = packed.values.device
        self.hold(packed_place=_places(~where).to(device), low_place=_places(where).to(device))

    @property
    def num_shards(self) -> int:
        """How many shards the bank holds [k]."""
        return self.packed_place.shape[0] - 1

    @property
    def values(self) -> Tensor:
        """The packed shards' values."""
        return self.packed.values

    @property
    def nbytes(self) -> int:
        """Size of the bank in bytes."""
        return self.packed.nbytes + self.low.nbytes

    def become(self, other: Any) -> None:
        """See ``Growing.become``."""
        super().become(other)
        self.packed.become(other.packed)
        self.low.become(other.low)

    def part(self, start: int, stop: int) -> MixedBank:
        """Return the bank of the columns ``start`` to ``stop`` of each shard, on its device."""
        is_low = [place >= 0 for place in self.low_place[:-1].tolist()]
        return MixedBank(self.packed.part(start, stop), self.low.part(start, stop), is_low)

    def add_side_(self, y: Tensor, x: Tensor, route: Tensor) -> None:
        """Add the routed shards in place; arguments as for ``PackedBank.add_side_``."""
        place = route.long()  # main memory's -1 finds the last entry
        if self.packed.num_shards:
            self.packed.add_side_(y, x, self.packed_place[place])
        self.low.add_side_(y, x, self.low_place[place])

    def extra_repr(self) -> str:
        """Name shape and shards when the model is printed."""
        return f"shape={self.shape}, shards={self.num_shards}"


def _places(mine: Tensor) -> Tensor:
    """int32 ``[k + 1]``: a running number where ``mine``, else -1, and -1 behind."""
    numbers = torch.where(mine, mine.cumsum(0) - 1, -1)
    return torch.cat([numbers, numbers.new_full((1,), -1)]).to(torch.int32)
