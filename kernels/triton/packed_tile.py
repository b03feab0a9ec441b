"""Products with packed rows: a tile of mask and values is spread out in registers, then multiplied.

Both products here are of the shape D_s x^T: the packed rows are the left operand, so that even a
few rows of x make a block the tensor cores take. Spreading is what costs, because it is done by the
ordinary ALUs once for every block of rows of x; hence the care in `pairs_of` and the wide blocks of
rows in the tables. Where it comes to be counted, popcounts beat `tl.cumsum` over the bits by more
than two to one: a scan goes through shuffles, a popcount is one instruction.

Wrong banks are found on the way and never followed: the values a row takes are counted before they
are read, and a row that would leave `values` is read as empty and reported.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wise_ext.triton_kernels.dual_linear_train import product


@triton.jit
def popcount(word):
    """The bits set in int32 words. LLVM knows this pattern and makes it one instruction."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(mask_rows, first, end, d_in, WORDS: tl.constexpr, WHOLE: tl.constexpr):
    """Mask words first..first+WORDS of each row; words from `end` on and bits past d_in are 0.

    WHOLE: d_in is a multiple of the block, so that no bit of the last word is past d_in.
    """
    w = first + tl.arange(0, WORDS)
    mask = tl.load(mask_rows[:, None] + w[None, :], mask=(w < end)[None, :], other=0)
    if not WHOLE:
        left = tl.maximum(d_in - w * 32, 0)
        mask &= tl.where(left < 32, (1 << tl.minimum(left, 31)) - 1, -1)[None, :]
    return mask


@triton.jit
def pairs_of(values, mask):
    """Columns 0, 2, 4, … and columns 1, 3, 5, … of every mask word, as two [.., 16].

    Two neighbours share one address: `first` is what the pair's first set bit takes, `second` what
    a second one takes, right behind it.
    """
    low = 1 << (2 * tl.arange(0, 16)[None, None, :])
    both = low | (low << 1)
    at = values + popcount(mask & (low - 1))
    set_here = mask & both
    first = tl.load(at, mask=set_here != 0, other=0)
    second = tl.load(at + 1, mask=set_here == both, other=0)
    has_low = (mask & low) != 0
    return tl.where(has_low, first, 0), tl.where(has_low, second, first)


@triton.jit
def spread(values_rows, room, taken, mask, BLOCK_OUT: tl.constexpr, WORDS: tl.constexpr):
    """The dense [BLOCK_OUT, 32 * WORDS] tile of `mask`, and how many values each row has taken.

    values_rows point at the first value of each packed row, of which `taken` are behind us. A row
    with fewer values left than it needs (`room` from its start) is all zero from there on.
    """
    counts = popcount(mask)
    before = taken[:, None] + tl.cumsum(counts, 1) - counts
    taken += tl.sum(counts, 1)
    mask = tl.where((taken <= room)[:, None], mask, 0)
    even, odd = pairs_of((values_rows[:, None] + before)[:, :, None], mask[:, :, None])
    return tl.reshape(tl.join(even, odd), (BLOCK_OUT, 32 * WORDS)), taken


@triton.jit
def multiply(tile, x, total):
    """total + tile @ x. Half precision of one kind goes in as it is; the rest as float32."""
    if tile.dtype == tl.float32:
        return product(tile, x, total)
    elif x.dtype == tl.float32:
        return tl.dot(tile.to(tl.float32), x, total, input_precision="tf32x3")
    elif tile.dtype == x.dtype:
        return tl.dot(tile, x, total)
    else:
        # Eleven bits, what tf32 keeps, hold either kind of half precision.
        return tl.dot(tile.to(tl.float32), x.to(tl.float32), total, input_precision="tf32")


@triton.jit
def side_product(
    x_rows,
    x_column,
    mask_bits,
    values,
    row_ptr,
    packed,
    count,
    words,
    d_in,
    begin_word,
    end_word,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """D x^T of packed rows `packed` (int64 [BLOCK_OUT]) and rows x_rows (pointers [BLOCK_ROWS]).

    Only the columns of mask words begin_word..end_word are summed. Returns float32
    [BLOCK_OUT, BLOCK_ROWS], and for each packed row 1.0, or NaN where row_ptr disagrees with the
    mask (as the slice that ends the row finds out) or leaves the `count` values.
    """
    WORDS: tl.constexpr = BLOCK_IN // 32
    column = tl.arange(0, BLOCK_IN)
    begin = tl.load(row_ptr + packed)
    inside = (begin >= 0) & (begin <= count)
    begin = tl.where(inside, begin, 0)
    # Without room even an empty row counts as wrong.
    room = tl.where(inside, tl.minimum(count - begin, 0x7FFFFFFF), -1).to(tl.int32)
    values_rows = values + begin
    mask_rows = mask_bits + packed * words
    taken = tl.zeros((BLOCK_OUT,), dtype=tl.int32)
    for first in range(0, begin_word, 32):
        taken += tl.sum(popcount(load_words(mask_rows, first, begin_word, d_in, 32, True)), 1)
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
    # The values of the next tile and the mask of the one after it are under way while a tile is
    # multiplied: gathered loads are too small for the asynchronous copies Triton makes of x's.
    mask = load_words(mask_rows, begin_word, end_word, d_in, WORDS, WHOLE)
    tile, taken = spread(values_rows, room, taken, mask, BLOCK_OUT, WORDS)
    mask = load_words(mask_rows, begin_word + WORDS, end_word, d_in, WORDS, WHOLE)
    for first in range(begin_word, end_word, WORDS):
        i = first * 32 + column
        x_at = x_rows[None, :] + i.to(tl.int64)[:, None] * x_column
        x = tl.load(x_at) if WHOLE else tl.load(x_at, mask=(i < d_in)[:, None], other=0.0)
        coming, taken = spread(values_rows, room, taken, mask, BLOCK_OUT, WORDS)
        mask = load_words(mask_rows, first + 2 * WORDS, end_word, d_in, WORDS, WHOLE)
        total = multiply(tile, x, total)
        tile = coming
    agrees = (tl.load(row_ptr + packed + 1) - begin == taken) | (end_word < words)
    return total, tl.where(agrees & (taken <= room), 1.0, float("nan"))
