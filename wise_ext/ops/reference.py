"""Every op in plain torch: the oracle of the tests and the fallback where nothing native is there.

Device-agnostic. Half precision is accumulated in float32, float64 in float64. The shards that
occur in a call are read on the host, so on a GPU these synchronise once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.ops import checks, train_checks

# Stored entries that `max_sim` compares at a time, so that long prompts stay small.
_ENTRIES = 512


def bits_to_bool(mask_bits: Tensor, d_in: int) -> Tensor:
    """int32 [..., W] mask words to bool [..., d_in]; bit j of word w is column 32*w + j."""
    shifts = torch.arange(32, device=mask_bits.device, dtype=torch.int32)
    bits = (mask_bits.unsqueeze(-1) >> shifts) & 1
    return bits.bool().flatten(-2)[..., :d_in]


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _occurring(index: Tensor) -> list[int]:
    found: list[int] = torch.unique(index).tolist()
    return found


def _dense(op: str, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> Tensor:
    """One shard's [d_out, d_in] delta; its values start where `row_ptr` says, not at 0."""
    chosen = bits_to_bool(mask_bits, d_in)
    checks.pointers_fit(op, row_ptr, chosen.sum(1), values.shape[0])
    dense = torch.zeros(chosen.shape, dtype=values.dtype, device=values.device)
    if len(row_ptr) > 1:
        dense.masked_scatter_(chosen, values[int(row_ptr[0]) : int(row_ptr[-1])])
    return dense


def _shard(
    op: str, shard: int, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int
) -> Tensor:
    d_out = mask_bits.shape[1]
    pointers = row_ptr[shard * d_out : (shard + 1) * d_out + 1]
    return _dense(op, mask_bits[shard], values, pointers, d_in)


def add_side_(
    y: Tensor, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor
) -> None:
    """`wise_ext.ops.add_side_`: y[n] += D_route[n] x[n]."""
    op = "add_side_"
    checks.side(op, y, x, mask_bits, values, row_ptr, route)
    k = mask_bits.shape[0]
    checks.in_range(op, "route", route, -1, k - 1)
    wide = _accumulator(x, y, values)
    for shard in _occurring(route):
        if shard < 0:
            continue
        rows = (route == shard).nonzero().squeeze(1)
        delta = _shard(op, shard, mask_bits, values, row_ptr, x.shape[1]).to(wide)
        y[rows] = (y[rows].to(wide) + x[rows].to(wide) @ delta.T).to(y.dtype)


def add_side_backward(
    grad: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor, d_in: int
) -> Tensor:
    """Its gradient in x: D_route[n]^T grad[n], wide [N, d_in]."""
    op = "add_side_backward"
    wide = _accumulator(grad, values)
    grad_x = torch.zeros(grad.shape[0], d_in, dtype=wide, device=grad.device)
    for shard in _occurring(route):
        if shard < 0:
            continue
        rows = (route == shard).nonzero().squeeze(1)
        delta = _shard(op, shard, mask_bits, values, row_ptr, d_in).to(wide)
        grad_x[rows] = grad[rows].to(wide) @ delta
    return grad_x


def add_low_rank_(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
) -> None:
    """`wise_ext.ops.add_low_rank_`: y[n] += left_e^T (right_e x[n]), e = route[n]."""
    op = "add_low_rank_"
    checks.low_rank(op, y, x, left, right, rank_ptr, route)
    checks.ranks_fit(op, rank_ptr, left.shape[0])
    checks.in_range(op, "route", route, -1, rank_ptr.shape[0] - 2)
    wide = _accumulator(x, y, left)
    for entry in _occurring(route):
        if entry < 0:
            continue
        first, last = rank_ptr[entry : entry + 2].tolist()
        if first == last:
            continue
        rows = (route == entry).nonzero().squeeze(1)
        inner = x[rows].to(wide) @ right[first:last].to(wide).T
        y[rows] = (y[rows].to(wide) + inner @ left[first:last].to(wide)).to(y.dtype)


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    route: Tensor,
) -> Tensor:
    """`wise_ext.ops.dual_linear`: linear, then `add_side_`."""
    checks.linear("dual_linear", x, weight, bias)
    y = F.linear(x, weight, bias)
    add_side_(y, x, mask_bits, values, row_ptr, route)
    return y


def side_norm(
    x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, rows: Tensor, shards: Tensor
) -> Tensor:
    """`wise_ext.ops.side_norm`: ||D_shard x_row||_2 for each pair (Eq. 3)."""
    op = "side_norm"
    checks.pairs(op, x, mask_bits, values, row_ptr, rows, shards)
    checks.in_range(op, "rows", rows, 0, x.shape[0] - 1)
    checks.in_range(op, "shards", shards, 0, mask_bits.shape[0] - 1)
    wide = _accumulator(x, values)
    norms = torch.zeros(rows.shape[0], dtype=wide, device=x.device)
    for shard in _occurring(shards):
        pair = (shards == shard).nonzero().squeeze(1)
        delta = _shard(op, shard, mask_bits, values, row_ptr, x.shape[1]).to(wide)
        norms[pair] = (x[rows[pair].long()].to(wide) @ delta.T).norm(dim=1)
    return norms


def sketch_norm(x: Tensor, sketch: Tensor) -> Tensor:
    """`wise_ext.ops.sketch_norm`: ||S_shard x_row||_2 for every row and shard."""
    checks.sketch("sketch_norm", x, sketch)
    wide = _accumulator(x, sketch)
    k, rank, d_in = sketch.shape
    projected = x.to(wide) @ sketch.to(wide).reshape(k * rank, d_in).T
    norms: Tensor = projected.view(x.shape[0], k, rank).norm(dim=-1)
    return norms


def max_sim(
    query: Tensor, keys: Tensor, scales: Tensor, places: Tensor, weights: Tensor, floor: float
) -> Tensor:
    """`wise_ext.ops.max_sim`: weighted sums of the best cosines, nothing left out early."""
    op = "max_sim"
    checks.entries(op, query, keys, scales, places, weights)
    if places.device.type == "cpu":
        checks.in_range(op, "places", places, -1, keys.shape[0] - 1)
    batch, tokens = query.shape[:2]
    count = places.shape[0]
    if not (tokens and len(keys)):
        return query.new_zeros(batch, count)
    query = torch.where(query.isfinite(), query, torch.nan).flatten(0, 1)
    parts = [query.new_zeros(batch, 0)]
    for start in range(0, count, _ENTRIES):
        chosen = places[start : start + _ENTRIES]
        counts = torch.where(chosen >= 0, weights[start : start + _ENTRIES], 0.0)
        rows = chosen.clamp(min=0).flatten().long()
        cosines = query @ (keys[rows].float() * scales[rows].unsqueeze(1)).T
        best = cosines.view(batch, tokens, len(rows)).amax(1).clamp(min=0)
        parts.append((best.view(batch, *chosen.shape) * counts).sum(-1))
    scores = torch.cat(parts, dim=1)
    return torch.where(scores <= floor, 0.0, scores)


def dual_linear_train(
    x: Tensor, base: Tensor, delta: Tensor, mask_bits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`wise_ext.ops.dual_linear_train`; also returns s, which the backward needs."""
    op = "dual_linear_train"
    train_checks.train(op, x, delta, mask_bits)
    train_checks.activations(op, "base", base, x.shape[0], delta.shape[0])
    wide = _accumulator(x, base, delta)
    side = x.to(wide) @ delta.to(wide).T
    return (base.to(wide) + side).to(base.dtype), side, side.norm(dim=1)


def dual_linear_train_backward(
    grad_y: Tensor,
    grad_indicator: Tensor,
    x: Tensor,
    delta: Tensor,
    mask_bits: Tensor,
    side: Tensor,
    indicator: Tensor,
    need_x: bool,
    need_delta: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in x and delta (masked); an empty tensor where not asked for."""
    op = "dual_linear_train_backward"
    train_checks.train_backward(op, grad_y, grad_indicator, x, delta, mask_bits, side, indicator)
    wide = side.dtype
    # d||s||/ds = s/||s||; at s = 0 the zero vector is a subgradient.
    scale = torch.where(indicator > 0, grad_indicator.to(wide) / indicator, 0.0)
    grad_side = grad_y.to(wide) + scale.unsqueeze(1) * side
    grad_x, grad_delta = x.new_empty(0), delta.new_empty(0)
    if need_x:
        grad_x = (grad_side @ delta.to(wide)).to(x.dtype)
    if need_delta:
        chosen = bits_to_bool(mask_bits, delta.shape[1])
        grad_delta = (grad_side.T @ x.to(wide)).masked_fill_(~chosen, 0.0).to(delta.dtype)
    return grad_x, grad_delta


def masked_update_(
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
    """`wise_ext.ops.masked_update_`: SGD or Adam on masked entries only."""
    op = "masked_update_"
    train_checks.update(op, delta, grad, mask_bits, row_ptr, m, v, step)
    chosen = bits_to_bool(mask_bits, delta.shape[1])
    gradient, current = grad[chosen], delta[chosen]
    train_checks.packed_states(op, row_ptr, chosen.sum(1), m)
    if m is None or v is None:
        current -= lr * gradient
    else:
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).add_(gradient * gradient, alpha=1 - beta2)
        scale = v.div(1 - beta2**step).sqrt_().add_(eps)
        current -= lr * (m / (1 - beta1**step)) / scale
    delta.masked_scatter_(chosen, current.clamp_(-clamp, clamp))


def pack(delta: Tensor, mask_bits: Tensor) -> tuple[Tensor, Tensor]:
    """`wise_ext.ops.pack`: masked entries in row-major order, and their offsets."""
    op = "pack"
    checks.packable(op, delta, mask_bits)
    chosen = bits_to_bool(mask_bits, delta.shape[1])
    row_ptr = torch.zeros(delta.shape[0] + 1, dtype=torch.int64, device=delta.device)
    torch.cumsum(chosen.sum(1), 0, out=row_ptr[1:])
    return delta[chosen], row_ptr


def unpack(mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> Tensor:
    """`wise_ext.ops.unpack`: the dense delta of one shard."""
    checks.unpackable("unpack", mask_bits, values, row_ptr, d_in)
    return _dense("unpack", mask_bits, values, row_ptr, d_in)


def ties_merge(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """`wise_ext.ops.ties_merge`: trim, elect, disjoint mean."""
    checks.ties("ties_merge", deltas, weights, density)
    trimmed = []
    for delta in deltas:
        magnitude = delta.abs().flatten()
        nonzero = int(torch.count_nonzero(magnitude))
        if nonzero == 0:
            trimmed.append(delta)
            continue
        keep = checks.kept(density, nonzero)
        # kthvalue counts from the smallest.
        least = torch.kthvalue(magnitude, magnitude.numel() - keep + 1).values
        trimmed.append(torch.where(delta.abs() >= least, delta, 0.0))
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(trimmed, weights, strict=True):
        total += delta * weight
    positive = total >= 0
    numerator, denominator = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        numerator += torch.where(agrees, delta * weight, 0.0)
        denominator += torch.where(agrees, weight, 0.0)
    return torch.where(denominator > 0, numerator / denominator, 0.0)
