"""A shard as the product of two thin matrices, and the bank of such shards.

What is solved for in closed form from a few tokens (AnyEdit) has no more rank than there are
tokens: its factors are smaller than any mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.memory.growing import Growing
from wise_ext.memory.shards import VALUE_DTYPES


@dataclass(eq=False)
class LowRankShard:
    """A shard ``D_i = left^T right``, for prompts that the router sends there by their key.

    Attributes:
        left: fp32, bf16 or fp16 ``[r, d_out]``; r may be 0.
        right: ``[r, d_in]`` in the same dtype.
        edit_ids: the edits written here.
        threshold, seed: as a packed shard has them; every prompt is let in, and no mask is drawn.

    Raises:
        ValueError: the factors do not fit each other.
    """

    left: Tensor
    right: Tensor
    edit_ids: list[str] = field(default_factory=list)
    threshold: float = -math.inf
    seed: int = -1

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0]:
            raise ValueError(f"factors must be [r, d_out] and [r, d_in], got {self._kinds()}")
        if left.dtype != right.dtype or left.dtype not in VALUE_DTYPES:
            raise ValueError(f"factors must both be fp32, bf16 or fp16, got {self._kinds()}")

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> LowRankShard:
        """A shard of rank 0: it changes nothing."""
        return cls(torch.zeros(0, shape[0], dtype=dtype), torch.zeros(0, shape[1], dtype=dtype))

    @classmethod
    def of(cls, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> LowRankShard:
        """A product's directions in order of size: its singular vectors.

        ``right`` becomes orthonormal, so rounding the factors puts what they do off by no more than
        rounding it would.

        Args:
            left, right: of any floating dtype, ``[n, d_out]`` and ``[n, d_in]``.
            dtype: of the factors.
        """
        a, b = torch.linalg.qr(left.double().T), torch.linalg.qr(right.double().T)
        u, size, v = torch.linalg.svd(a.R @ b.R.T, full_matrices=False)
        outer, inner = ((a.Q @ u) * size).T, (b.Q @ v.T).T
        return cls(outer.contiguous().to(dtype), inner.contiguous().to(dtype))

    def first(self, rank: int, dtype: torch.dtype) -> LowRankShard:
        """Its first directions, rounded; it holds no edits."""
        return LowRankShard(self.left[:rank].to(dtype), self.right[:rank].to(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """The projection's ``(d_out, d_in)``."""
        return int(self.left.shape[1]), int(self.right.shape[1])

    @property
    def rank(self) -> int:
        """How many directions the shard has [r]."""
        return int(self.left.shape[0])

    @property
    def values(self) -> Tensor:
        """All numbers it consists of."""
        return torch.cat([self.left.flatten(), self.right.flatten()])

    @property
    def nnz(self) -> int:
        """How many numbers it consists of."""
        return self.left.numel() + self.right.numel()

    @property
    def density(self) -> float:
        """Those numbers as a share of the projection's entries."""
        return self.nnz / math.prod(self.shape)

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the size in bytes with factors of ``dtype`` (default: as they are)."""
        return self.nnz * (dtype or self.left.dtype).itemsize

    def dense(self) -> Tensor:
        """Return the delta, fp32 ``[d_out, d_in]``."""
        return self.left.float().T @ self.right.float()

    def _kinds(self) -> str:
        return " and ".join(f"{t.dtype} {list(t.shape)}" for t in (self.left, self.right))


class LowRankBank(Growing):
    """``k`` low-rank shards of one projection, one after the other.

    Attributes:
        left: fp32, bf16 or fp16 ``[R, d_out]``, R the sum of their ranks.
        right: ``[R, d_in]``.
        rank_ptr: int64 ``[k + 1]``: where each shard's directions begin.
    """

    left: Tensor
    right: Tensor
    rank_ptr: Tensor

    def __init__(self, left: Tensor, right: Tensor, rank_ptr: Tensor) -> None:
        super().__init__()
        self.hold(left=left, right=right, rank_ptr=rank_ptr)

    @classmethod
    def from_shards(
        cls,
        shards: Sequence[LowRankShard],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Concatenate shards, each of the given shape, in this dtype."""
        ends = torch.tensor([shard.rank for shard in shards], dtype=torch.int64).cumsum(0)
        some = [LowRankShard.empty(shape), *shards]
        left, right = (
            torch.cat([getattr(shard, name).to(device, dtype) for shard in some])
            for name in ("left", "right")
        )
        return cls(left, right, torch.cat([ends.new_zeros(1), ends]).to(device))

    @property
    def num_shards(self) -> int:
        """How many shards the bank holds [k]."""
        return self.rank_ptr.shape[0] - 1

    @property
    def nbytes(self) -> int:
        """Size of the bank in bytes."""
        return self.left.nbytes + self.right.nbytes + self.rank_ptr.nbytes

    def part(self, start: int, stop: int) -> LowRankBank:
        """Return the bank of the columns ``start`` to ``stop`` of each shard."""
        return LowRankBank(self.left, self.right[:, start:stop].contiguous(), self.rank_ptr)

    def add_side_(self, y: Tensor, x: Tensor, route: Tensor) -> None:
        """Add the routed shards in place; arguments as for ``PackedBank.add_side_``."""
        ops.add_low_rank_(y, x, self.left, self.right, self.rank_ptr, route)
