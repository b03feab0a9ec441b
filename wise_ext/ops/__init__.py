"""The operations on the packed bank, on low-rank shards and on the shard in training.

Shapes: `mask_bits` int32 [k, d_out, W] with W = ceil(d_in / 32), bit j of word w standing for
column 32*w + j; `values` [nnz] fp32/bf16/fp16, the masked entries of all shards in row-major
order; `row_ptr` int64 [k*d_out + 1], offsets into `values`. Sums are taken in fp32 whatever the
storage. Wrong dtypes, devices, shapes, mask lengths, offsets or routes raise `RuntimeError`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.ops.autograd import DualLinearTrain, LowRankProduct, SideProduct, needs_grad
from wise_ext.ops.backends import (
    CHOICES,
    ISAS,
    backend,
    cpu_isa,
    get_backend,
    native_failure,
    native_loaded,
    resolve,
    set_backend,
    set_cpu_isa,
    why,
)
from wise_ext.ops.capabilities import FEW_ROWS
from wise_ext.ops.schema import SCHEMAS

OPS = tuple(SCHEMAS)

__all__ = [
    "CHOICES",
    "FEW_ROWS",
    "ISAS",
    "OPS",
    "add_low_rank_",
    "add_side_",
    "backend",
    "cpu_isa",
    "dual_linear",
    "dual_linear_train",
    "get_backend",
    "masked_update_",
    "max_sim",
    "native_failure",
    "native_loaded",
    "pack",
    "set_backend",
    "set_cpu_isa",
    "side_norm",
    "sketch_norm",
    "ties_merge",
    "unpack",
    "why",
]


def add_side_(
    y: Tensor, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor
) -> None:
    """Add the side memory's output in place: `y[n] += D_route[n] x[n]` (W' = W + D, section 3.1).

    y [N, d_out] (rows contiguous) and x [N, d_in] in fp32/bf16/fp16, not necessarily the same;
    route int32 [N], -1 leaving the row on the main memory. One rounding into y's dtype; a row's
    result does not depend on the other rows. Differentiable in y and x.
    """
    if needs_grad(y, x):
        side = SideProduct.apply(  # type: ignore[no-untyped-call]
            x, mask_bits, values, row_ptr, route
        )
        y.add_(side)
        return
    resolve("add_side_", y, y.shape[0])(y, x, mask_bits, values, row_ptr, route)


def add_low_rank_(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
) -> None:
    """Add low-rank shards' output in place: `y[n] += left_e^T (right_e x[n])`, e = route[n].

    Shard e is `D_e = left_e^T right_e`, of rows rank_ptr[e]..rank_ptr[e + 1] of left [R, d_out]
    and right [R, d_in], both in one of fp32/bf16/fp16; rank_ptr int64 [k + 1] ascends from 0 to R,
    and a shard may have none. y [N, d_out] (rows contiguous) and x [N, d_in] in fp32/bf16/fp16,
    not necessarily the same; route int32 [N], -1 leaving the row on the main memory. One rounding
    into y's dtype; a row's result does not depend on the other rows. Differentiable in y and x.
    """
    if needs_grad(y, x):
        side = LowRankProduct.apply(  # type: ignore[no-untyped-call]
            x, left, right, rank_ptr, route
        )
        y.add_(side)
        return
    resolve("add_low_rank_", y)(y, x, left, right, rank_ptr, route)


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    route: Tensor,
) -> Tensor:
    """`F.linear(x, weight, bias)` with `add_side_` applied: x [N, d_in] to y [N, d_out].

    weight [d_out, d_in] and bias [d_out] have x's dtype. Differentiable in x, weight and bias.
    """
    if needs_grad(x, weight, bias):
        y = F.linear(x, weight, bias)
        add_side_(y, x, mask_bits, values, row_ptr, route)
        return y
    result: Tensor = resolve("dual_linear", x, x.shape[0])(
        x, weight, bias, mask_bits, values, row_ptr, route
    )
    return result


def side_norm(
    x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, rows: Tensor, shards: Tensor
) -> Tensor:
    """Routing indicators (Eq. 3): `||D_shards[p] x[rows[p]]||_2` for every pair, fp32 [P].

    x [N, d_in]; rows and shards int32 [P]. Nothing of the size of `D x` is written. Meant for
    deciding routes: no gradient flows through it (`dual_linear_train`'s indicator has one).
    """
    op = resolve("side_norm", x, rows.shape[0])
    result: Tensor = op(x.detach(), mask_bits, values, row_ptr, rows, shards)
    return result


def sketch_norm(x: Tensor, sketch: Tensor) -> Tensor:
    """Estimated indicators (Eq. 3): `||S_s x_n||_2` for every row n and shard s, fp32 [N, k].

    x [N, d_in]; sketch [k, r, d_in] with `S_s = R D_s`, R an [r, d_out] random projection of
    variance 1/r: the estimate of `||D_s x||_2` then has a relative error of about 1/sqrt(2r). No
    gradient.
    """
    result: Tensor = resolve("sketch_norm", x, x.shape[0])(x.detach(), sketch.detach())
    return result


def max_sim(
    query: Tensor, keys: Tensor, scales: Tensor, places: Tensor, weights: Tensor, floor: float
) -> Tensor:
    """Late interaction: `sum_j weights[e, j] max(0, max_t <query[b, t], key[e, j]>)`, fp32 [B, n].

    The score of every stored entry e for every row b of the batch (ColBERT's MaxSim, Khattab and
    Zaharia 2020, with weights). query fp32 [B, t, width], tokens no longer than 1: a zero one
    matches nothing, and one that is not finite makes all scores of its row NaN. keys int8
    [M, width] times scales fp32 [M], no longer than 1; places int32 [n, m], the rows of keys that
    an entry consists of, -1 for none; weights fp32 [n, m] >= 0, an entry's sum at most 1. A score
    that is not above `floor` comes back as 0 and is not worked out: the heavier an entry's first
    tokens, the sooner it is left out. No gradient.
    """
    result: Tensor = resolve("max_sim", query)(query.detach(), keys, scales, places, weights, floor)
    return result


def dual_linear_train(
    x: Tensor, base: Tensor, delta: Tensor, mask_bits: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and indicator of the shard in training: `s = x delta^T; y = base + s; ||s||_2`.

    x [N, d_in] and base [N, d_out] in fp32/bf16/fp16; delta fp32 [d_out, d_in], zero outside its
    mask; mask_bits int32 [d_out, W]. Returns y [N, d_out] in base's dtype and the indicator
    (Eq. 3), fp32 [N]. Differentiable once in x, base and delta: delta's gradient is zero outside
    the mask, and the indicator's subgradient at s = 0 is zero.
    """
    if needs_grad(x, base, delta):
        y, indicator = DualLinearTrain.apply(  # type: ignore[no-untyped-call]
            x, base, delta, mask_bits
        )
        return y, indicator
    y, _, indicator = resolve("dual_linear_train", delta)(x, base, delta, mask_bits)
    return y, indicator


def masked_update_(
    delta: Tensor,
    grad: Tensor,
    mask_bits: Tensor,
    row_ptr: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    step: int = 1,
    clamp: float = float("inf"),
) -> None:
    """One optimizer step on the masked entries of `delta`, in place; no other entry changes.

    delta and grad fp32 [d_out, d_in], mask_bits int32 [d_out, W], row_ptr int64 [d_out + 1] as
    `pack` returns it. Without m and v: SGD. With both (packed fp32 [nnz], changed too): Adam with
    bias correction, `step` counting from 1. Then the masked entries are clamped to
    [-clamp, clamp].
    """
    with torch.no_grad():
        resolve("masked_update_", delta)(
            delta, grad, mask_bits, row_ptr, m, v, lr, beta1, beta2, eps, step, clamp
        )
        if not torch.compiler.is_compiling() and not delta.is_inference():
            # A backward that saved the old delta must notice.
            torch.autograd.graph.increment_version(delta)


def pack(delta: Tensor, mask_bits: Tensor) -> tuple[Tensor, Tensor]:
    """The masked entries of `delta` [d_out, d_in]: values [nnz] in its dtype, row_ptr [d_out + 1].

    mask_bits int32 [d_out, W]. Entries outside the mask are dropped.
    """
    values, row_ptr = resolve("pack", delta)(delta.detach(), mask_bits)
    return values, row_ptr


def unpack(mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> Tensor:
    """One shard's delta [d_out, d_in] in the dtype of `values`, zero outside the mask.

    mask_bits int32 [d_out, W]; row_ptr int64 [d_out + 1] may be a slice of a bank's: `values` is
    indexed by it as given.
    """
    result: Tensor = resolve("unpack", values)(mask_bits, values.detach(), row_ptr, d_in)
    return result


def ties_merge(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Merge fp32 deltas [d_out, d_in] by TIES: trim, elect the sign, disjoint mean.

    Of each delta's own *non-zero* entries the largest `density` share stays (every entry as large
    as the smallest of them, so ties stay); the sign of the weighted sum is elected, zero counting
    as plus; the weighted mean is taken over the entries that agree with it. weights >= 0, one a
    delta; density in (0, 1].
    """
    result: Tensor = resolve("ties_merge", deltas[0] if deltas else torch.empty(0))(
        [delta.detach() for delta in deltas], weights, density
    )
    return result
