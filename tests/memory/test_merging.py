from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import METHODS, merge

# Multiples of 1/8: sums and products are exact, so that no sign hangs on a rounding.
numbers = st.one_of(st.just(0.0), st.integers(-24, 24).map(lambda n: n / 8))
weight = st.sampled_from([0.25, 0.5, 1.0, 2.0])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[float], float]:
    rows, columns, count = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    size = rows * columns
    deltas = [
        torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size))).view(rows, columns)
        for _ in range(count)
    ]
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return deltas, weights, draw(st.sampled_from([0.1, 0.25, 0.53, 0.9, 1.0]))


def trimmed(delta: Tensor, density: float) -> Tensor:
    sizes = sorted((abs(v) for v in delta.flatten().tolist() if v != 0.0), reverse=True)
    if not sizes:
        return delta
    smallest = sizes[math.ceil(density * len(sizes)) - 1]
    return torch.where(delta.abs() >= smallest, delta, 0.0)


def elected(deltas: list[Tensor], weights: list[float]) -> Tensor:
    merged = torch.zeros_like(deltas[0])
    for place in range(merged.numel()):
        pairs = [(float(d.flatten()[place]), w) for d, w in zip(deltas, weights, strict=True)]
        positive = sum(v * w for v, w in pairs) >= 0.0
        agreeing = [(v, w) for v, w in pairs if v != 0.0 and (v > 0.0) == positive]
        if agreeing:
            mean = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing)
            merged.view(-1)[place] = mean
    return merged


def summed(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([d * w for d, w in zip(deltas, weights, strict=True)]).sum(0)


@given(problems())
def test_ties_linear_sign_magnitude_match_their_definitions(
    problem: tuple[list[Tensor], list[float], float],
) -> None:
    deltas, weights, density = problem
    before = [delta.clone() for delta in deltas]
    cut = [trimmed(delta, density) for delta in deltas]
    expected = {
        "ties": elected(cut, weights),
        "sign": elected(deltas, weights),
        "linear": summed(deltas, weights),
        "magnitude": summed(cut, weights),
    }
    for method, wanted in expected.items():
        merged = merge(deltas, method, weights, density)
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-6)
    assert all(delta.equal(old) for delta, old in zip(deltas, before, strict=True))


@given(problems(), st.integers(0, 1000))
def test_dare_drops_and_rescales(
    problem: tuple[list[Tensor], list[float], float], seed: int
) -> None:
    deltas, weights, density = problem
    # One delta with weight one is the dropping alone.
    for delta in deltas:
        kept = merge([delta], "dare", [1.0], density, seed)
        scaled = delta / density
        assert bool(((kept == 0.0) | (kept - scaled).abs().le(1e-5)).all())
        assert merge([delta], "dare", [1.0], 1.0, seed).equal(delta)
    assert merge(deltas, "dare", weights, density, seed).equal(
        merge(deltas, "dare", weights, density, seed)
    )
    torch.testing.assert_close(
        merge(deltas, "dare", weights, 1.0, seed), summed(deltas, weights), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        merge(deltas, "dare_ties", weights, 1.0, seed), merge(deltas, "sign", weights)
    )


def test_dare_keeps_the_mean_and_depends_on_the_seed() -> None:
    ones = torch.ones(300, 300)
    kept = merge([ones], "dare", [1.0], 0.25, seed=3)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # 90,000 draws: the mean has a standard deviation of 0.006.
    assert abs(kept.mean().item() - 1.0) < 0.03
    assert not kept.equal(merge([ones], "dare", [1.0], 0.25, seed=4))
    # The deltas of one merge are dropped independently of one another.
    both = merge([ones, ones], "dare", [1.0, 1.0], 0.25, seed=3)
    assert set(both.unique().tolist()) == {0.0, 4.0, 8.0}


def test_dare_ties_elects_among_what_was_kept() -> None:
    first, second = torch.full((50, 50), 2.0), torch.full((50, 50), -1.0)
    merged = merge([first, second], "dare_ties", density=0.5, seed=1)
    # Both kept: +2 outweighs -1. One kept: that one. None: nothing.
    assert set(merged.unique().tolist()) == {-2.0, 0.0, 4.0}


def test_ties_is_not_a_no_op_on_sparse_deltas() -> None:
    sparse = torch.zeros(1, 10)
    sparse[0, :2] = torch.tensor([1.0, 3.0])
    assert merge([sparse], "ties", density=0.5).tolist() == [[0, 3.0, 0, 0, 0, 0, 0, 0, 0, 0]]


@given(st.floats(0.05, 0.95), st.integers(0, 50))
def test_slerp_follows_the_great_circle(t: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(4, 5, generator=generator) for _ in range(2))
    start, end = start / start.norm(), end / end.norm()
    merged = merge([start, end], "slerp", [1 - t, t])
    assert merged.norm().item() == pytest.approx(1.0, abs=1e-5)
    whole = math.acos(float((start * end).sum()))
    part = math.acos(max(-1.0, min(1.0, float((start * merged).sum()))))
    assert part == pytest.approx(t * whole, abs=2e-3)


def test_slerp_where_the_circle_is_not_defined() -> None:
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    torch.testing.assert_close(merge([ones, 3 * ones], "slerp"), 2 * ones)
    torch.testing.assert_close(merge([ones, zeros], "slerp"), 0.5 * ones)
    torch.testing.assert_close(merge([ones, -ones], "slerp"), zeros)
    assert merge([ones], "slerp").equal(ones)
    assert merge([ones, 5 * ones], "slerp", [1.0, 0.0]).equal(ones)
    torch.testing.assert_close(merge([ones, 5 * ones], "slerp", [0.0, 1.0]), 5 * ones)


def test_slerp_folds_in_one_after_the_other() -> None:
    first, second, third = torch.eye(9).view(9, 3, 3)[:3]
    # Half way from the first to the second, then a third of the right angle to the third.
    merged = merge([first, second, third], "slerp").flatten()[:3]
    wanted = [math.cos(math.pi / 6) / math.sqrt(2)] * 2 + [math.sin(math.pi / 6)]
    torch.testing.assert_close(merged, torch.tensor(wanted))


@pytest.mark.parametrize("method", METHODS)
def test_one_delta_of_any_dtype_is_itself(method: str) -> None:
    delta = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = merge([delta], method, density=1.0)
    assert merged.equal(delta.float())


def test_default_weights_are_equal() -> None:
    first, second = torch.full((1, 2), 2.0), torch.full((1, 2), 4.0)
    assert merge([first, second], "linear").tolist() == [[3.0, 3.0]]
    assert merge([first, second], "ties", density=1.0).tolist() == [[3.0, 3.0]]


def test_bad_arguments() -> None:
    delta = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="unknown merge method 'mean': choose one of ties"):
        merge([delta], "mean")
    for density in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="merge density"):
            merge([delta], "ties", density=density)
    with pytest.raises(ConfigError, match="2 deltas need 2 merge weights, got 1"):
        merge([delta, delta], "linear", [1.0])
    for weights in ([0.0, 0.0], [-1.0, 2.0], [math.inf, 1.0]):
        with pytest.raises(ConfigError, match="merge weights must be"):
            merge([delta, delta], "linear", weights)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], "ties")
    with pytest.raises(ValueError, match="of one shape"):
        merge([delta, torch.ones(2, 3)], "ties")
