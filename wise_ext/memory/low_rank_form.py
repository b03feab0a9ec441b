"""What low-rank shards look like as stored: their factors, one shard after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wise_ext.memory.low_rank import LowRankShard


def stored(shards: Sequence[LowRankShard]) -> dict[str, Tensor]:
    """The tensors that low-rank shards, at least one, are stored as."""
    return {
        "low_rank.left": torch.cat([shard.left for shard in shards]),
        "low_rank.right": torch.cat([shard.right for shard in shards]),
    }


def restored(
    form: Mapping[str, Tensor], entries: Sequence[Mapping[str, Any]], shape: tuple[int, int]
) -> list[LowRankShard]:
    """The shards that these entries (``rank``, ``edit_ids``) describe, in order.

    Raises:
        ValueError: the factors do not fit them (one that is missing is a ``KeyError``).
    """
    if not entries:
        return []
    left, right = form["low_rank.left"], form["low_rank.right"]
    ranks = [int(entry["rank"]) for entry in entries]
    if min(ranks) < 0 or any(f.shape[:1] != (sum(ranks),) for f in (left, right)):
        raise ValueError(f"low-rank shards: {sum(ranks)} directions described, others stored")
    shards = [
        LowRankShard(a, b, [str(name) for name in entry["edit_ids"]])
        for a, b, entry in zip(left.split(ranks), right.split(ranks), entries, strict=True)
    ]
    if any(shard.shape != shape for shard in shards):
        raise ValueError(f"low-rank shards: of shape {shards[0].shape}, the projection is {shape}")
    return shards
