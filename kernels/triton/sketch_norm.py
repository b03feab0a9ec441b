"""||sketch[s] x[n]||_2 of every row and every sketch: one matmul whose epilogue is the norm.

A sketch has r rows, far fewer than a shard, so a block of sketch rows holds whole sketches and
their norms are finished where the products are. With few rows of x there are too few blocks to fill
a card; then the columns are shared out too, partial products are written, and a second launch adds
them in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.dual_linear import slice_columns, table_key
from wise_ext.triton_kernels.packed_tile import multiply

SKETCH_NORM = "sketch_norm"
COMBINE = configs.Config({"COMBINE_ROWS": 16}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["rows", "k"])
def sketch_kernel(
    x,
    sketch,
    norms,
    partial,
    rows,
    k,
    rank,
    d_in,
    slice_in,
    x_row,
    x_column,
    RANK: tl.constexpr,
    SLICED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK_OUT // RANK sketches and one tile of rows: norms [rows, k].

    RANK is the sketches' rank as a power of two; larger sketches than a block are taken RANK rows
    after RANK rows. SLICED: partial [slices, k, rank, rows], the products of slice_in columns each.
    """
    SKETCHES: tl.constexpr = BLOCK_OUT // RANK
    m = tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    n = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    s = tl.program_id(0) * SKETCHES + m // RANK
    begin = tl.program_id(2) * slice_in
    end = tl.minimum(begin + slice_in, d_in)
    x_rows = x + tl.minimum(n, rows - 1)[None, :] * x_row
    squares = tl.zeros((SKETCHES, BLOCK_ROWS), dtype=tl.float32)
    for piece in range(0, rank, RANK):
        r = piece + m % RANK
        there = (s < k) & (r < rank)
        row = tl.where(there, s.to(tl.int64) * rank + r, 0)
        total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
        for first in range(begin, end, BLOCK_IN):
            inside = first + i < end
            column = (first + i).to(tl.int64)
            a_at = sketch + row[:, None] * d_in + column[None, :]
            b_at = x_rows + column[:, None] * x_column
            if WHOLE:
                a = tl.load(a_at, mask=there[:, None], other=0.0)
                b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=there[:, None] & inside[None, :], other=0.0)
                b = tl.load(b_at, mask=inside[:, None], other=0.0)
            total = multiply(a, b, total)
        if SLICED:
            slot = tl.program_id(2).to(tl.int64) * k * rank + row
            tl.store(
                partial + slot[:, None] * rows + n[None, :],
                total,
                mask=there[:, None] & (n < rows)[None, :],
            )
        else:
            # Rows that pad a sketch were multiplied as zeros.
            squares += tl.sum(tl.reshape(total * total, (SKETCHES, RANK, BLOCK_ROWS)), 1)
    if not SLICED:
        at = tl.program_id(0) * SKETCHES + tl.arange(0, SKETCHES)
        tl.store(
            norms + n[None, :] * k + at[:, None],
            tl.sqrt_rn(squares),
            mask=(at < k)[:, None] & (n < rows)[None, :],
        )


@triton.jit(do_not_specialize=["rows", "k", "slices"])
def combine_kernel(
    partial, norms, rows, k, rank, slices, RANK: tl.constexpr, COMBINE_ROWS: tl.constexpr
):
    """norms [rows, k] of the sums over slices of partial [slices, k, rank, rows], in order."""
    s = tl.program_id(0)
    n = tl.program_id(1) * COMBINE_ROWS + tl.arange(0, COMBINE_ROWS)
    squares = tl.zeros((COMBINE_ROWS,), dtype=tl.float32)
    for piece in range(0, rank, RANK):
        r = piece + tl.arange(0, RANK)
        valid = (r < rank)[:, None] & (n < rows)[None, :]
        at = partial + (s.to(tl.int64) * rank + r)[:, None] * rows + n[None, :]
        total = tl.zeros((RANK, COMBINE_ROWS), dtype=tl.float32)
        for _ in range(0, slices):
            total += tl.load(at, mask=valid, other=0.0)
            at += rows.to(tl.int64) * k * rank
        squares += tl.sum(total * total, 0)
    tl.store(norms + n.to(tl.int64) * k + s, tl.sqrt_rn(squares), mask=n < rows)


def sketch_norm(x: Tensor, sketch: Tensor, norms: Tensor) -> None:
    """Write norms[n, s] = ||sketch[s] x[n]||_2, float32 [N, k], contiguous.

    x [N, d_in] (any strides) and sketch [k, r, d_in] (contiguous) in float32, bfloat16 or float16,
    each for itself; sums are float32.
    """
    (rows, d_in), (k, rank, _) = x.shape, sketch.shape
    if 0 in (rows, k):
        return
    if 0 in (rank, d_in):
        norms.zero_()
        return
    config = configs.pick(SKETCH_NORM, table_key(x, sketch), rows, x.device)
    block_in, block_out = config.blocks["BLOCK_IN"], config.blocks["BLOCK_OUT"]
    padded = min(triton.next_power_of_2(rank), block_out)
    columns = triton.cdiv(k, block_out // padded)
    tiles = triton.cdiv(rows, config.blocks["BLOCK_ROWS"])
    slice_in = slice_columns(d_in, block_in, columns * tiles)
    slices = triton.cdiv(d_in, slice_in)
    partial = norms
    if slices > 1:
        partial = torch.empty(slices, k, rank, rows, dtype=torch.float32, device=x.device)
    sketch_kernel[(columns, tiles, slices)](
        x,
        sketch,
        norms,
        partial,
        rows,
        k,
        rank,
        d_in,
        slice_in,
        *x.stride(),
        RANK=padded,
        SLICED=slices > 1,
        WHOLE=d_in % block_in == 0,
        **config.launch,
    )
    if slices > 1:
        combine_kernel[(k, triton.cdiv(rows, COMBINE.blocks["COMBINE_ROWS"]))](
            partial, norms, rows, k, rank, slices, RANK=padded, **COMBINE.launch
        )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Every config, and once each: columns in slices, float16, a block for each sketch."""
    combine = {"partial": "*fp32:16", "norms": "*fp32:16", "rows": "i32", "k": "i32"}
    combine |= {"rank": "i32:16", "slices": "i32"}
    name = f"{SKETCH_NORM}_combine"
    yield configs.Variant(name, combine_kernel, combine, {"RANK": 64}, COMBINE, False)
    for key in configs.DTYPE_KEYS.values():
        found = configs.every(SKETCH_NORM, key, arch)
        signature = {"x": f"*{key}:16", "sketch": f"*{key}:16", "norms": "*fp32:16"}
        signature |= {"partial": "*fp32:16", "rows": "i32", "k": "i32", "rank": "i32:16"}
        signature |= dict.fromkeys(("d_in", "slice_in", "x_row"), "i32:16")
        plain = {"x_column": 1, "RANK": 16, "WHOLE": True, "SLICED": False}
        chosen = [(config, plain) for config in found]
        if key == "fp16":
            chosen = [(found[-1], {**plain, "RANK": found[-1].blocks["BLOCK_OUT"]})]
        elif key == "bf16":
            chosen.append((found[0], {**plain, "SLICED": True}))
        for config, constants in chosen:
            yield configs.Variant(SKETCH_NORM, sketch_kernel, signature, constants, config, True)
