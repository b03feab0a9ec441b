"""Closed forms against independent dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from wise_ext.editing.solving import (
    alphaedit_delta,
    least_delta,
    memit_delta,
    null_space,
    rank_one,
    solve_symmetric,
)

D_IN, D_OUT, N = 24, 10, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(keys: Tensor) -> Tensor:
    return keys.T @ keys / len(keys)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float64
    assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


# -- symmetric systems -----------------------------------------------------------------------------


def test_solve_symmetric() -> None:
    root = draw(D_IN, D_IN + 3)
    a, b = root @ root.T, draw(D_IN, 4, seed=1)
    close(solve_symmetric(a, b), torch.linalg.lstsq(a, b).solution)


def test_a_singular_system_has_a_least_squares_solution() -> None:
    """A right side within reach is reached, although no factor exists without help."""
    root = draw(D_IN, 6)
    a = root @ root.T
    b = a @ draw(D_IN, 3, seed=1)
    assert_close(a @ solve_symmetric(a, b), b, rtol=1e-6, atol=1e-6)


def test_an_indefinite_system_does_without_its_negative_part() -> None:
    """What rounding makes of a semi-definite matrix: no jitter helps, so its spectrum decides."""
    basis, _ = torch.linalg.qr(draw(4, 4))
    a = basis @ torch.diag(torch.tensor([4.0, 1.0, 0.0, -0.5], dtype=torch.float64)) @ basis.T
    b = draw(4, 2, seed=1)
    inverse = basis @ torch.diag(torch.tensor([0.25, 1.0, 0.0, 0.0], dtype=torch.float64)) @ basis.T
    close(solve_symmetric(a, b), inverse @ b)


# -- least_delta -----------------------------------------------------------------------------------


def test_least_delta_is_ridge_regression() -> None:
    keys, shifts = draw(8, D_IN), draw(8, D_OUT, seed=1)
    shifts[[0, 3, 4]] = 0
    ridge = 0.05
    left, right = least_delta(keys, shifts, ridge)
    assert left.shape == (5, D_OUT)
    assert right.shape == (5, D_IN)
    # As an ordinary least squares problem with the penalty for more equations.
    strength = ridge * (keys @ keys.T).diagonal().median()
    system = torch.cat([keys, strength.sqrt() * torch.eye(D_IN, dtype=torch.float64)])
    wanted = torch.cat([shifts, torch.zeros(D_IN, D_OUT, dtype=torch.float64)])
    close(left.T @ right, torch.linalg.lstsq(system, wanted).solution.T)


def test_least_delta_reproduces_shifts() -> None:
    """With hardly any ridge, each key gives its shift, also where there are none."""
    keys, shifts = draw(8, D_IN).float(), draw(8, D_OUT, seed=1).float()
    shifts[2] = 0
    left, right = least_delta(keys, shifts, 1e-9)
    assert_close(keys.double() @ (left.T @ right).T, shifts.double(), rtol=1e-5, atol=1e-5)


def test_least_delta_of_equal_keys() -> None:
    """Two tokens with one key want different things: the middle is what they get."""
    keys = draw(1, D_IN).repeat(2, 1)
    shifts = torch.stack([torch.ones(D_OUT), 3 * torch.ones(D_OUT)])
    left, right = least_delta(keys, shifts, 1e-9)
    assert_close(keys @ (left.T @ right).T, torch.full((2, D_OUT), 2.0).double())


# -- MEMIT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 20.0, 15_000.0])
def test_memit(weight: float) -> None:
    """Eq. 14 with dense inverses, R the residual that the layer has yet to give."""
    old, keys, values = draw(100, D_IN), draw(N, D_IN, seed=1), draw(N, D_OUT, seed=2)
    layer = draw(D_OUT, D_IN, seed=3)
    moment = moment_of(old)
    residuals = values - keys @ layer.T
    found = memit_delta(keys, residuals, moment, weight)
    k, r = keys.T, residuals.T
    close(found, r @ k.T @ torch.linalg.inv(weight * moment + k @ k.T))


def test_memit_is_the_least_squares_of_old_and_new_keys() -> None:
    """Eq. 11: the whole layer fitted anew to old and new associations, in one system."""
    old, keys, values = draw(100, D_IN), draw(N, D_IN, seed=1), draw(N, D_OUT, seed=2)
    old_values = old @ draw(D_IN, D_OUT, seed=4)
    layer = torch.linalg.lstsq(old, old_values).solution.T
    found = layer + memit_delta(keys, values - keys @ layer.T, moment_of(old), len(old))
    both = torch.linalg.lstsq(torch.cat([old, keys]), torch.cat([old_values, values])).solution.T
    close(found, both)


# -- AlphaEdit -------------------------------------------------------------------------------------


def preserved() -> tuple[Tensor, Tensor]:
    """Keys that span some dimensions only, and the projector onto the others."""
    old = draw(200, 9) @ draw(9, D_IN, seed=5)
    return old, null_space(moment_of(old), 1e-6)


def test_null_space() -> None:
    old, projector = preserved()
    close(projector, projector.T)
    close(projector @ projector, projector)
    assert torch.linalg.matrix_rank(projector) == D_IN - 9
    assert (old @ projector).abs().max() < 1e-10 * old.abs().max()


def test_the_threshold_is_absolute() -> None:
    moment = torch.diag(torch.tensor([3.0, 0.02, 0.0198, 0.0]))
    assert_close(null_space(moment, 0.0199).diagonal(), torch.tensor([0.0, 0, 1, 1]).double())
    assert not null_space(torch.eye(3), 0.5).any()


@pytest.mark.parametrize("ridge", [1.0, 10.0])
@pytest.mark.parametrize("with_past", [False, True])
def test_alphaedit(ridge: float, with_past: bool) -> None:
    """Eq. 14 as it stands, a general matrix inverted."""
    old, p = preserved()
    keys, residuals, earlier = draw(N, D_IN, seed=1), draw(N, D_OUT, seed=2), draw(7, D_IN, seed=3)
    past = earlier.T @ earlier * with_past
    found = alphaedit_delta(keys, residuals, p, past, ridge)
    k, r, eye = keys.T, residuals.T, torch.eye(D_IN, dtype=torch.float64)
    close(found, r @ k.T @ p @ torch.linalg.inv(past @ p + k @ k.T @ p + ridge * eye))
    assert (old @ found.T).abs().max() < 1e-9 * old.abs().max()


def test_alphaedit_minimises_eq_11() -> None:
    """||(D P) K - R||^2 + ||D P||^2 + ||(D P) K_p||^2, by least squares in coordinates of P."""
    _, p = preserved()
    keys, residuals, earlier = draw(N, D_IN, seed=1), draw(N, D_OUT, seed=2), draw(7, D_IN, seed=3)
    basis = torch.linalg.svd(p).U[:, : D_IN - 9]
    eye = torch.eye(D_IN - 9, dtype=torch.float64)
    system = torch.cat([keys @ basis, eye, earlier @ basis])
    wanted = torch.cat([residuals, torch.zeros(len(system) - N, D_OUT, dtype=torch.float64)])
    best = torch.linalg.lstsq(system, wanted).solution.T @ basis.T
    close(alphaedit_delta(keys, residuals, p, earlier.T @ earlier, 1.0), best)


# -- ROME ------------------------------------------------------------------------------------------


def test_rank_one() -> None:
    moment = moment_of(draw(100, D_IN))
    layer, key, value = draw(D_OUT, D_IN, seed=1), draw(D_IN, seed=2), draw(D_OUT, seed=3)
    delta = rank_one(key, value - layer @ key, moment)
    close((layer + delta) @ key, value)
    assert torch.linalg.matrix_rank(delta) == 1
    solved = torch.linalg.inv(moment) @ key
    close(delta, torch.outer((value - layer @ key) / (solved @ key), solved))


def test_rank_one_moves_old_keys_the_least() -> None:
    """Any other delta with W' k = v* is longer in the norm that C makes."""
    moment = moment_of(draw(100, D_IN))
    key, error = draw(D_IN, seed=2), draw(D_OUT, seed=3)
    delta = rank_one(key, error, moment)

    def norm(d: Tensor) -> float:
        return float((d @ moment @ d.T).trace())

    for seed in range(5):
        other = draw(D_OUT, D_IN, seed=10 + seed)
        other -= torch.outer(other @ key, key) / (key @ key)  # maps the key to zero
        for size in (1e-3, 1.0, -1.0):
            assert_close((delta + size * other) @ key, error)
            assert norm(delta + size * other) > norm(delta)
