"""Merging the deltas of several shards into one.

With ``v_i`` the deltas, ``w_i`` their weights and ``density`` the share kept:

=============  =====================================================================================
``ties``       trim each to its largest ``density`` share of *non-zero* entries, elect a sign an
               entry by the weighted sum, average the entries that agree (arXiv 2306.01708)
``linear``     ``sum w_i v_i``
``slerp``      along the great circle through the deltas; several are folded in one by one
``sign``       ``ties`` without the trim
``magnitude``  the trim of ``ties``, then ``linear``
``dare``       drop entries at random, keep a share ``density``, scale the rest up by its inverse,
               then ``linear`` (arXiv 2311.03099)
``dare_ties``  ``dare``'s dropping, then ``sign``
=============  =====================================================================================

Shards at 20 % density overlap little. ``linear`` with its default weights ``1 / n`` therefore
shrinks most entries; the averages of ``ties``, ``sign`` and ``dare_ties`` run only over the deltas
that have something to say at an entry, and keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.errors import ConfigError
from wise_ext.memory.randomness import BitStream

DEFAULT_DENSITY = 0.53


def merge(
    deltas: Sequence[Tensor],
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
) -> Tensor:
    """Merge deltas into one.

    Args:
        deltas: at least one; fp32, bf16 or fp16 ``[d_out, d_in]``, all of one shape and device.
        method: one of ``METHODS``; the module's table says what each does.
        weights: one number >= 0 a delta, not all zero; ``None`` is ``1 / n`` each. ``linear``,
            ``magnitude`` and ``dare`` use them as they are (all ones: a plain sum); for the
            others only their proportions count.
        density: share of non-zero entries to keep, above 0 and up to 1 (``ties``, ``magnitude``,
            ``dare``, ``dare_ties``).
        seed: of the random dropping (``dare``, ``dare_ties``).

    Returns:
        fp32 ``[d_out, d_in]``; the arguments are not changed.

    Raises:
        ConfigError: unknown method, weights or density out of range.
        ValueError: no delta, or deltas of different shapes.
    """
    if method not in _METHODS:
        raise ConfigError(f"unknown merge method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"merge density is {density}: give a number above 0 and up to 1")
    if not deltas:
        raise ValueError("there is nothing to merge: give at least one delta")
    shapes = [tuple(delta.shape) for delta in deltas]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"deltas must all be [d_out, d_in] of one shape, got {shapes}")
    shares = _weights(weights, len(deltas))
    with torch.no_grad():
        tensors = [delta.detach().float() for delta in deltas]
        return _METHODS[method](tensors, shares, density, seed)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ConfigError(f"{count} deltas need {count} merge weights, got {len(weights)}")
    if not all(math.isfinite(w) and w >= 0.0 for w in weights) or sum(weights) == 0.0:
        raise ConfigError(f"merge weights must be >= 0 and not all zero, got {list(weights)}")
    return [float(w) for w in weights]


def _ties(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    return ops.ties_merge(deltas, weights, density)


def _sign(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    return ops.ties_merge(deltas, weights, 1.0)


def _linear(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def _magnitude(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    # The merge of one delta alone is its trim.
    trimmed = [ops.ties_merge([delta], [1.0], density) for delta in deltas]
    return _linear(trimmed, weights, density, seed)


def _drop(deltas: list[Tensor], density: float, seed: int) -> list[Tensor]:
    kept = []
    for index, delta in enumerate(deltas):
        draws = BitStream(seed, index).bernoulli(delta.numel(), density)
        keep = torch.from_numpy(draws).view(delta.shape).to(delta.device)
        kept.append(torch.where(keep, delta / density, 0.0))
    return kept


def _dare(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    return _linear(_drop(deltas, density, seed), weights, density, seed)


def _dare_ties(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    return ops.ties_merge(_drop(deltas, density, seed), weights, 1.0)


def _slerp(deltas: list[Tensor], weights: list[float], density: float, seed: int) -> Tensor:
    """Fold the deltas in one by one, each with its share of the weight so far."""
    merged, so_far = deltas[0].clone(), weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        so_far += weight
        if weight > 0.0:
            merged = _slerp_pair(merged, delta, weight / so_far)
    return merged


def _slerp_pair(start: Tensor, end: Tensor, t: float) -> Tensor:
    norms = start.double().norm() * end.double().norm()
    cosine = float((start.double() * end.double()).sum() / norms) if float(norms) > 0.0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        # Parallel, opposite, or one of them zero: the circle is not defined, the chord is.
        return torch.lerp(start, end, t)
    to_start = math.sin((1.0 - t) * angle) / math.sin(angle)
    return start * to_start + end * (math.sin(t * angle) / math.sin(angle))


_METHODS: dict[str, Callable[[list[Tensor], list[float], float, int], Tensor]] = {
    "ties": _ties,
    "linear": _linear,
    "slerp": _slerp,
    "sign": _sign,
    "magnitude": _magnitude,
    "dare": _dare,
    "dare_ties": _dare_ties,
}
METHODS = tuple(_METHODS)
