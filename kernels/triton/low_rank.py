"""y[n] += left_e^T (right_e x[n]) for each row's own shard e: two thin products, once rounded.

A shard has as many directions as its answer needs, and how many that is only the device knows. So
no grid and no scratch depends on it: a row's directions are dealt out in blocks to a fixed number
of lanes, each sums up what its own blocks add, and a second launch adds the lanes in order. Few
rows get many lanes, and many rows few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs

ADD_LOW_RANK = "add_low_rank"
PRODUCT = configs.Config(
    {"BLOCK_RANK": 8, "BLOCK_IN": 512, "BLOCK_OUT": 512}, num_warps=4, num_stages=1
)
COMBINE = configs.Config({"COMBINE_OUT": 1024}, num_warps=4, num_stages=1)
# Programs that fill a card, and lanes a row at most: a direction block each for common ranks.
PROGRAMS = 1024
MAX_LANES = 16


@triton.jit
def directions(rank_ptr, route, n, k, total):
    """Where the directions of row n's shard begin and end, and whether they are there at all; a row
    on the main memory has none, and is as it should be."""
    shard = tl.load(route + n)
    exists = (shard >= 0) & (shard < k)
    begin = tl.load(rank_ptr + shard, mask=exists, other=0)
    end = tl.load(rank_ptr + shard + 1, mask=exists, other=0)
    fits = (shard >= -1) & (shard < k) & (begin >= 0) & (begin <= end) & (end <= total)
    return begin, tl.where(fits, end, begin), fits


@triton.jit(do_not_specialize=["k", "total", "lanes"])
def product_kernel(
    x,
    left,
    right,
    rank_ptr,
    route,
    partial,
    k,
    total,
    d_out,
    d_in,
    lanes,
    x_row,
    x_column,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """partial [rows, lanes, d_out] += what every lanes-th block of a row's directions adds."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1)
    begin, end, _ = directions(rank_ptr, route, n, k, total)
    i = tl.arange(0, BLOCK_IN)
    o = tl.arange(0, BLOCK_OUT)
    for first in range(begin + lane * BLOCK_RANK, end, lanes * BLOCK_RANK):
        r = first + tl.arange(0, BLOCK_RANK)
        there = (r < end)[:, None]
        scales = tl.zeros((BLOCK_RANK,), dtype=tl.float32)
        for column in range(0, d_in, BLOCK_IN):
            inside = column + i < d_in
            at = (column + i).to(tl.int64)
            entering = tl.load(x + n * x_row + at * x_column, mask=inside, other=0.0)
            stored = tl.load(
                right + r[:, None] * d_in + at[None, :], mask=there & inside[None, :], other=0.0
            )
            scales += tl.sum(stored.to(tl.float32) * entering.to(tl.float32)[None, :], 1)
        for column in range(0, d_out, BLOCK_OUT):
            inside = column + o < d_out
            at = (column + o).to(tl.int64)
            stored = tl.load(
                left + r[:, None] * d_out + at[None, :], mask=there & inside[None, :], other=0.0
            )
            # Rows past the end are zeros, but a scale that is not finite would show in them.
            added = tl.where(there, stored.to(tl.float32) * scales[:, None], 0.0)
            slot = partial + (n * lanes + lane) * d_out + at
            before = tl.load(slot, mask=inside, other=0.0)
            tl.store(slot, before + tl.sum(added, 0), mask=inside)
        # What one thread has written, another may read in the next round.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["k", "total", "lanes"])
def combine_kernel(
    y,
    rank_ptr,
    route,
    partial,
    k,
    total,
    d_out,
    lanes,
    y_row,
    BLOCK_RANK: tl.constexpr,
    COMBINE_OUT: tl.constexpr,
):
    """y of the sums over lanes, in order; NaN where a route or its offsets are wrong."""
    n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * COMBINE_OUT + tl.arange(0, COMBINE_OUT)
    inside = o < d_out
    begin, end, fits = directions(rank_ptr, route, n, k, total)
    if (end > begin) | (fits == 0):
        used = tl.minimum(tl.cdiv(end - begin, BLOCK_RANK), lanes)
        added = tl.zeros((COMBINE_OUT,), dtype=tl.float32)
        for lane in range(0, used):
            added += tl.load(partial + (n * lanes + lane) * d_out + o, mask=inside, other=0.0)
        y_at = y + n * y_row + o
        result = tl.load(y_at, mask=inside, other=0.0).to(tl.float32) + added
        result = tl.where(fits, result, float("nan"))
        tl.store(y_at, result.to(y.dtype.element_ty), mask=inside)


def add_low_rank(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
) -> None:
    """Add left_e^T (right_e x[n]), e = route[n], to y[n] in place.

    y [N, d_out] (rows contiguous), x [N, d_in] (any strides), left [R, d_out] and right [R, d_in]
    (of one dtype) in float32, bfloat16 or float16, rank_ptr int64 [k + 1] and route int32 [N]; all
    but y and x contiguous. -1 leaves a row as it is. A row becomes NaN whose route does not exist,
    or whose shard's offsets lie outside of left or descend.
    """
    (rows, d_in), d_out = x.shape, y.shape[1]
    if 0 in (rows, d_out):
        return
    k, total = rank_ptr.shape[0] - 1, left.shape[0]
    lanes = max(min(PROGRAMS // rows, MAX_LANES), 1)
    partial = torch.zeros(rows, lanes, d_out, dtype=torch.float32, device=x.device)
    product_kernel[(rows, lanes)](
        x,
        left,
        right,
        rank_ptr,
        route,
        partial,
        k,
        total,
        d_out,
        d_in,
        lanes,
        *x.stride(),
        **PRODUCT.launch,
    )
    combine_kernel[(rows, triton.cdiv(d_out, COMBINE.blocks["COMBINE_OUT"]))](
        y,
        rank_ptr,
        route,
        partial,
        k,
        total,
        d_out,
        lanes,
        y.stride(0),
        BLOCK_RANK=PRODUCT.blocks["BLOCK_RANK"],
        **COMBINE.launch,
    )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Both kernels in every dtype, and mixed."""
    counts = {"k": "i32", "total": "i32", "d_out": "i32:16"}
    for key, stored in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")):
        name = ADD_LOW_RANK if key == stored else f"{ADD_LOW_RANK}_{stored}"
        ends = {"rank_ptr": "*i64:16", "route": "*i32:16", "partial": "*fp32:16"}
        signature = {"x": f"*{key}:16", "left": f"*{stored}:16", "right": f"*{stored}:16"}
        signature |= ends | counts | {"d_in": "i32:16", "lanes": "i32", "x_row": "i32:16"}
        yield configs.Variant(name, product_kernel, signature, {"x_column": 1}, PRODUCT, False)
        if key == stored:
            signature = {"y": f"*{key}:16"} | ends | counts | {"lanes": "i32", "y_row": "i32:16"}
            constants = {"BLOCK_RANK": PRODUCT.blocks["BLOCK_RANK"]}
            yield configs.Variant(
                f"{name}_combine", combine_kernel, signature, constants, COMBINE, False
            )
