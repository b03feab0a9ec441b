"""The packed bank: all shards of one edited projection, in the form the kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.memory.growing import Growing
from wise_ext.memory.masks import bits_to_bool, bool_to_bits, mask_words, row_counts
from wise_ext.memory.packed import Packed
from wise_ext.memory.shards import VALUE_DTYPES, Shard, check_packed


class PackedBank(Growing):
    """``k`` shards of one projection; ``k == 0`` is an empty bank.

    The bank moves with its model, and a patched model's ``state_dict`` stays the base model's.

    Attributes:
        mask_bits: int32 ``[k, d_out, ceil(d_in / 32)]``.
        values: fp32, bf16 or fp16 ``[nnz]``: the shards' values, one after the other.
        row_ptr: int64 ``[k * d_out + 1]``: offsets into ``values``, over the whole bank.
        shape: ``(d_out, d_in)`` of the projection.

    Raises:
        ValueError: the tensors do not fit each other.
    """

    mask_bits: Tensor
    values: Tensor
    row_ptr: Tensor
    columns = None  # all of them

    def __init__(
        self, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        if mask_bits.dim() != 3 or mask_bits.shape[1] != shape[0]:
            raise ValueError(f"mask_bits must be [k, {shape[0]}, W], got {list(mask_bits.shape)}")
        check_packed(mask_bits, values, row_ptr, shape[1])
        self.shape = shape
        self.hold(mask_bits=mask_bits, values=values, row_ptr=row_ptr)

    @classmethod
    def from_shards(
        cls,
        shards: Sequence[Shard],
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PackedBank:
        """Concatenate shards; the route of a shard is its place in ``shards``.

        Args:
            shards: each of the given shape.
            shape: ``(d_out, d_in)``; needed because there may be no shard.
            dtype: fp32, bf16 or fp16: what the values are rounded to.
            device: where the bank lives.

        Raises:
            ValueError: a shard has another shape, or the dtype is none of the three.
        """
        if dtype not in VALUE_DTYPES:
            raise ValueError(f"a bank holds fp32, bf16 or fp16 values, not {dtype}")
        for index, shard in enumerate(shards):
            if shard.shape != tuple(shape):
                raise ValueError(f"shard {index} is {shard.shape}, the projection is {shape}")
        tensors = Packed.of(shape, dtype).grown(shards).tensors()
        return cls(*tensors, (shape[0], shape[1])).to(device)

    @property
    def num_shards(self) -> int:
        """How many shards the bank holds [k]."""
        return self.mask_bits.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the bank in bytes."""
        return self.mask_bits.nbytes + self.values.nbytes + self.row_ptr.nbytes

    def extra_repr(self) -> str:
        """Name shape, shards and dtype when the model is printed."""
        return f"shape={self.shape}, shards={self.num_shards}, values={self.values.dtype}"

    def add_side_(self, y: Tensor, x: Tensor, route: Tensor) -> None:
        """Add the routed side memory in place: ``y[n] += D_route[n] x[n]``.

        Args:
            y: ``[N, d_out]``, changed in place.
            x: ``[N, d_in]``, the activation entering the projection [A(x)].
            route: int32 ``[N]``: a shard, or -1 for main memory (the row stays as it is).
        """
        ops.add_side_(y, x, self.mask_bits, self.values, self.row_ptr, route)

    def side_norm(self, x: Tensor, rows: Tensor, shards: Tensor) -> Tensor:
        """Return the routing indicator ``||D_shard x_row||_2`` (Eq. 3) of given pairs.

        Args:
            x: ``[N, d_in]``.
            rows: int32 ``[P]``, rows of ``x``.
            shards: int32 ``[P]``, shards of the bank.

        Returns:
            fp32 ``[P]``.
        """
        return ops.side_norm(x, self.mask_bits, self.values, self.row_ptr, rows, shards)

    def part(self, start: int, stop: int) -> PackedBank:
        """Return the bank of the columns ``start`` to ``stop`` of each shard, on its device."""
        d_out, d_in = self.shape
        masks, values = [], [self.values[:0]]
        for shard, bits in enumerate(self.mask_bits):
            is_open = bits_to_bool(bits, d_in)
            masks.append(bool_to_bits(is_open[:, start:stop]))
            inside = torch.zeros_like(is_open)
            inside[:, start:stop] = True
            begin, end = self.row_ptr[shard * d_out], self.row_ptr[(shard + 1) * d_out]
            values.append(self.values[int(begin) : int(end)][inside[is_open]])
        words = mask_words(stop - start)
        mask_bits = torch.stack(masks) if masks else self.mask_bits.new_zeros(0, d_out, words)
        ends = row_counts(mask_bits).flatten().cumsum(0)
        row_ptr = torch.cat([ends.new_zeros(1), ends])
        return PackedBank(mask_bits, torch.cat(values), row_ptr, (d_out, stop - start))

    def dense(self, shard: int) -> Tensor:
        """Return a shard's delta, fp32 ``[d_out, d_in]``."""
        d_out, d_in = self.shape
        pointers = self.row_ptr[shard * d_out : (shard + 1) * d_out + 1]
        values = self.values[int(pointers[0]) : int(pointers[-1])].float()
        return ops.unpack(self.mask_bits[shard], values, pointers - pointers[0], d_in)
