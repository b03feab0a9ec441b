"""What a bank looks like as stored: masks by bits or columns, values as they are or rounded.

Rounded values are whole numbers from -127 to 127, times a power of two for each row, the least that
fits. They are exact in bf16 and fp16 (within their range), and rounding them again changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wise_ext.memory.bank import PackedBank
from wise_ext.memory.masks import bits_to_columns, columns_to_bits, mask_words
from wise_ext.memory.shards import Shard, check_packed


def stored(shards: Sequence[Shard], bank: PackedBank, rounded: bool) -> dict[str, Tensor]:
    """The tensors that a bank is stored as.

    Args:
        shards: sparse ones are told by their columns (uint16), one after the other, the others by
            their mask's bits.
        bank: of these shards, on the CPU.
        rounded: whether values become bytes, and ``scales`` says what a row's are worth.
    """
    sparse = torch.tensor([shard.sparse for shard in shards], dtype=torch.bool)
    columns = [bits_to_columns(shard.mask_bits, shard.d_in) for shard in shards if shard.sparse]
    thresholds = torch.tensor([shard.threshold for shard in shards], dtype=torch.float64)
    form = {
        "bank.mask_bits": bank.mask_bits[~sparse] if columns else bank.mask_bits,
        "bank.columns": torch.cat([torch.zeros(0, dtype=torch.uint16), *columns]),
        "bank.sparse": sparse,
        "bank.values": bank.values,
        "bank.row_ptr": bank.row_ptr,
        "bank.thresholds": thresholds,
    }
    if rounded:
        form["bank.values"], form["bank.scales"] = to_bytes(bank.values, bank.row_ptr)
    return form


def restored(
    form: Mapping[str, Tensor], count: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks, values and offsets of a bank of ``count`` shards: the stored tensors where these are
    what they are.

    Raises:
        ValueError: the parts do not fit (one that is missing is a ``KeyError``).
    """
    d_out, d_in = shape
    row_ptr, thresholds = form["bank.row_ptr"], form["bank.thresholds"]
    if thresholds.dtype != torch.float64 or thresholds.shape != (count,):
        raise ValueError(f"bank: thresholds must be fp64 [{count}]")
    mask_bits, values = _masks_of(form, row_ptr, count, d_out, d_in), form["bank.values"]
    if values.dtype == torch.int8:
        check_packed(mask_bits, torch.empty(values.shape), row_ptr, d_in)  # what it would be
        values = from_bytes(values, form["bank.scales"], row_ptr)
    else:
        check_packed(mask_bits, values, row_ptr, d_in)
    return mask_bits, values, row_ptr


def to_bytes(values: Tensor, row_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Round values ``[nnz]`` to int8 and a scale for each row, fp32 ``[rows]``."""
    counts = row_ptr.diff()
    row = torch.arange(len(counts)).repeat_interleave(counts)
    wide = values.float()
    largest = torch.zeros(len(counts)).scatter_reduce_(0, row, wide.abs(), "amax")
    # The least power of two that is not below: exactly, so that rounding again finds the same one.
    part, exponent = torch.frexp((largest / 127).clamp(min=torch.finfo(torch.float32).tiny))
    scales = torch.ldexp(torch.ones(len(counts)), exponent - (part == 0.5).int())
    return (wide / scales[row]).round().clamp(-127, 127).to(torch.int8), scales


def from_bytes(values: Tensor, scales: Tensor, row_ptr: Tensor) -> Tensor:
    """The values, fp32 ``[nnz]``, that bytes and scales stand for.

    Raises:
        ValueError: the scales are not one a row, or not positive numbers.
    """
    counts = row_ptr.diff()
    if scales.dtype != torch.float32 or scales.shape != counts.shape:
        raise ValueError(f"bank: scales must be fp32 [{len(counts)}]")
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError("bank: a scale is no positive number")
    return values.float() * scales.repeat_interleave(counts)


def _masks_of(
    form: Mapping[str, Tensor], row_ptr: Tensor, count: int, d_out: int, d_in: int
) -> Tensor:
    """The masks of all shards, int32 ``[count, d_out, W]``: as stored where that is what they are.

    Raises:
        ValueError: the parts do not fit.
    """
    stored, columns, sparse = (form[f"bank.{n}"] for n in ("mask_bits", "columns", "sparse"))
    if sparse.dtype != torch.bool or sparse.shape != (count,):
        raise ValueError(f"bank: sparse must be bool [{count}]")
    few = sparse.nonzero().flatten().tolist()
    if stored.dim() != 3 or stored.shape[:2] != (count - len(few), d_out):
        raise ValueError(f"bank: {list(stored.shape)} mask for {count - len(few)} shards")
    if columns.dtype != torch.uint16 or columns.dim() != 1:
        raise ValueError("bank: columns must be uint16 [nnz]")
    if row_ptr.dtype != torch.int64 or row_ptr.shape != (count * d_out + 1,):
        raise ValueError(f"bank: row_ptr must be int64 [{count * d_out + 1}]")
    pointers = [row_ptr[place * d_out : (place + 1) * d_out + 1] for place in few]
    sizes = [int(each[-1] - each[0]) for each in pointers]
    if min(sizes, default=0) < 0 or sum(sizes) != len(columns):
        raise ValueError(f"bank: {len(columns)} columns for {sum(sizes)} entries")
    if not few:
        return stored
    masks = torch.empty(count, d_out, mask_words(d_in), dtype=torch.int32)
    masks[~sparse] = stored
    for place, rows, own in zip(few, pointers, columns.split(sizes), strict=True):
        masks[place] = columns_to_bits(own, rows - rows[0], d_in)
    return masks
