from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.memory import (
    IndicatorRouter,
    KeyIndex,
    KeyRouter,
    PackedBank,
    Router,
    Shard,
    TokenKeys,
)
from wise_ext.memory.token_keys import WINDOW

MakeShard = Callable[..., Shard]
Draw = Callable[..., Tensor]
SHAPE = (6, 40)


def _indicator_router(make_shard: MakeShard, thresholds: list[float]) -> IndicatorRouter:
    shards = [make_shard(seed) for seed in range(len(thresholds))]
    return IndicatorRouter("layer", PackedBank.from_shards(shards, SHAPE), thresholds)


def _brute_indicators(router: IndicatorRouter, shards: list[Shard], a: Tensor) -> Tensor:
    return torch.stack([(a @ s.dense().T).norm(dim=-1).mean(0) for s in shards])


def _words(keys: Tensor) -> list[TokenKeys]:
    """A text of one word each."""
    return [TokenKeys(torch.tensor([i]), key.unsqueeze(0)) for i, key in enumerate(keys)]


def _key_index(keys: Tensor, shards: list[int], **options: object) -> KeyIndex:
    index = KeyIndex(keys.shape[1], **options)  # type: ignore[arg-type]
    index.add(_words(keys), shards, [f"edit-{i}" for i in range(len(keys))])
    return index


def _key_router(keys: Tensor, shards: list[int], radius: float, **options: object) -> KeyRouter:
    return KeyRouter("early", _key_index(keys, shards, **options), radius)


def _padded(rows: list[Tensor], lefts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths in one batch, pads poisoned, each after `left` pads."""
    batch = torch.full((len(rows), length, rows[0].shape[-1]), torch.nan)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        batch[i, left : left + len(row)] = row
        real[i, left : left + len(row)] = True
    return batch, real


def test_the_largest_indicator_then_its_own_threshold(make_shard: MakeShard, draw: Draw) -> None:
    shards = [make_shard(seed) for seed in range(3)]
    router = _indicator_router(make_shard, [0.0, 0.0, 0.0])
    a, real = draw(20, 4, 40), torch.ones(20, 4, dtype=torch.bool)
    wanted = torch.stack([_brute_indicators(router, shards, row) for row in a])
    torch.testing.assert_close(router.indicators(a, real), wanted)
    best = wanted.argmax(1)
    assert len(set(best.tolist())) == 3
    assert router.decide(a, real).route.tolist() == best.tolist()
    assert router.decide(a, real).route.dtype == torch.int32
    # Raising the threshold of one shard sends its rows to main memory, not to the runner-up.
    strict = _indicator_router(make_shard, [0.0, 1e9, 0.0])
    expected = [-1 if shard == 1 else shard for shard in best.tolist()]
    assert strict.decide(a, real).route.tolist() == expected


def test_an_indicator_at_its_threshold_goes_to_main(make_shard: MakeShard, draw: Draw) -> None:
    a, real = draw(1, 3, 40), torch.ones(1, 3, dtype=torch.bool)
    value = _indicator_router(make_shard, [0.0]).indicators(a, real).item()
    below = math.nextafter(value, 0.0) - 1e-6
    assert _indicator_router(make_shard, [value]).decide(a, real).route.item() == -1
    assert _indicator_router(make_shard, [below]).decide(a, real).route.item() == 0
    assert _indicator_router(make_shard, [-math.inf]).decide(a * 0, real).route.item() == 0


def test_a_score_at_the_radius_goes_to_main(draw: Draw) -> None:
    keys = draw(5, 16)
    a, real = draw(1, 3, 16, seed=1), torch.ones(1, 3, dtype=torch.bool)
    score, row = _key_router(keys, [0, 1, 2, 3, 4], 0.0).nearest(a, real)
    value = score.item()
    assert value > 0.1
    assert _key_router(keys, [0, 1, 2, 3, 4], value).decide(a, real).route.item() == -1
    assert (
        _key_router(keys, [0, 1, 2, 3, 4], value - 1e-6).decide(a, real).route.item() == row.item()
    )


def test_key_router_names_the_shard_of_the_best_edit(draw: Draw) -> None:
    keys = draw(12, 60)
    shards = [i % 4 for i in range(12)]
    router = _key_router(keys, shards, 0.6, background=_words(draw(40, 60, seed=1)))
    a = (keys + 0.05 * draw(12, 60, seed=2)).unsqueeze(1)
    assert router.decide(a, torch.ones(12, 1, dtype=torch.bool)).route.tolist() == shards
    far = draw(6, 1, 60, seed=3)
    assert router.decide(far, torch.ones(6, 1, dtype=torch.bool)).route.tolist() == [-1] * 6


def test_key_router_scores_as_the_index_does(draw: Draw) -> None:
    index = _key_index(draw(6, 60), [0] * 6, background=_words(draw(20, 60, seed=1)))
    queries = [TokenKeys(torch.zeros(n, dtype=torch.int64), draw(n, 60, seed=n)) for n in (1, 4, 9)]
    batch, real = _padded([q.activation for q in queries], [3, 0, 1], 12)
    score, row = KeyRouter("early", index, 0.5).nearest(batch, real)
    wanted = index.nearest(queries)
    torch.testing.assert_close(score, wanted[0])
    assert row.equal(wanted[1])


def test_key_router_reads_the_end_of_a_long_row(draw: Draw) -> None:
    keys = draw(3, 60)
    router = _key_router(keys, [0, 1, 2], 0.9)
    # Pads at either end and in the middle are no tokens.
    a = torch.full((2, 3 * WINDOW, 60), torch.nan)
    real = torch.zeros(2, 3 * WINDOW, dtype=torch.bool)
    places = torch.arange(2, 2 + 2 * (WINDOW + 1), 2)
    a[:, places], real[:, places] = draw(2, WINDOW + 1, 60, seed=1), True
    a[0, places[0]] = keys[1]
    a[1, places[1]] = keys[1]
    assert router.decide(a, real).route.tolist() == [-1, 1]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_rows_alone_equal_the_batch_whatever_the_pads(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, 40, generator=generator) for length, _ in sizes]
    batch, real = _padded(rows, [left for _, left in sizes], 9)
    shards = [_any_shard(s) for s in range(2)]
    keys = torch.randn(6, 40, generator=generator)
    routers: list[Router] = [
        IndicatorRouter("layer", PackedBank.from_shards(shards, SHAPE), [4.5, 4.5]),
        _key_router(keys, [0, 1, 0, 1, 0, 1], 0.1),
    ]
    for router in routers:
        assert isinstance(router, Router)
        together = router.decide(batch, real).route
        for i, row in enumerate(rows):
            alone = router.decide(row.unsqueeze(0), torch.ones(1, len(row), dtype=torch.bool)).route
            assert alone.tolist() == [together[i].item()]


def _any_shard(seed: int) -> Shard:
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) / 3
    return Shard.from_delta(delta, torch.full((6, 2), 255, dtype=torch.int32))


def test_a_row_without_real_tokens_goes_to_main(make_shard: MakeShard, draw: Draw) -> None:
    a, real = torch.full((2, 3, 40), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    a[1], real[1] = draw(3, 40), True
    assert _indicator_router(make_shard, [-math.inf]).decide(a, real).route.tolist() == [-1, 0]
    assert _key_router(draw(3, 40), [0, 0, 0], -1.0).decide(a, real).route.tolist() == [-1, 0]


def test_activations_that_overflow_go_to_main(draw: Draw) -> None:
    a, real = torch.full((1, 2, 40), torch.inf), torch.ones(1, 2, dtype=torch.bool)
    assert _key_router(draw(3, 40), [0, 0, 0], -1.0).decide(a, real).route.tolist() == [-1]


def test_nothing_stored_is_main_memory(draw: Draw) -> None:
    a, real = draw(3, 2, 40), torch.ones(3, 2, dtype=torch.bool)
    assert (
        IndicatorRouter("layer", PackedBank.from_shards([], SHAPE), [])
        .decide(a, real)
        .route.tolist()
        == [-1] * 3
    )
    assert KeyRouter("early", KeyIndex(40), 0.0).decide(a, real).route.tolist() == [-1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_decide_in_fp32(
    make_shard: MakeShard, draw: Draw, dtype: torch.dtype
) -> None:
    a, real = draw(4, 3, 40).to(dtype), torch.ones(4, 3, dtype=torch.bool)
    router = _indicator_router(make_shard, [0.0, 0.0])
    assert router.decide(a, real).route.equal(router.decide(a.float(), real).route)
    torch.testing.assert_close(router.indicators(a, real), router.indicators(a.float(), real))
    keyed = _key_router(draw(5, 40, seed=1), [0, 1, 2, 3, 4], 0.1)
    assert keyed.decide(a, real).route.equal(keyed.decide(a.float(), real).route)


def test_decisions_can_be_traced_whole(make_shard: MakeShard, draw: Draw) -> None:
    a, real = draw(4, 3, 40), torch.ones(4, 3, dtype=torch.bool)
    for router in (
        _indicator_router(make_shard, [3.0, 3.0]),
        _key_router(draw(5, 40, seed=1), [0, 1, 2, 3, 4], 0.1),
    ):
        traced = torch.compile(router.decide, fullgraph=True, backend="eager")
        assert traced(a, real).route.equal(router.decide(a, real).route)


def test_router_keeps_what_it_was_made_with(draw: Draw) -> None:
    keys = draw(4, 40)
    index = _key_index(keys[:2], [0, 1])
    router = KeyRouter("early", index, 0.2)
    a, real = keys.unsqueeze(1), torch.ones(4, 1, dtype=torch.bool)
    before = router.decide(a, real).route
    index.add(_words(keys)[2:], [2, 3], ["c", "d"])
    index.place([3, 2, 1, 0])
    assert router.decide(a, real).route.equal(before)
    assert KeyRouter("early", index, 0.2).decide(a, real).route.tolist() == [3, 2, 1, 0]


def test_thresholds_must_fit_the_bank(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="1 shards need as many thresholds"):
        IndicatorRouter("layer", PackedBank.from_shards([make_shard()], SHAPE), [1.0, 2.0])


@pytest.mark.parametrize("radius", [-1.0, 0.0, 0.3, 0.6, 0.99, 2.0])
def test_looking_at_scores_first_changes_no_decision(
    draw: Draw, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with many, few and no entries above the radius in one batch, ties among them."""
    keys = draw(40, 60)
    keys[20:] = keys[:20]
    router = _key_router(keys, list(range(40)), radius)
    a = draw(12, 5, 60, seed=1)
    a[:8, 2] = 2 * keys[5:13]
    real = torch.rand(12, 5, generator=torch.Generator().manual_seed(2)) < 0.8
    real[11] = False
    looked = router.decide(a, real)
    monkeypatch.setattr("wise_ext.memory.looks.at_hand", lambda values: False)
    for one, other in zip(looked, router.decide(a, real), strict=True):
        assert one.equal(other)
    if radius == 0.6:
        assert -1 in looked.route and (looked.route >= 20).any()  # the last of equals
