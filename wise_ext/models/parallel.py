"""Side memories beside a projection that processes share: tensor parallelism.

transformers' row-parallel projections are called with this process's entries of the activation and
give the sum over all processes: their ``forward`` holds the reduction, so what is added to it has
been added up before (``ColumnBank``). The indicator is made of such sums; a key is read from a
whole activation, which is gathered where a route is decided, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.errors import ModelError
from wise_ext.memory import (
    Bank,
    ColumnBank,
    Columns,
    Decision,
    KeyRouter,
    Router,
    SideMemory,
)


def columns_of(projection: nn.Module) -> Columns | None:
    """The columns of a projection that this process holds; None where it holds all of them.

    Raises:
        ModelError: the weight is shared out in another way.
    """
    weight: Any = getattr(projection, "weight", None)
    if not hasattr(weight, "full_tensor"):
        return None
    mesh, placements = weight.device_mesh, weight.placements
    if all(placement.is_replicate() for placement in placements):
        return None
    width, last = weight.shape[-1], weight.dim() - 1
    if mesh.ndim != 1 or not (placements[0].is_shard(last) or placements[0].is_shard(-1)):
        raise ModelError(
            f"the edited projection is shared out as {placements}: a side memory can stand beside "
            "a whole or a row-parallel one ('rowwise' in the model's tp_plan)"
        )
    # Shard gives each process as many columns as the first, as long as there are any.
    start = min(-(-width // mesh.size()) * mesh.get_local_rank(), width)
    return Columns(mesh, width, start, start + weight.to_local().shape[-1])


def is_shared_out(model: nn.Module) -> bool:
    """Whether processes share the weights of a model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def bank_beside(
    projection: nn.Module, memory: SideMemory, dtype: torch.dtype, device: torch.device
) -> Bank:
    """The memory's shards in the form a projection needs: its own columns of them.

    Raises:
        ModelError: see ``columns_of``.
    """
    columns = columns_of(projection)
    if columns is None:
        return memory.bank(dtype, device)
    mine = memory.bank(dtype).part(columns.start, columns.stop)
    return ColumnBank(mine.to(device), columns)


def with_whole_keys(model: nn.Module, router: Router | None) -> Router | None:
    """The router, given whole activations where it looks for keys in them."""
    if not isinstance(router, KeyRouter):
        return router
    columns = columns_of(model.get_submodule(router.layer))
    return router if columns is None else GatheringRouter(router, columns)


class GatheringRouter:
    """A router that is given this process's entries of activations and decides by the whole."""

    def __init__(self, router: KeyRouter, columns: Columns) -> None:
        self.router = router
        self.columns = columns
        self.layer, self.cues = router.layer, router.cues

    def decide(self, a: Tensor, real: Tensor) -> Decision:
        """See ``Router.decide``; ``a`` may be ``[B, T, stop - start]``."""
        return self.router.decide(self.columns.whole(a), real)

    def become(self, other: Any) -> None:
        """See ``Router.become``."""
        self.router.become(other.router)
        self.cues = self.router.cues
