"""The optimizer step on a shard's masked entries, next to packed states: SGD or Adam.

A program walks the packed rows it has from left to right. Where an entry's state lies is the row's
offset, plus the set bits of the mask before it: those of earlier blocks are carried along, those of
earlier words in the block are summed up, and those of lower bits in the word are counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.packed_tile import popcount

OP = "masked_update"


@triton.jit
def load_rows(mask_bits, row, word, valid_rows, width, d_in):
    """Words [rows, words] of the mask, without the bits past d_in."""
    at = mask_bits + row.to(tl.int64)[:, None] * width + word[None, :]
    words = tl.load(at, mask=valid_rows[:, None] & (word < width)[None, :], other=0)
    left = tl.minimum(tl.maximum(d_in - word * 32, 0), 32)
    tail = tl.where(left < 32, (1 << (left % 32)) - 1, -1)
    return words & tail[None, :]


@triton.jit
def clamped(values, limit):
    """values within [-limit, limit]; no comparison holds for NaN, so it stays."""
    values = tl.where(values > limit, limit, values)
    return tl.where(values < -limit, -limit, values)


@triton.jit
def masked_update_kernel(
    delta,
    grad,
    mask_bits,
    row_ptr,
    m,
    v,
    rows,
    d_in,
    width,
    states,
    grad_row,
    grad_column,
    lr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    correction1,
    correction2,
    clamp,
    ADAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """delta [rows, d_in] moves under its mask; grad is never read outside it."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = tl.arange(0, BLOCK_WORDS)
    bit = tl.arange(0, 32)
    here = row < rows
    begin = tl.load(row_ptr + row, mask=here, other=0)
    end = tl.load(row_ptr + row + 1, mask=here, other=0)
    bits = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
    for first in range(0, width, BLOCK_WORDS):
        words = load_rows(mask_bits, row, first + word, here, width, d_in)
        bits += tl.sum(popcount(words), axis=1)
    # Offsets that disagree with the mask can only be reported in the results, so they turn NaN;
    # what lies at those offsets is left alone.
    good = (begin >= 0) & (end - begin == bits)
    if ADAM:
        good = good & (begin <= states - bits)
    packed = tl.where(good, begin, 0)
    for first in range(0, width, BLOCK_WORDS):
        words = load_rows(mask_bits, row, first + word, here, width, d_in)
        counts = popcount(words)
        before = packed[:, None] + (tl.cumsum(counts, axis=1) - counts)
        packed += tl.sum(counts, axis=1)
        chosen = ((words[:, :, None] >> bit[None, None, :]) & 1) != 0
        usable = chosen & good[:, None, None]
        column = ((first + word) * 32)[None, :, None] + bit[None, None, :]
        wide_row = row.to(tl.int64)[:, None, None]
        delta_at = delta + wide_row * d_in + column
        grad_at = grad + wide_row * grad_row + column.to(tl.int64) * grad_column
        current = tl.load(delta_at, mask=usable, other=0.0)
        gradient = tl.load(grad_at, mask=usable, other=0.0)
        if ADAM:
            lower = words[:, :, None] & ((1 << bit) - 1)[None, None, :]
            state = before[:, :, None] + popcount(lower)
            mean = beta1 * tl.load(m + state, mask=usable, other=0.0) + rest1 * gradient
            square = tl.load(v + state, mask=usable, other=0.0)
            square = beta2 * square + rest2 * (gradient * gradient)
            tl.store(m + state, mean, mask=usable)
            tl.store(v + state, square, mask=usable)
            scale = tl.sqrt_rn(tl.div_rn(square, correction2)) + eps
            moved = current - lr * tl.div_rn(tl.div_rn(mean, correction1), scale)
        else:
            moved = current - lr * gradient
        moved = tl.where(good[:, None, None], clamped(moved, clamp), float("nan"))
        tl.store(delta_at, moved, mask=chosen)


def masked_update(
    delta: Tensor,
    grad: Tensor,
    mask_bits: Tensor,
    row_ptr: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    clamp: float,
) -> None:
    """Move the masked entries of delta [d_out, d_in] in place, by Adam with m and v, else by SGD.

    delta, m and v are contiguous float32, m and v packed [nnz]; grad is float32 with any strides;
    mask_bits int32 [d_out, W] is contiguous. A row whose int64 row_ptr disagrees with its mask gets
    NaN under it.
    """
    if delta.numel() == 0:
        return
    adam = m is not None and v is not None
    states = min(m.numel(), v.numel()) if m is not None and v is not None else 0
    config = configs.pick(OP, "fp32", delta.shape[0], delta.device)
    masked_update_kernel[(triton.cdiv(delta.shape[0], config.blocks["BLOCK_ROWS"]),)](
        delta,
        grad,
        mask_bits,
        row_ptr,
        # Never read by SGD.
        m if adam else delta,
        v if adam else delta,
        *delta.shape,
        mask_bits.shape[1],
        states,
        *grad.stride(),
        lr,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        1.0 - beta1**step,
        1.0 - beta2**step,
        clamp,
        ADAM=adam,
        **config.launch,
    )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Adam and SGD with every config, as aligned contiguous tensors would have them compiled."""
    signature = dict.fromkeys(("delta", "grad", "m", "v"), "*fp32:16")
    signature |= {"mask_bits": "*i32:16", "row_ptr": "*i64:16", "states": "i32", "rows": "i32:16"}
    signature |= {"d_in": "i32:16", "width": "i32:16", "grad_row": "i32:16"}
    numbers = "lr beta1 rest1 beta2 rest2 eps correction1 correction2 clamp"
    signature |= dict.fromkeys(numbers.split(), "fp32")
    for name, adam in (("adam", True), ("sgd", False)):
        constants = {"grad_column": 1, "ADAM": adam}
        for config in configs.every(OP, "fp32", arch):
            yield configs.Variant(
                f"{OP}_{name}", masked_update_kernel, signature, constants, config, False
            )
