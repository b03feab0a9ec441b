"""Least squares in float64: Cholesky factors, with a way out where there is none, no inverses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What is added to the diagonal, relative to its mean, until there is a Cholesky factor.
_JITTERS = (0.0, 1e-12, 1e-10, 1e-8)


class Factors(NamedTuple):
    """A delta ``left^T right``: [r, d_out] and [r, d_in], fp64."""

    left: Tensor
    right: Tensor


def least_delta(keys: Tensor, shifts: Tensor, ridge: float) -> Factors:
    """The smallest delta that turns keys into shifts.

    ``argmin_D sum_t ||D k_t - s_t||^2 + lambda ||D||_F^2 = S^T (K K^T + lambda I)^-1 K`` with a key
    a row of K (ridge regression), of which only the tokens with a shift make directions of their
    own.

    Args:
        keys: [t, d_in]: the keys of all tokens of a text.
        shifts: [t, d_out]: what is to come of them; zero where nothing is.
        ridge: lambda, in mean squared norms of the keys.
    """
    k, s = keys.double(), shifts.double()
    gram = k @ k.T
    # The first token's activation is often far larger than any other's.
    scale = gram.diagonal().median()
    live = s.abs().amax(1) > 0
    chosen = torch.eye(len(k), dtype=k.dtype, device=k.device)[:, live]
    weights = solve_symmetric(gram + ridge * scale * torch.eye(len(k), device=k.device), chosen)
    return Factors(s[live], weights.T @ k)


def memit_delta(keys: Tensor, residuals: Tensor, moment: Tensor, weight: float) -> Tensor:
    """MEMIT's update (arXiv 2210.07229, Eqs. 14 and 15), ``R K^T (lambda C + K K^T)^-1``: of all
    deltas the one with the least ``lambda tr(D C D^T) + ||D K - R||_F^2``.

    Args:
        keys: [n, d_in], the columns of K.
        residuals: [n, d_out], the columns of R: what the keys are to give in addition.
        moment: [d_in, d_in]: C, the mean of ``k k^T`` over keys to leave alone.
        weight: lambda: as how many keys C counts.

    Returns:
        fp64 [d_out, d_in].
    """
    k, r = keys.double(), residuals.double()
    return r.T @ solve_symmetric(weight * moment.double() + k.T @ k, k.T).T


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """The projector onto directions in which there are hardly any keys (AlphaEdit, arXiv
    2410.02355, Sec. 3.2): ``P = U U^T`` of the eigenvectors U of C with eigenvalues below a bound.

    Args:
        moment: [d_in, d_in]: C, the mean of ``k k^T``, of which the paper takes the sum; as its
            published code does.
        threshold: absolute, in squared units of a key's entry.

    Returns:
        fp64 [d_in, d_in], symmetric; of rank 0 where no eigenvalue is so small.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    chosen: Tensor = vectors[:, values < threshold]
    return chosen @ chosen.T


def alphaedit_delta(
    keys: Tensor, residuals: Tensor, projector: Tensor, past: Tensor, ridge: float
) -> Tensor:
    """AlphaEdit's update (arXiv 2410.02355, Eq. 14),
    ``R K^T P (K_p K_p^T P + K K^T P + lambda I)^-1``, the paper's lambda being 1.

    It is computed as ``R ((P (K_p K_p^T + K K^T) P + lambda I)^-1 P K)^T``, the same matrix by the
    push-through identity, whose factor is symmetric.

    Args:
        keys: [n, d_in], the columns of K.
        residuals: [n, d_out], the columns of R.
        projector: [d_in, d_in]: P, as ``null_space`` gives it.
        past: [d_in, d_in]: ``K_p K_p^T``, the sum over keys of earlier edits, whose outputs are to
            stay.
        ridge: lambda.

    Returns:
        fp64 [d_out, d_in]; it maps whatever P maps to zero to zero.
    """
    k, r, p = keys.double(), residuals.double(), projector.double()
    inner = p @ (past.double() + k.T @ k) @ p
    inner.diagonal().add_(ridge)
    return r.T @ (p @ solve_symmetric(inner, p @ k.T)).T


def rank_one(key: Tensor, value_error: Tensor, moment: Tensor) -> Tensor:
    """ROME's update (arXiv 2202.05262, Eq. 2), ``(v* - W k) (C^-1 k)^T / ((C^-1 k)^T k)``: of all
    deltas with ``(W + D) k = v*`` the one with the least ``tr(D C D^T)``.

    Args:
        key: [d_in]: k.
        value_error: [d_out]: ``v* - W k``.
        moment: [d_in, d_in]: C, the mean of ``k k^T`` over keys to leave alone.

    Returns:
        fp64 [d_out, d_in], of rank one.
    """
    k = key.double()
    direction = solve_symmetric(moment.double(), k[:, None])[:, 0]
    return torch.outer(value_error.double(), direction) / (direction @ k)


def solve_symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``A^-1 B`` for a symmetric positive (semi-)definite A.

    Args:
        a: fp64 [n, n].
        b: fp64 [n, m].

    Returns:
        fp64 [n, m]; where A is singular to working precision, the least-squares solution.
    """
    scale = a.diagonal().mean()
    for jitter in _JITTERS:
        moved = a + jitter * scale * torch.eye(len(a), dtype=a.dtype, device=a.device)
        factor, failed = torch.linalg.cholesky_ex(moved)
        if not int(failed):
            return torch.cholesky_solve(b, factor)
    values, vectors = torch.linalg.eigh(a)
    kept = values > values.abs().max() * len(a) * torch.finfo(a.dtype).eps
    inverse = torch.where(kept, 1 / values.where(kept, values.new_ones(())), 0.0)
    solution: Tensor = vectors @ (inverse[:, None] * (vectors.T @ b))
    return solution
