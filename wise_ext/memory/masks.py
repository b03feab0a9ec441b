"""Elementwise masks of knowledge shards, one bit an entry.

A mask over a ``[d_out, d_in]`` projection is int32 ``[d_out, W]`` with ``W = ceil(d_in / 32)``.
Bit ``j`` (least significant first) of word ``w`` of a row is column ``32 * w + j``; the bits behind
the last column are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory.randomness import BitStream

#: columns that 16 bits can tell apart
MOST_COLUMNS = 1 << 16
_COLUMN_BITS = 24
_CHUNK_ENTRIES = 1 << 20


def mask_words(d_in: int) -> int:
    """Return how many 32-bit words hold the mask of one row of ``d_in`` columns."""
    return (d_in + 31) // 32


def bits_per_row(d_in: int, ratio: float) -> int:
    """Return how many entries of a row a mask of this ratio opens: the nearest number, at least 1.

    Raises:
        ConfigError: the ratio is outside (0, 1].
    """
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(f"mask ratio is {ratio}: give a number above 0 and up to 1")
    return min(d_in, max(1, int(ratio * d_in + 0.5)))


def random_mask_bits(d_out: int, d_in: int, ratio: float, seed: int) -> Tensor:
    """Draw a shard's mask: in every row the same number of entries, chosen uniformly.

    Equal rows cost equal time in every kernel, and make the density exact. Masks of two seeds are
    independent: they share about ``ratio ** 2`` of all entries.

    Args:
        d_out: rows of the projection (model width).
        d_in: columns of the projection (FFN width).
        ratio: share of entries that the shard may change [rho].
        seed: a whole number >= 0; the same seed gives the same mask everywhere, for ever.

    Returns:
        int32 ``[d_out, ceil(d_in / 32)]`` on the CPU.

    Raises:
        ConfigError: the ratio is outside (0, 1].
        ValueError: a size is below 1, ``d_in`` is above 2**24, or the seed is negative.
    """
    if d_out < 1 or not 1 <= d_in <= 1 << _COLUMN_BITS:
        raise ValueError(f"a mask needs 1 <= d_out and 1 <= d_in <= 2**24, got {d_out} x {d_in}")
    count = bits_per_row(d_in, ratio)
    stream = BitStream(seed)
    columns = np.arange(d_in, dtype=np.uint64)
    step = max(1, _CHUNK_ENTRIES // d_in)
    parts = []
    for start in range(0, d_out, step):
        rows = min(step, d_out - start)
        # The column in the low bits makes a row's keys distinct, so exactly `count` are taken.
        keys = stream.words(rows * d_in).reshape(rows, d_in)
        keys = (keys >> np.uint64(_COLUMN_BITS) << np.uint64(_COLUMN_BITS)) | columns
        limit = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
        parts.append(bool_to_bits(torch.from_numpy(keys <= limit)))
    return torch.cat(parts)


def bool_to_bits(mask: Tensor) -> Tensor:
    """Pack a mask, bool ``[..., d_in]``, into int32 ``[..., ceil(d_in / 32)]`` on its device.

    Raises:
        ValueError: the mask is not bool, or has no dimension.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise ValueError(f"bool_to_bits wants a bool mask [..., d_in], got {mask.dtype}")
    d_in = mask.shape[-1]
    words = mask_words(d_in)
    padded = torch.nn.functional.pad(mask, (0, 32 * words - d_in)).to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (padded.reshape(*mask.shape[:-1], 4 * words, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def bits_to_bool(mask_bits: Tensor, d_in: int) -> Tensor:
    """Unpack int32 ``[..., W]`` into bool ``[..., d_in]`` on the same device.

    Raises:
        ValueError: the dtype is not int32, or ``W`` is not ``ceil(d_in / 32)``.
    """
    if mask_bits.dtype != torch.int32 or mask_bits.dim() == 0:
        raise ValueError(f"mask_bits must be int32 [..., W], got {mask_bits.dtype}")
    if mask_bits.shape[-1] != mask_words(d_in):
        raise ValueError(
            f"mask_bits has {mask_bits.shape[-1]} words a row: {d_in} columns need "
            f"{mask_words(d_in)}"
        )
    octets = mask_bits.contiguous().view(torch.uint8).unsqueeze(-1)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask_bits.device)
    return ((octets >> shifts) & 1).flatten(-2)[..., :d_in].bool()


def bits_to_columns(mask_bits: Tensor, d_in: int) -> Tensor:
    """Name the open columns of every row, ascending: int32 ``[..., W]`` to uint16 ``[nnz]``.

    Raises:
        ValueError: as ``bits_to_bool``, or ``d_in`` is above 2**16.
    """
    if d_in > MOST_COLUMNS:
        raise ValueError(f"{d_in} columns have no 16-bit numbers")
    return bits_to_bool(mask_bits, d_in).flatten(0, -2).nonzero()[:, 1].to(torch.uint16)


def columns_to_bits(columns: Tensor, row_ptr: Tensor, d_in: int) -> Tensor:
    """Make a mask of the open columns of its rows.

    Args:
        columns: uint16 ``[nnz]``, ascending within each row.
        row_ptr: int64 ``[rows + 1]``: where the columns of each row begin; starts at 0.
        d_in: columns of the projection.

    Returns:
        int32 ``[rows, ceil(d_in / 32)]``.

    Raises:
        ValueError: the two do not fit each other, or a column is none of the projection's.
    """
    counts = row_ptr.diff()
    if int(row_ptr[0]) != 0 or bool((counts < 0).any()) or int(row_ptr[-1]) != len(columns):
        raise ValueError(f"row_ptr does not share out {len(columns)} columns")
    wide = columns.to(torch.int64)
    if len(wide) and int(wide.max()) >= d_in:
        raise ValueError(f"column {int(wide.max())} is none of {d_in}")
    row = torch.arange(len(counts)).repeat_interleave(counts)
    if not bool(((row * d_in + wide).diff() > 0).all()):
        raise ValueError("the columns of a row do not ascend")
    mask = torch.zeros(len(counts), d_in, dtype=torch.bool)
    mask[row, wide] = True
    return bool_to_bits(mask)


def row_counts(mask_bits: Tensor) -> Tensor:
    """Return how many bits are set in each row: int32 ``[..., W]`` to int64 ``[...]``."""
    octets = mask_bits.contiguous().view(torch.uint8)
    # Counting bits in place, two, four and eight at a time.
    octets = octets - ((octets >> 1) & 0x55)
    octets = (octets & 0x33) + ((octets >> 2) & 0x33)
    octets = (octets + (octets >> 4)) & 0x0F
    return octets.sum(-1, dtype=torch.int64)


def popcount(mask_bits: Tensor) -> int:
    """Return the number of set bits of a whole mask, int32 of any shape."""
    return int(row_counts(mask_bits).sum())


def tail_is_zero(mask_bits: Tensor, d_in: int) -> bool:
    """Say whether the bits behind column ``d_in - 1`` are zero in every row."""
    used = d_in % 32
    if used == 0 or mask_bits.numel() == 0:
        return True
    return not bool(((mask_bits[..., -1] >> used) & ((1 << (32 - used)) - 1)).any())
