"""A shard added to the weight of the projection that it edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError, ModelError
from ...memory import SideMemory, merge
from ...models import get_module

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def chosen_shards(memory: SideMemory, wanted: Sequence[int] | None) -> list[int]:
    """Check which shards are asked for; None is all of them.

    Raises:
        ConfigError: the memory has none, or not these, or one is named twice.
    """
    count = len(memory.shards)
    if not count:
        raise ConfigError("the memory has no shards: there is nothing to export")
    chosen = list(range(count)) if wanted is None else list(wanted)
    wrong = [shard for shard in chosen if not 0 <= shard < count]
    if wrong:
        raise ConfigError(f"there is no shard {wrong[0]}: the memory has {count}, counted from 0")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"name each shard to export once, got {chosen}")
    return chosen


def delta_of(
    memory: SideMemory, shards: Sequence[int], method: str | None, density: float
) -> Tensor:
    """The one delta that is to be baked.

    Args:
        memory: where the shards are.
        shards: of ``chosen_shards``.
        method: how several become one, see ``wise_ext.memory.merge``.
        density: of the merge.

    Returns:
        fp32 ``[d_out, d_in]``.

    Raises:
        ConfigError: there are several and no method, or an unknown one.
    """
    deltas = [memory.shards[shard].dense() for shard in shards]
    if method is not None:
        return merge(deltas, method, density=density)
    if len(deltas) > 1:
        raise ConfigError(
            f"there are {len(deltas)} shards and one weight: choose one with --shard, or merge "
            "them with --merge (ties, linear, …)"
        )
    return deltas[0]


def is_transposed(projection: nn.Module) -> bool:
    """Whether a projection keeps its weight as ``[d_in, d_out]``, as GPT-2's do.

    Raises:
        ModelError: it is neither ``nn.Linear`` nor ``Conv1D`` with a floating weight.
    """
    weight: Any = getattr(projection, "weight", None)
    plain = isinstance(projection, nn.Linear | Conv1D) and isinstance(weight, Tensor)
    if not plain or weight.dtype not in _FLOATS:
        raise ModelError(
            f"the edited projection is a {type(projection).__name__}, which is no plain weight in "
            "fp32, bf16 or fp16: export from the model as it was before it was quantised"
        )
    return isinstance(projection, Conv1D)


@torch.no_grad()
def bake(model: nn.Module, layer: str, delta: Tensor) -> float:
    """Add a delta to a projection's weight, in place.

    Args:
        model: not patched.
        layer: path of the projection.
        delta: fp32 ``[d_out, d_in]``.

    Returns:
        By how much rounding to the weight's dtype puts the delta off: the norm of the difference
        over that of the delta.

    Raises:
        ModelError: see ``is_transposed``.
    """
    projection = get_module(model, layer)
    transposed = is_transposed(projection)
    weight: Tensor = projection.weight  # type: ignore[assignment]
    change = (delta.T if transposed else delta).to(weight.device)
    before = weight.to(torch.float32, copy=True)
    weight.copy_((before + change).to(weight.dtype))
    size = float(change.norm())
    return float((weight.float() - before - change).norm()) / size if size else 0.0
