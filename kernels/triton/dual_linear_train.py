"""A shard in training, one launch a product: s = x delta^T with output and indicator, and back.

The deltas are float32 and the oracle is torch's float32 product, so nothing may be lost on the way
through the tensor cores, which take eleven bits of a float32 at most. What is float32 is therefore
multiplied in parts. Partial products of one block of columns are summed by the tensor cores and
added to the total in plain float32: the tensor cores' own sums truncate, which over thousands of
columns would show.

The gradient of s, which comes through y and through the indicator, is made on the fly in both
products of the backward and never written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs

FORWARD = "dual_linear_train_forward"
GRAD_X = "dual_linear_train_grad_x"
GRAD_DELTA = "dual_linear_train_grad_delta"

# The small launch after the forward's main one is the same whatever the shapes.
NORM = configs.Config({"NORM_ROWS": 32, "NORM_BLOCKS": 64}, num_warps=4, num_stages=1)


@triton.jit
def leading_bits(x, bits: tl.constexpr):
    """x cut to its sign, exponent and leading mantissa bits, 32 in all less `bits`."""
    return ((x.to(tl.int32, bitcast=True) >> bits) << bits).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, total):
    """total + a @ b for a float32 a [I, K]; b [K, J] is float32, bfloat16 or float16.

    Half precision b is exact as it is, and only a is split: into three bfloat16 parts, which hold
    all 24 bits, or for float16 (whose exponent is too short for small parts) into two of tf32.
    a stays in registers that way, and b goes from memory to the tensor cores untouched. An infinite
    a gives NaN, because its parts cannot be told apart.
    """
    if b.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="tf32x3")
    elif b.dtype == tl.bfloat16:
        high = leading_bits(a, 16)
        rest = a - high
        middle = leading_bits(rest, 16)
        low = rest - middle
        part = tl.dot(low.to(tl.bfloat16), b)
        part = tl.dot(middle.to(tl.bfloat16), b, part)
        return total + tl.dot(high.to(tl.bfloat16), b, part)
    else:
        high = leading_bits(a, 13)
        wide = b.to(tl.float32)
        part = tl.dot(a - high, wide, input_precision="tf32")
        return total + tl.dot(high, wide, part, input_precision="tf32")


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    base,
    delta,
    y,
    side,
    squares,
    rows,
    d_out,
    d_in,
    x_row,
    x_column,
    base_row,
    base_column,
    delta_row,
    delta_column,
    y_row,
    side_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One [out, rows] block of s^T: delta is the left operand, so its parts stay in registers."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    # Programs next to each other share the rows of delta, by far the larger operand.
    block = tl.program_id(0) // row_blocks
    n = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    here, there = n < rows, o < d_out
    x_at = x + n.to(tl.int64)[None, :] * x_row + i.to(tl.int64)[:, None] * x_column
    delta_at = delta + o.to(tl.int64)[:, None] * delta_row + i.to(tl.int64)[None, :] * delta_column
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
    for first in range(0, d_in, BLOCK_IN):
        inside = i < d_in - first
        a = tl.load(delta_at, mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.load(x_at, mask=inside[:, None] & here[None, :], other=0.0)
        total = product(a, b, total)
        x_at += BLOCK_IN * x_column
        delta_at += BLOCK_IN * delta_column
    valid = there[:, None] & here[None, :]
    wide_n = n.to(tl.int64)[None, :]
    base_at = base + wide_n * base_row + o.to(tl.int64)[:, None] * base_column
    summed = tl.load(base_at, mask=valid, other=0.0).to(tl.float32) + total
    tl.store(y + wide_n * y_row + o[:, None], summed.to(y.dtype.element_ty), mask=valid)
    tl.store(side + wide_n * side_row + o[:, None], total, mask=valid)
    # Rows past d_out hold zeros.
    tl.store(squares + block.to(tl.int64) * rows + n, tl.sum(total * total, axis=0), mask=here)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    squares, indicator, blocks, rows, NORM_ROWS: tl.constexpr, NORM_BLOCKS: tl.constexpr
):
    """indicator = root of the sum over squares [blocks, rows], always in the same order."""
    n = tl.program_id(0) * NORM_ROWS + tl.arange(0, NORM_ROWS)
    b = tl.arange(0, NORM_BLOCKS)
    total = tl.zeros((NORM_ROWS,), dtype=tl.float32)
    for first in range(0, blocks, NORM_BLOCKS):
        at = squares + (first + b).to(tl.int64)[:, None] * rows + n[None, :]
        valid = (first + b < blocks)[:, None] & (n < rows)[None, :]
        total += tl.sum(tl.load(at, mask=valid, other=0.0), axis=0)
    tl.store(indicator + n, tl.sqrt_rn(total), mask=n < rows)


@triton.jit
def side_gradient(grad_y, grad_y_at, side_at, scale, valid):
    """grad_y + scale * side: the gradient that reaches s by both ways."""
    through_y = tl.load(grad_y + grad_y_at, mask=valid, other=0.0).to(tl.float32)
    return through_y + scale * tl.load(side_at, mask=valid, other=0.0)


@triton.jit
def norm_scale(grad_indicator, grad_indicator_row, indicator, n, here):
    """grad_indicator / indicator; where the norm is 0, the zero vector is a subgradient."""
    norm = tl.load(indicator + n, mask=here, other=0.0)
    gradient = tl.load(grad_indicator + n.to(tl.int64) * grad_indicator_row, mask=here, other=0.0)
    return tl.where(norm > 0, gradient / norm, 0.0)


@triton.jit(do_not_specialize=["rows"])
def grad_delta_kernel(
    grad_y,
    grad_indicator,
    x,
    mask_bits,
    side,
    indicator,
    grad_delta,
    rows,
    d_out,
    d_in,
    grad_y_row,
    grad_y_column,
    grad_indicator_row,
    x_row,
    x_column,
    mask_row,
    side_row,
    grad_delta_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One [out, in] block of grad_side^T x under its mask; what is outside is written as 0."""
    in_blocks = tl.cdiv(d_in, BLOCK_IN)
    o = tl.program_id(0) // in_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.program_id(0) % in_blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    there, inside = o < d_out, i < d_in
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        n = first + tl.arange(0, BLOCK_ROWS)
        here, wide_n = n < rows, n.to(tl.int64)
        scale = norm_scale(grad_indicator, grad_indicator_row, indicator, n, here)
        a = side_gradient(
            grad_y,
            wide_n[None, :] * grad_y_row + o.to(tl.int64)[:, None] * grad_y_column,
            side + wide_n[None, :] * side_row + o[:, None],
            scale[None, :],
            there[:, None] & here[None, :],
        )
        x_at = x + wide_n[:, None] * x_row + i.to(tl.int64)[None, :] * x_column
        b = tl.load(x_at, mask=here[:, None] & inside[None, :], other=0.0)
        total = product(a, b, total)
    valid = there[:, None] & inside[None, :]
    wide_o = o.to(tl.int64)[:, None]
    words = tl.load(mask_bits + wide_o * mask_row + (i // 32)[None, :], mask=valid, other=0)
    chosen = ((words >> (i % 32)[None, :]) & 1) != 0
    tl.store(
        grad_delta + wide_o * grad_delta_row + i[None, :],
        tl.where(chosen, total, 0.0),
        mask=valid,
    )


@triton.jit(do_not_specialize=["rows"])
def grad_x_kernel(
    grad_y,
    grad_indicator,
    delta,
    side,
    indicator,
    grad_x,
    rows,
    d_out,
    d_in,
    grad_y_row,
    grad_y_column,
    grad_indicator_row,
    delta_row,
    delta_column,
    side_row,
    grad_x_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One [rows, in] block of grad_side delta."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    n = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.program_id(0) // row_blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    here, inside, wide_n = n < rows, i < d_in, n.to(tl.int64)
    scale = norm_scale(grad_indicator, grad_indicator_row, indicator, n, here)
    total = tl.zeros((BLOCK_ROWS, BLOCK_IN), dtype=tl.float32)
    for first in range(0, d_out, BLOCK_OUT):
        o = first + tl.arange(0, BLOCK_OUT)
        there, wide_o = o < d_out, o.to(tl.int64)
        a = side_gradient(
            grad_y,
            wide_n[:, None] * grad_y_row + wide_o[None, :] * grad_y_column,
            side + wide_n[:, None] * side_row + o[None, :],
            scale[:, None],
            here[:, None] & there[None, :],
        )
        delta_at = delta + wide_o[:, None] * delta_row + i.to(tl.int64)[None, :] * delta_column
        b = tl.load(delta_at, mask=there[:, None] & inside[None, :], other=0.0)
        total = product(a, b, total)
    valid = here[:, None] & inside[None, :]
    grad_x_at = grad_x + wide_n[:, None] * grad_x_row + i[None, :]
    tl.store(grad_x_at, total.to(grad_x.dtype.element_ty), mask=valid)


def forward(
    x: Tensor, base: Tensor, delta: Tensor, y: Tensor, side: Tensor, indicator: Tensor
) -> None:
    """Write y = base + s, side = s = x delta^T (float32) and indicator = ||s||_2 of each row.

    x [N, d_in] and base, y [N, d_out] in float32, bfloat16 or float16, delta [d_out, d_in] and
    side [N, d_out] float32, indicator float32 [N]. x, base and delta may have any strides.
    """
    (rows, d_in), d_out = x.shape, delta.shape[0]
    if rows == 0:
        return
    config = configs.pick(FORWARD, configs.dtype_key(x.dtype), rows, x.device)
    blocks = triton.cdiv(d_out, config.blocks["BLOCK_OUT"])
    squares = torch.empty((blocks, rows), dtype=torch.float32, device=x.device)
    if blocks > 0:
        forward_kernel[(blocks * triton.cdiv(rows, config.blocks["BLOCK_ROWS"]),)](
            x,
            base,
            delta,
            y,
            side,
            squares,
            rows,
            d_out,
            d_in,
            *x.stride(),
            *base.stride(),
            *delta.stride(),
            y.stride(0),
            side.stride(0),
            **config.launch,
        )
    norm_kernel[(triton.cdiv(rows, NORM.blocks["NORM_ROWS"]),)](
        squares, indicator, blocks, rows, **NORM.launch
    )


def backward(
    grad_y: Tensor,
    grad_indicator: Tensor,
    x: Tensor,
    delta: Tensor,
    mask_bits: Tensor,
    side: Tensor,
    indicator: Tensor,
    grad_x: Tensor | None,
    grad_delta: Tensor | None,
) -> None:
    """Write the gradients in x (in its dtype) and in delta (float32, 0 outside the mask).

    grad_y [N, d_out] and grad_indicator [N] may have any strides, as autograd's often have;
    mask_bits [d_out, W], side, indicator and the results have contiguous rows. A gradient that is
    None is not computed.
    """
    (rows, d_in), d_out = x.shape, delta.shape[0]
    key = configs.dtype_key(x.dtype)
    if grad_delta is not None and grad_delta.numel() > 0:
        config = configs.pick(GRAD_DELTA, key, rows, x.device)
        blocks = triton.cdiv(d_out, config.blocks["BLOCK_OUT"])
        grad_delta_kernel[(blocks * triton.cdiv(d_in, config.blocks["BLOCK_IN"]),)](
            grad_y,
            grad_indicator,
            x,
            mask_bits,
            side,
            indicator,
            grad_delta,
            rows,
            d_out,
            d_in,
            *grad_y.stride(),
            grad_indicator.stride(0),
            *x.stride(),
            mask_bits.stride(0),
            side.stride(0),
            grad_delta.stride(0),
            **config.launch,
        )
    if grad_x is not None and grad_x.numel() > 0:
        config = configs.pick(GRAD_X, key, rows, x.device)
        blocks = triton.cdiv(rows, config.blocks["BLOCK_ROWS"])
        grad_x_kernel[(blocks * triton.cdiv(d_in, config.blocks["BLOCK_IN"]),)](
            grad_y,
            grad_indicator,
            delta,
            side,
            indicator,
            grad_x,
            rows,
            d_out,
            d_in,
            *grad_y.stride(),
            grad_indicator.stride(0),
            *delta.stride(),
            side.stride(0),
            grad_x.stride(0),
            **config.launch,
        )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Every kernel with every config, as aligned contiguous tensors would have it compiled."""
    wide = "*fp32:16"
    norm = {"squares": wide, "indicator": wide, "blocks": "i32", "rows": "i32"}
    yield configs.Variant("dual_linear_train_norm", norm_kernel, norm, {}, NORM, False)
    sizes = {"rows": "i32", "d_out": "i32:16", "d_in": "i32:16"}
    for key in configs.DTYPE_KEYS.values():
        half = f"*{key}:16"
        grads = {"grad_y": half, "grad_indicator": wide, "side": wide, "indicator": wide}
        grads |= dict.fromkeys(("grad_y_row", "side_row"), "i32:16")
        one = {"grad_y_column": 1, "grad_indicator_row": 1}
        forward = {"x": half, "base": half, "delta": wide, "y": half, "side": wide, "squares": wide}
        forward |= dict.fromkeys(("x_row", "base_row", "delta_row", "y_row", "side_row"), "i32:16")
        by_delta = {"x": half, "mask_bits": "*i32:16", "grad_delta": wide, **grads}
        by_delta |= dict.fromkeys(("x_row", "mask_row", "grad_delta_row"), "i32:16")
        by_x = {"delta": wide, "grad_x": half, **grads}
        by_x |= dict.fromkeys(("delta_row", "grad_x_row"), "i32:16")
        for op, kernel, signature, constants in (
            (
                FORWARD,
                forward_kernel,
                forward,
                {"x_column": 1, "base_column": 1, "delta_column": 1},
            ),
            (GRAD_DELTA, grad_delta_kernel, by_delta, {"x_column": 1, **one}),
            (GRAD_X, grad_x_kernel, by_x, {"delta_column": 1, **one}),
        ):
            for config in configs.every(op, key, arch):
                signature = {**signature, **sizes}
                yield configs.Variant(op, kernel, signature, constants, config, True)
