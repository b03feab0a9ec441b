"""||D_shard x_row||_2 of (row, shard) pairs, exactly, with nothing of the size of D x written.

Pairs arrive in any order; the indicator router asks for all tokens times all shards, the shards
running fastest. A tile of pairs taken as they come would then hold a few tokens of every shard, and
multiply k times as much as is wanted. So a first launch sorts the pairs' numbers by shard (a stable
counting sort of a few bytes a pair, nothing next to the products), after which a tile holds one
shard, or two. It serves any order alike, where a fixed stride would serve the router's alone.
Each program then squares and sums its block of outputs, and a last launch adds the blocks in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.dual_linear import shard_parts, table_key
from wise_ext.triton_kernels.dual_linear_train import NORM, norm_kernel
from wise_ext.triton_kernels.packed_tile import side_product

SIDE_NORM = "side_norm"
ORDER = configs.Config({"ORDER_PAIRS": 4096}, num_warps=8, num_stages=1)


@triton.jit
def sort_keys(shards, at, pairs, k):
    """Each pair's shard; k for a shard that does not exist, k + 1 past the last pair."""
    shard = tl.load(shards + at, mask=at < pairs, other=0)
    key = tl.where((shard >= 0) & (shard < k), shard, k)
    return tl.where(at < pairs, key, k + 1)


@triton.jit(do_not_specialize=["pairs", "k"])
def order_kernel(shards, order, pairs, k, ORDER_PAIRS: tl.constexpr):
    """order: the pairs' numbers sorted by shard. One program a shard, and one for all that is none.

    A program counts what comes before its shard, then writes its own pairs one after the other.
    """
    group = tl.program_id(0)
    at = tl.arange(0, ORDER_PAIRS)
    earlier = tl.zeros((ORDER_PAIRS,), dtype=tl.int32)
    for first in range(0, pairs, ORDER_PAIRS):
        earlier += (sort_keys(shards, first + at, pairs, k) < group).to(tl.int32)
    position = tl.sum(earlier, 0)
    for first in range(0, pairs, ORDER_PAIRS):
        mine = sort_keys(shards, first + at, pairs, k) == group
        number = mine.to(tl.int32)
        tl.store(order + position + tl.cumsum(number, 0) - number, first + at, mask=mine)
        position += tl.sum(number, 0)


@triton.jit(do_not_specialize=["n_rows", "pairs", "k", "count"])
def square_kernel(
    x,
    mask_bits,
    values,
    row_ptr,
    rows,
    shards,
    order,
    squares,
    n_rows,
    pairs,
    d_out,
    d_in,
    k,
    words,
    count,
    x_row,
    x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """squares [blocks of outputs, pairs]: each pair's sum of squares over one block of outputs.

    Like `add_side_kernel`, with gathered rows and a norm where that one stores.
    """
    part, parts = tl.program_id(1), tl.num_programs(1)
    # One axis for both: pairs can be more than the second axis of a grid takes.
    blocks = tl.cdiv(d_out, BLOCK_OUT)
    block = tl.program_id(0) % blocks
    o = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    at = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = at < pairs
    pair = tl.load(order + at, mask=live, other=0)
    row = tl.load(rows + pair, mask=live, other=0)
    chosen = tl.load(shards + pair, mask=live, other=0)
    wrong = (chosen < 0) | (chosen >= k) | (row < 0) | (row >= n_rows)
    exists = live & (wrong == 0)
    squares_at = squares + block.to(tl.int64) * pairs + pair
    tl.store(squares_at, float("nan"), mask=live & wrong)
    left = tl.where(exists & (chosen % parts == part), chosen, k)
    shard = tl.min(left, 0)
    # Pairs that do not exist, and outputs past the last, read something that is there.
    x_rows = x + tl.where(exists, row, 0).to(tl.int64) * x_row
    last = tl.minimum(o, d_out - 1)
    while shard < k:
        side, trust = side_product(
            x_rows,
            x_column,
            mask_bits,
            values,
            row_ptr,
            shard.to(tl.int64) * d_out + last,
            count,
            words,
            d_in,
            0,
            words,
            BLOCK_ROWS,
            BLOCK_OUT,
            BLOCK_IN,
            WHOLE,
        )
        side = tl.where((o < d_out)[:, None], side * trust[:, None], 0.0)
        tl.store(squares_at, tl.sum(side * side, 0), mask=left == shard)
        left = tl.where(left > shard, left, k)
        shard = tl.min(left, 0)


def side_norm(
    x: Tensor,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    rows: Tensor,
    shards: Tensor,
    norms: Tensor,
) -> None:
    """Write norms[p] = ||D_shards[p] x[rows[p]]||_2, float32 [P].

    x [N, d_in] (any strides) and values in float32, bfloat16 or float16, each for itself; the bank
    (mask_bits [k, d_out, W], values [nnz], row_ptr [k * d_out + 1]), rows and shards (int32 [P])
    contiguous. A pair whose row or shard does not exist, or whose shard has a packed row that
    row_ptr misplaces, becomes NaN.
    """
    (n_rows, d_in), (k, d_out, words), pairs = x.shape, mask_bits.shape, rows.shape[0]
    if pairs == 0:
        return
    if 0 in (n_rows, k):
        norms.fill_(float("nan"))
        return
    if 0 in (d_in, d_out):
        norms.zero_()
        return
    config = configs.pick(SIDE_NORM, table_key(x, values), pairs, x.device)
    blocks = triton.cdiv(d_out, config.blocks["BLOCK_OUT"])
    tiles = triton.cdiv(pairs, config.blocks["BLOCK_ROWS"])
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    squares = torch.empty(blocks, pairs, dtype=torch.float32, device=x.device)
    order_kernel[(k + 1,)](shards, order, pairs, k, **ORDER.launch)
    square_kernel[(blocks * tiles, shard_parts(blocks * tiles, k))](
        x,
        mask_bits,
        values,
        row_ptr,
        rows,
        shards,
        order,
        squares,
        n_rows,
        pairs,
        d_out,
        d_in,
        k,
        words,
        values.numel(),
        *x.stride(),
        WHOLE=d_in % config.blocks["BLOCK_IN"] == 0,
        **config.launch,
    )
    norm_kernel[(triton.cdiv(pairs, NORM.blocks["NORM_ROWS"]),)](
        squares, norms, blocks, pairs, **NORM.launch
    )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Every config in bfloat16 and float32, and the largest in float16."""
    order = {"shards": "*i32:16", "order": "*i32:16", "pairs": "i32", "k": "i32"}
    yield configs.Variant(f"{SIDE_NORM}_order", order_kernel, order, {}, ORDER, False)
    for key in configs.DTYPE_KEYS.values():
        found = configs.every(SIDE_NORM, key, arch)
        signature = {"x": f"*{key}:16", "mask_bits": "*i32:16", "values": f"*{key}:16"}
        signature |= {"row_ptr": "*i64:16"}
        signature |= dict.fromkeys(("rows", "shards", "order"), "*i32:16")
        signature |= {"squares": "*fp32:16", "n_rows": "i32", "pairs": "i32", "d_out": "i32:16"}
        signature |= {"d_in": "i32:16", "k": "i32", "words": "i32:16", "count": "i32"}
        signature |= {"x_row": "i32:16"}
        for config in found[-1:] if key == "fp16" else found:
            constants = {"x_column": 1, "WHOLE": True}
            yield configs.Variant(SIDE_NORM, square_kernel, signature, constants, config, True)
