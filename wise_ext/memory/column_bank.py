"""A bank shared out over processes, each with some columns of every shard.

A row-parallel projection (tensor parallelism) holds some columns of its weight in each process, is
given the same entries of the activation, and adds up the products of all. A side memory beside it
is shared out the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wise_ext.memory.bank import PackedBank
from wise_ext.memory.growing import Growing
from wise_ext.memory.mixed_bank import MixedBank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Products that are added up at a time where their norms alone are wanted.
_AT_ONCE = 1 << 22


class Columns(NamedTuple):
    """The columns ``start`` to ``stop`` of ``width``, which this process of a mesh holds.

    Each method but ``take`` brings all processes of the mesh together: all have to call it.
    """

    mesh: DeviceMesh
    width: int
    start: int
    stop: int

    def take(self, x: Tensor) -> Tensor:
        """This process's entries of ``[..., width]``; those alone are given back as they are."""
        return x[..., self.start : self.stop] if x.shape[-1] == self.width else x

    def whole(self, x: Tensor) -> Tensor:
        """``[..., width]`` from the entries that each process has of it; a whole one as it is."""
        from torch.distributed.tensor import DTensor, Shard

        if x.shape[-1] == self.width:
            return x
        shape = torch.Size((*x.shape[:-1], self.width))
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(
            x.contiguous(), self.mesh, [Shard(x.dim() - 1)], shape=shape, stride=stride
        )
        return parts.full_tensor()

    def total(self, x: Tensor) -> Tensor:
        """The sum of what all processes have."""
        from torch.distributed.tensor import DTensor, Partial

        return DTensor.from_local(x, self.mesh, [Partial()]).full_tensor()


class ColumnBank(Growing):
    """What a ``PackedBank`` or ``MixedBank`` does, by all processes of a mesh together.

    Args:
        mine: the bank of this process's columns.
        columns: which those are.
    """

    def __init__(self, mine: PackedBank | MixedBank, columns: Columns) -> None:
        super().__init__()
        self.mine = mine
        self.columns = columns

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the whole projection."""
        return self.mine.shape[0], self.columns.width

    @property
    def num_shards(self) -> int:
        """How many shards the bank holds [k]."""
        return self.mine.num_shards

    @property
    def values(self) -> Tensor:
        """The packed shards' values in this process's columns."""
        return self.mine.values

    @property
    def nbytes(self) -> int:
        """Size of this process's part in bytes."""
        return self.mine.nbytes

    def become(self, other: Any) -> None:
        """See ``Growing.become``."""
        super().become(other)
        self.mine, self.columns = other.mine, other.columns

    def add_side_(self, y: Tensor, x: Tensor, route: Tensor) -> None:
        """Add the routed side memory in place; arguments as for ``PackedBank.add_side_``, but ``x``
        may be this process's entries ``[N, stop - start]`` alone.

        ``y`` is what the projection makes of all columns, the same in each process, so the parts
        are added up on their own. Rows without a route keep their bits.
        """
        part = torch.zeros(y.shape, device=y.device)
        self.mine.add_side_(part, self.columns.take(x), route)
        added = (y + self.columns.total(part)).to(y.dtype)
        y.copy_(torch.where(route.unsqueeze(1) >= 0, added, y))

    def side_norm(self, x: Tensor, rows: Tensor, shards: Tensor) -> Tensor:
        """Return the indicators of given pairs; see ``PackedBank.side_norm``. A norm is not the sum
        of its parts: the products are, and their norms are taken afterwards."""
        x = self.columns.take(x)
        norms = [torch.zeros(0, device=x.device)]
        at_once = max(1, _AT_ONCE // self.shape[0])
        for some, of in zip(rows.split(at_once), shards.split(at_once), strict=True):
            part = torch.zeros(len(some), self.shape[0], device=x.device)
            self.mine.add_side_(part, x[some.long()], of)
            norms.append(self.columns.total(part).norm(dim=1))
        return torch.cat(norms)

    def extra_repr(self) -> str:
        """Name the columns when the model is printed."""
        return f"columns {self.columns.start} to {self.columns.stop} of {self.columns.width}"


#: What stands beside a projection: all of the side memory, or this process's part.
Bank = PackedBank | MixedBank | ColumnBank
