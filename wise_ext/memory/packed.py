"""The tensors of a bank with room behind them: a shard is added without copying those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext.memory.masks import mask_words
from wise_ext.memory.shards import Shard

# Room for so much more than there is, when there is none: pages nobody writes to take no memory.
_ROOM = 1.0


class Packed(NamedTuple):
    """Shards, and tensors that begin with what their bank consists of."""

    shards: tuple[Shard, ...]
    mask_bits: Tensor  # [k + room, d_out, W]
    values: Tensor  # [nnz + room]
    row_ptr: Tensor  # [(k + room) d_out + 1]

    @classmethod
    def of(cls, shape: tuple[int, int], dtype: torch.dtype) -> Packed:
        """Without a shard yet."""
        masks = torch.zeros(0, shape[0], mask_words(shape[1]), dtype=torch.int32)
        return cls((), masks, torch.zeros(0, dtype=dtype), torch.zeros(1, dtype=torch.int64))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Masks, values and offsets of the bank."""
        count = len(self.shards)
        rows = count * self.mask_bits.shape[1]
        end = int(self.row_ptr[rows])
        return self.mask_bits[:count], self.values[:end], self.row_ptr[: rows + 1]

    def begins(self, shards: Sequence[Shard]) -> bool:
        """Whether these are the very same shards (whose tensors nobody changes), or more."""
        return len(self.shards) <= len(shards) and all(
            one is other for one, other in zip(self.shards, shards, strict=False)
        )

    def grown(self, shards: Sequence[Shard]) -> Packed:
        """With all of these shards, which ``begins`` with its own. It takes the room of this one,
        which is not to grow again; banks of this one stay what they are."""
        added = shards[len(self.shards) :]
        if not added:
            return self
        d_out, masks, values, row_ptr = self.mask_bits.shape[1], *self.tensors()
        begin, place = len(values), len(self.shards)
        need = begin + sum(shard.nnz for shard in added)
        room = self[1:]
        if len(self.mask_bits) < len(shards) or len(self.values) < need:
            count = int(place * (1 + _ROOM)) if place else 0
            count, size = max(len(shards), count), max(need, int(begin * (1 + _ROOM)))
            room = (
                masks.new_empty(count, *masks.shape[1:]),
                values.new_empty(size),
                row_ptr.new_empty(count * d_out + 1),
            )
            for new, old in zip(room, (masks, values, row_ptr), strict=True):
                new[: len(old)] = old
        for shard in added:
            end = begin + shard.nnz
            room[0][place] = shard.mask_bits
            room[1][begin:end] = shard.values
            room[2][place * d_out + 1 : (place + 1) * d_out + 1] = shard.row_ptr[1:] + begin
            begin, place = end, place + 1
        return Packed(tuple(shards), *room)
