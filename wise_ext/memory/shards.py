"""One knowledge shard: a masked delta of the edited projection, packed, and what it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.memory.masks import MOST_COLUMNS, mask_words, row_counts, tail_is_zero

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Shard:
    """A sealed shard ``D_i``: non-zero only where its mask ``M_i`` is set.

    Attributes:
        mask_bits: int32 ``[d_out, ceil(d_in / 32)]``.
        values: fp32, bf16 or fp16 ``[nnz]``: the masked entries, row by row, columns ascending.
        row_ptr: int64 ``[d_out + 1]``: where each row's values begin; starts at 0.
        d_in: columns of the projection (the last mask word may be only partly used).
        threshold: indicator above which a prompt belongs to this shard (``act_ratio`` included);
            ``-inf`` lets every prompt in.
        edit_ids: the edits written here, in the order of writing.
        seed: seed of the random mask; -1 where the mask is not a random one (a merged shard).

    Raises:
        ValueError: the tensors do not fit each other.
    """

    mask_bits: Tensor
    values: Tensor
    row_ptr: Tensor
    d_in: int
    threshold: float = -math.inf
    edit_ids: list[str] = field(default_factory=list)
    seed: int = -1

    def __post_init__(self) -> None:
        check_packed(self.mask_bits, self.values, self.row_ptr, self.d_in)
        if math.isnan(self.threshold):
            raise ValueError("the threshold of a shard is not a number")

    @classmethod
    def from_delta(
        cls,
        delta: Tensor,
        mask_bits: Tensor,
        threshold: float = -math.inf,
        edit_ids: list[str] | None = None,
        seed: int = -1,
    ) -> Shard:
        """Seal a trained delta: keep its masked entries, on the CPU, in the delta's dtype.

        Args:
            delta: fp32, bf16 or fp16 ``[d_out, d_in]``; entries outside the mask are dropped.
            mask_bits: int32 ``[d_out, ceil(d_in / 32)]``.
            threshold: see the class.
            edit_ids: see the class; copied.
            seed: see the class.
        """
        delta, mask_bits = delta.detach().cpu(), mask_bits.detach().cpu()
        values, row_ptr = ops.pack(delta, mask_bits)
        ids = list(edit_ids or [])
        return cls(mask_bits, values, row_ptr, int(delta.shape[1]), threshold, ids, seed)

    @property
    def shape(self) -> tuple[int, int]:
        """The projection's ``(d_out, d_in)``."""
        return int(self.mask_bits.shape[0]), self.d_in

    @property
    def nnz(self) -> int:
        """How many entries the mask opens."""
        return int(self.values.shape[0])

    @property
    def density(self) -> float:
        """Share of the projection's entries that the mask opens."""
        return self.nnz / math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether 16-bit column numbers say where its entries are in fewer bytes than bits do."""
        return self.d_in <= MOST_COLUMNS and 2 * self.nnz < self.mask_bits.nbytes

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the packed size in bytes with values of ``dtype`` (default: as they are)."""
        width = (dtype or self.values.dtype).itemsize
        return self.mask_bits.nbytes + self.row_ptr.nbytes + self.nnz * width

    def dense(self) -> Tensor:
        """Return the delta, fp32 ``[d_out, d_in]``."""
        return ops.unpack(self.mask_bits, self.values.float(), self.row_ptr, self.d_in)


def check_packed(mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> None:
    """Check that mask, values and row pointers describe one packed ``[..., d_out, d_in]`` tensor.

    Args:
        mask_bits: int32 ``[d_out, W]`` (a shard) or ``[k, d_out, W]`` (a bank).
        values: fp32, bf16 or fp16 ``[nnz]``.
        row_ptr: int64 ``[rows + 1]`` with ``rows = d_out`` or ``k * d_out``.
        d_in: columns of the projection.

    Raises:
        ValueError: naming the first thing that does not fit.
    """
    if mask_bits.dtype != torch.int32 or mask_bits.dim() < 2:
        raise ValueError(f"mask_bits must be int32 [..., d_out, W], got {_kind(mask_bits)}")
    if d_in < 1 or mask_bits.shape[-1] != mask_words(d_in):
        raise ValueError(f"mask_bits {_kind(mask_bits)} does not fit {d_in} columns")
    if values.dtype not in VALUE_DTYPES or values.dim() != 1:
        raise ValueError(f"values must be fp32, bf16 or fp16 [nnz], got {_kind(values)}")
    counts = row_counts(mask_bits).flatten()
    if row_ptr.dtype != torch.int64 or row_ptr.shape != (counts.numel() + 1,):
        raise ValueError(f"row_ptr must be int64 [{counts.numel() + 1}], got {_kind(row_ptr)}")
    if not tail_is_zero(mask_bits, d_in):
        raise ValueError(f"mask_bits has bits set behind the last of {d_in} columns")
    if int(row_ptr[0]) != 0 or not torch.equal(row_ptr.diff(), counts):
        raise ValueError("row_ptr does not agree with the number of mask bits in each row")
    if int(row_ptr[-1]) != values.shape[0]:
        raise ValueError(f"the mask opens {int(row_ptr[-1])} entries, got {values.shape[0]} values")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
