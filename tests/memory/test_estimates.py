"""Estimated indicators: how far they may be off, and that nothing is decided differently."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.memory import IndicatorRouter, PackedBank, Shard
from wise_ext.memory.estimates import DOUBT, LEVELS, Sketches, band, undecided

SHAPE = (48, 40)


def bank_of(make_shard: Callable[..., Shard], sizes: list[float]) -> PackedBank:
    """Shards whose indicators are about as large as these numbers say, relatively."""
    shards = [make_shard(seed, SHAPE) for seed in range(len(sizes))]
    for shard, size in zip(shards, sizes, strict=True):
        shard.values.mul_(size)
    return PackedBank.from_shards(shards, SHAPE)


def exact(low: Tensor, thresholds: Tensor) -> Tensor:
    best = low.argmax(-1)
    return torch.where(low.gather(1, best[:, None])[:, 0] > thresholds[best], best, -1)


@pytest.mark.parametrize("rows", LEVELS)
def test_a_band_holds_what_it_promises_and_hardly_more(rows: int) -> None:
    low, high = band(rows)
    x = torch.linspace(1e-4, 8, 800_000, dtype=torch.float64)
    density = ((rows - 1) * x.log() - rows * x.square() / 2).softmax(0)
    below, above = float(density[x < low].sum()), float(density[x > high].sum())
    assert 1e-3 * DOUBT < below < DOUBT and 1e-3 * DOUBT < above < DOUBT


def test_more_rows_bound_closer() -> None:
    bands = [band(rows) for rows in LEVELS]
    assert all(one.low < two.low < 1 for one, two in pairwise(bands))
    assert all(one.high > two.high > 1 for one, two in pairwise(bands))


def test_a_projection_estimates_without_bias(make_shard: Callable[..., Shard]) -> None:
    bank = bank_of(make_shard, [1.0, 3.0])
    x = torch.randn(200, SHAPE[1], generator=torch.Generator().manual_seed(1))
    rows = torch.arange(200, dtype=torch.int32)
    for shard in range(2):
        norms = bank.side_norm(x, rows, torch.full_like(rows, shard))
        found = []
        for seed in range(40):
            parts = Sketches(bank, seed).held().values()
            products = torch.cat([x @ part[shard].T for part in parts], 1)
            assert products.shape[1] == LEVELS[-1]
            found.append(products.norm(dim=1) / math.sqrt(LEVELS[-1]) / norms)
        ratios = torch.stack(found)
        assert abs(float(ratios.square().mean()) - 1) < 0.01
        low, high = band(LEVELS[-1])
        assert low < float(ratios.min()) and float(ratios.max()) < high


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_left_open_decides_as_everything_does(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 5))
    numbers = st.floats(0, 4, width=16)
    row = st.lists(numbers, min_size=k, max_size=k)
    low = torch.tensor([data.draw(row)], dtype=torch.float32)
    spread = torch.tensor([data.draw(row)], dtype=torch.float32)
    part = torch.tensor([data.draw(st.lists(st.floats(0, 1, width=16), min_size=k, max_size=k))])
    thresholds = torch.tensor(data.draw(row), dtype=torch.float32)
    true = low + part * spread
    still = undecided(low, low + spread, thresholds)
    assert exact(torch.where(still, true, low), thresholds) == exact(true, thresholds)


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 1.0, 1.01], [1.0, 2.0, 8.0, 0.5], [5.0] * 7])
@pytest.mark.parametrize("share", [0.2, 0.9, 1.0, 1.1, 6.0])
def test_the_same_routes_with_and_without(
    make_shard: Callable[..., Shard], sizes: list[float], share: float
) -> None:
    """Thresholds all over the place, prompts of one to nine tokens, pads, rows that overflow."""
    bank = bank_of(make_shard, sizes)
    draw = torch.Generator().manual_seed(3)
    a = torch.randn(120, 9, SHAPE[1], generator=draw)
    real = torch.rand(120, 9, generator=draw) < 0.6
    real[::17] = False
    a[~real] = torch.nan
    a[5][real[5]] = torch.inf
    a[6][real[6]] = torch.nan
    usual = IndicatorRouter("", bank, [0.0] * len(sizes)).indicators(a, real)
    typical = usual[usual.isfinite().all(1) & real.any(1)].mean(0)
    thresholds = (share * typical).tolist()
    off = IndicatorRouter("", bank, thresholds, estimate=False)
    on = IndicatorRouter("", bank, thresholds, estimate=True)
    wanted = off.decide(a, real).route
    assert torch.equal(on.decide(a, real).route, wanted)
    assert on.pairs == int(real.sum()) * len(sizes) and off.pairs == 0
    if share == 6.0:
        assert (wanted[7:] == -1).all() and on.exact < 0.1 * on.pairs
    if share == 1.0:
        assert on.exact > 0 and -1 in wanted and (wanted >= 0).any()
    if share == 0.2 and sizes[-1] == 8.0:  # a runner-up far behind
        assert on.exact < 0.1 * on.pairs


def test_a_traced_decision_works_everything_out(make_shard: Callable[..., Shard]) -> None:
    bank = bank_of(make_shard, [1.0, 2.0])
    on = IndicatorRouter("", bank, [9.0, 9.0], estimate=True)
    a, real = torch.randn(4, 3, SHAPE[1]), torch.ones(4, 3, dtype=torch.bool)
    traced = torch.compile(on.decide, fullgraph=True, backend="eager")
    assert torch.equal(traced(a, real).route, on.decide(a, real).route)


def test_estimates_are_for_large_shards_and_follow_the_memory(
    make_shard: Callable[..., Shard],
) -> None:
    small = bank_of(make_shard, [1.0])
    assert IndicatorRouter("", small, [1.0]).sketches is None
    delta = torch.ones(LEVELS[-1] + 1, 8)
    mask = torch.full((LEVELS[-1] + 1, 1), 255, dtype=torch.int32)
    large = Shard.from_delta(delta, mask)
    router = IndicatorRouter("", PackedBank.from_shards([large], (LEVELS[-1] + 1, 8)), [1.0])
    assert router.sketches is not None and router.sketches.held()["level_0"].shape == (1, 16, 8)
    grown = IndicatorRouter("", PackedBank.from_shards([large] * 2, large.shape), [1.0, 2.0])
    router.become(grown)
    assert router.sketches is grown.sketches
