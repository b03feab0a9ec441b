"""y[n] += D_route[n] x[n] for many rows, in one launch that knows nothing of the routes beforehand.

A program owns a tile of rows in their natural order: the rows of a prompt lie together, so a tile
mostly has one route. It walks the routes that occur in it in ascending order, multiplies all its
rows with each such shard, and stores those that belong to it. A tile without a routed row is left
after its routes were read.

Few rows make few tiles. Then the shards are shared out among programs, and after them the columns:
slices of the sums are written, and a second launch adds them to y in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.packed_tile import side_product

ADD_SIDE = "add_side"

# Three programs for each multiprocessor of a Hopper: tiles fewer than that are shared out.
FILL = 396
# A slice of the columns is at least this many blocks: a shorter one would be all prologue.
SLICE_BLOCKS = 8
COMBINE = configs.Config({"COMBINE_ROWS": 8, "COMBINE_OUT": 256}, num_warps=4, num_stages=1)


@triton.jit
def put_rows(target, target_row, d_out, route, rows, shard, first, o, side, ADD: tl.constexpr):
    """target[n, o] (+)= side[o, n] for those rows n from `first` on that are routed to `shard`."""
    n = first + tl.arange(0, side.shape[1])
    mine = tl.load(route + n, mask=n < rows, other=-1) == shard
    valid = mine[:, None] & (o < d_out)[None, :]
    at = target + n[:, None] * target_row + o[None, :]
    result = tl.trans(side)
    if ADD:
        result += tl.load(at, mask=valid, other=0.0).to(tl.float32)
    tl.store(at, result.to(target.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "k", "count", "parts"])
def add_side_kernel(
    y,
    x,
    mask_bits,
    values,
    row_ptr,
    route,
    partial,
    rows,
    d_out,
    d_in,
    k,
    words,
    count,
    parts,
    slice_words,
    y_row,
    x_row,
    x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
    SLICED: tl.constexpr,
):
    """One tile of rows, one block of outputs, every shard s with s % parts == part.

    Rows of different shards are different rows, so the parts of a tile never meet. SLICED: only
    slice_words mask words' columns, and into partial [slices, rows, d_out] instead of y.
    """
    part, share = tl.program_id(2) % parts, tl.program_id(2) // parts
    tile = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    n = tile + tl.arange(0, BLOCK_ROWS)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    routes = tl.load(route + n, mask=n < rows, other=-1)
    exists = (routes >= 0) & (routes < k)
    # A route that is no shard cannot be reported from here; its row must not pass for a result.
    wrong = (routes < -1) | (routes >= k)
    if tl.max(wrong.to(tl.int32), 0) != 0:
        nan = tl.full((BLOCK_ROWS, BLOCK_OUT), float("nan"), dtype=tl.float32)
        y_at = y + n[:, None] * y_row + o[None, :]
        tl.store(y_at, nan.to(y.dtype.element_ty), mask=wrong[:, None] & (o < d_out)[None, :])
    left = tl.where(exists & (routes % parts == part), routes, k)
    shard = tl.min(left, 0)
    # What lies past the last row or column reads the last one, and is not stored.
    x_rows = x + tl.minimum(n, rows - 1) * x_row
    last = tl.minimum(o, d_out - 1)
    while shard < k:
        if SLICED:
            begin_word = share * slice_words
            end_word = tl.minimum(begin_word + slice_words, words)
        else:
            begin_word = 0
            end_word = words
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
            begin_word,
            end_word,
            BLOCK_ROWS,
            BLOCK_OUT,
            BLOCK_IN,
            WHOLE,
        )
        # The products fill half the registers. So they are put away in two halves, and addresses
        # are worked out in between: shard >> 31 is 0, but the compiler cannot know, and does not
        # hold them all through the product.
        side = tl.reshape(side * trust[:, None], (BLOCK_OUT, 2, BLOCK_ROWS // 2))
        near, far = tl.split(tl.permute(side, (0, 2, 1)))
        first = tile + (shard >> 31)
        middle = first + BLOCK_ROWS // 2
        if SLICED:
            slot = partial + share.to(tl.int64) * rows * d_out
            put_rows(slot, d_out, d_out, route, rows, shard, first, o, near, False)
            put_rows(slot, d_out, d_out, route, rows, shard, middle, o, far, False)
        else:
            put_rows(y, y_row, d_out, route, rows, shard, first, o, near, True)
            put_rows(y, y_row, d_out, route, rows, shard, middle, o, far, True)
        left = tl.where(left > shard, left, k)
        shard = tl.min(left, 0)


@triton.jit(do_not_specialize=["rows", "k", "slices"])
def combine_kernel(
    y,
    route,
    partial,
    rows,
    d_out,
    k,
    slices,
    y_row,
    COMBINE_ROWS: tl.constexpr,
    COMBINE_OUT: tl.constexpr,
):
    """y += the sum over slices of partial [slices, rows, d_out], in order, in routed rows."""
    n = tl.program_id(1).to(tl.int64) * COMBINE_ROWS + tl.arange(0, COMBINE_ROWS)
    o = tl.program_id(0) * COMBINE_OUT + tl.arange(0, COMBINE_OUT)
    routes = tl.load(route + n, mask=n < rows, other=-1)
    valid = ((routes >= 0) & (routes < k))[:, None] & (o < d_out)[None, :]
    at = partial + n[:, None] * d_out + o[None, :]
    total = tl.zeros((COMBINE_ROWS, COMBINE_OUT), dtype=tl.float32)
    for _ in range(0, slices):
        total += tl.load(at, mask=valid, other=0.0)
        at += rows.to(tl.int64) * d_out
    y_at = y + n[:, None] * y_row + o[None, :]
    total += tl.load(y_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=valid)


def shard_parts(tiles: int, k: int) -> int:
    """Into how many programs the shards of a tile are shared out so that the card is filled."""
    return max(1, min(k, FILL // max(tiles, 1)))


def slice_columns(d_in: int, block_in: int, programs: int) -> int:
    """How many columns a program sums, whole blocks, so that the card is filled."""
    wanted = max(1, FILL // programs)
    return block_in * max(SLICE_BLOCKS, triton.cdiv(d_in, block_in * wanted))


def may_slice(config: configs.Config) -> bool:
    """Whether a config's blocks leave registers for the addresses of partial sums."""
    return config.blocks["BLOCK_ROWS"] * config.blocks["BLOCK_OUT"] <= 128 * 128


def table_key(x: Tensor, values: Tensor) -> str:
    """The tables' dtype: products of half precision of one kind, and all others in float32."""
    return configs.dtype_key(x.dtype if x.dtype == values.dtype else torch.float32)


def add_side(
    y: Tensor, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor
) -> None:
    """Add D_route[n] x[n] to y[n] in place; route -1 leaves the row as it is.

    y [N, d_out] (contiguous rows) and x [N, d_in] (any strides) in float32, bfloat16 or float16,
    each for itself; the bank (mask_bits [k, d_out, W], values [nnz], row_ptr [k * d_out + 1]) and
    route int32 [N] contiguous. Sums are float32 and rounded once. A row whose route is no shard,
    and the columns of a packed row that row_ptr misplaces, become NaN.
    """
    (rows, d_in), (k, d_out, words) = x.shape, mask_bits.shape
    if 0 in (rows, d_in, d_out):
        return
    config = configs.pick(ADD_SIDE, table_key(x, values), rows, x.device)
    columns = triton.cdiv(d_out, config.blocks["BLOCK_OUT"])
    tiles = triton.cdiv(rows, config.blocks["BLOCK_ROWS"])
    parts = shard_parts(columns * tiles, k)
    block_in = config.blocks["BLOCK_IN"]
    slice_in = d_in
    if may_slice(config):
        slice_in = slice_columns(d_in, block_in, columns * tiles * parts)
    slices = triton.cdiv(d_in, slice_in)
    partial = y
    if slices > 1:
        partial = torch.empty(slices, rows, d_out, dtype=torch.float32, device=y.device)
    add_side_kernel[(columns, tiles, parts * slices)](
        y,
        x,
        mask_bits,
        values,
        row_ptr,
        route,
        partial,
        rows,
        d_out,
        d_in,
        k,
        words,
        values.numel(),
        parts,
        triton.cdiv(slice_in, 32),
        y.stride(0),
        *x.stride(),
        WHOLE=d_in % block_in == 0,
        SLICED=slices > 1,
        **config.launch,
    )
    if slices > 1:
        grid = (
            triton.cdiv(d_out, COMBINE.blocks["COMBINE_OUT"]),
            triton.cdiv(rows, COMBINE.blocks["COMBINE_ROWS"]),
        )
        combine_kernel[grid](
            y, route, partial, rows, d_out, k, slices, y.stride(0), **COMBINE.launch
        )


def variants(arch: int) -> Iterator[configs.Variant]:
    """Every config, and once each: columns in slices, a ragged d_in, float16, mixed dtypes."""
    combine = {"y": "*bf16:16", "route": "*i32:16", "partial": "*fp32:16", "rows": "i32"}
    combine |= {"d_out": "i32:16", "k": "i32", "slices": "i32", "y_row": "i32:16"}
    yield configs.Variant(f"{ADD_SIDE}_combine", combine_kernel, combine, {}, COMBINE, False)
    for key, stored in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")):
        found = configs.every(ADD_SIDE, key if key == stored else "fp32", arch)
        signature = {"y": f"*{key}:16", "x": f"*{key}:16", "mask_bits": "*i32:16"}
        signature |= {"values": f"*{stored}:16", "row_ptr": "*i64:16", "route": "*i32:16"}
        signature |= {"partial": "*fp32:16", "rows": "i32", "d_out": "i32:16", "d_in": "i32:16"}
        signature |= {"k": "i32", "words": "i32:16", "count": "i32", "parts": "i32"}
        signature |= dict.fromkeys(("slice_words", "y_row", "x_row"), "i32:16")
        plain = {"x_column": 1, "WHOLE": True, "SLICED": False}
        chosen = [(config, plain) for config in found]
        if (key, stored) == ("bf16", "bf16"):
            chosen += [(config, {**plain, "SLICED": True}) for config in found if may_slice(config)]
            chosen.append((found[-1], {**plain, "WHOLE": False}))
        elif key == "fp16" or key != stored:
            chosen = chosen[-1:]
        for config, constants in chosen:
            name = ADD_SIDE if key == stored else f"{ADD_SIDE}_{stored}"
            yield configs.Variant(name, add_side_kernel, signature, constants, config, True)
