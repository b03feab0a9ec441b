from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import KeyIndex, pool_tokens
from wise_ext.memory.key_index import fit_whitening

Draw = Callable[..., Tensor]


def _filled(keys: Tensor, **options: object) -> KeyIndex:
    index = KeyIndex(keys.shape[1], **options)  # type: ignore[arg-type]
    index.add(keys, list(range(len(keys))), [f"edit-{i}" for i in range(len(keys))])
    return index


@given(st.integers(2, 14), st.integers(1, 9), st.floats(0.01, 3.0), st.integers(0, 1000))
def test_whitening_is_the_inverse_square_root_in_both_regimes(
    n: int, d: int, ridge: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) * 3 + 1
    queries = torch.randn(5, d, generator=generator, dtype=torch.float64)
    cov = torch.cov(keys.T, correction=0).view(d, d)
    rho = ridge * cov.diagonal().mean()
    values, vectors = torch.linalg.eigh(cov + rho * torch.eye(d, dtype=torch.float64))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    wanted = (queries - keys.mean(0)) @ root
    got = fit_whitening(keys, ridge).apply(queries.float())
    torch.testing.assert_close(got, wanted.float(), rtol=2e-4, atol=2e-4)


def test_whitening_agrees_where_the_regimes_meet(draw: Draw) -> None:
    keys, queries = draw(8, 8), draw(3, 8, seed=1)
    whitened = [fit_whitening(k, 0.3).apply(queries) for k in (keys, torch.cat([keys, keys]))]
    torch.testing.assert_close(*whitened, rtol=1e-4, atol=1e-4)


def test_a_common_direction_does_not_decide(draw: Draw) -> None:
    # All prompts share a large component that varies; what tells them apart is small.
    common = draw(1, 64)
    keys = draw(20, 64, seed=1) * 0.05 + common * (1 + draw(20, 1, seed=2))
    background = draw(200, 64, seed=3) * 0.05 + common * (1 + draw(200, 1, seed=4))
    queries = keys + draw(20, 64, seed=5) * 0.01 + common * draw(20, 1, seed=6)
    index = _filled(keys, ridge=0.003, background=background)
    cosine, row = index.nearest(queries)
    assert row.tolist() == list(range(20))
    assert cosine.min().item() > 0.8
    strangers, _ = index.nearest(background[:50] + draw(50, 64, seed=7) * 0.01)
    assert strangers.max().item() < cosine.min().item()
    plain = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=-1)
    assert plain.argmax(1).tolist() != list(range(20))


def test_nearest_matches_brute_force_and_rows_stand_alone(draw: Draw) -> None:
    keys, queries = draw(30, 12), draw(17, 12, seed=1)
    index = _filled(keys, ridge=0.5, background=draw(9, 12, seed=2))
    cosine, row = index.nearest(queries)
    whitening = fit_whitening(draw(9, 12, seed=2), 0.5)
    table = torch.nn.functional.cosine_similarity(
        whitening.apply(queries)[:, None], whitening.apply(keys)[None], dim=-1
    )
    assert row.equal(table.argmax(1))
    torch.testing.assert_close(cosine, table.amax(1), rtol=1e-5, atol=1e-5)
    for i in range(17):
        alone, where = index.nearest(queries[i : i + 1])
        assert where.item() == row[i].item()
        torch.testing.assert_close(alone[0], cosine[i], rtol=1e-5, atol=1e-5)


def test_of_equal_keys_the_latest_wins(draw: Draw) -> None:
    keys = draw(6, 10)
    keys[4] = keys[1]
    assert _filled(keys).nearest(keys[1:2])[1].item() == 4
    assert _filled(keys[:4]).nearest(keys[1:2])[1].item() == 1


def test_adding_and_removing_renew_the_statistics(draw: Draw) -> None:
    keys, queries = draw(12, 20), draw(4, 20, seed=1)
    index = _filled(keys[:8])
    before = index.nearest(queries)[0]
    assert index.prepare() is index.prepare()
    index.add(keys[8:], [3, 3, 3, 3], ["late", "late", "other", "late"])
    assert not torch.allclose(index.nearest(queries)[0], before)
    assert index.remove("late") == 3
    assert index.remove("late") == 0
    assert index.remove("other") == 1
    # Exactly as if they had never been there.
    assert index.nearest(queries)[0].equal(before)
    assert index.keys.equal(keys[:8])
    assert index.shards.tolist() == list(range(8))


def test_with_a_background_no_edit_moves_anothers_distance(draw: Draw) -> None:
    keys, queries = draw(12, 20), draw(4, 20, seed=1)
    index = _filled(keys[:8], background=draw(30, 20, seed=2))
    before = index.nearest(queries)[0]
    index.add(keys[8:] - 50.0, [3, 3, 3, 3], ["far"] * 4)
    assert index.nearest(queries)[0].ge(before).all()
    torch.testing.assert_close(index.nearest(keys[:8])[0], torch.ones(8), rtol=0, atol=1e-5)
    assert index.remove("far") == 4
    assert index.nearest(queries)[0].equal(before)


def test_renumbering_moves_and_forgets(draw: Draw) -> None:
    index = _filled(draw(4, 5))
    index.renumber([1, -1, 0, 0])
    assert index.shards.tolist() == [1, 0, 0]
    assert index.ids == ["edit-0", "edit-2", "edit-3"]
    assert len(index.keys) == 3
    KeyIndex(5).renumber([])


def test_a_single_key_is_compared_as_it_is(draw: Draw) -> None:
    key, query = draw(1, 9), draw(2, 9, seed=1)
    wanted = torch.nn.functional.cosine_similarity(query, key)
    torch.testing.assert_close(_filled(key).nearest(query)[0], wanted)
    # Twice the same key has no statistics either.
    torch.testing.assert_close(_filled(key.repeat(2, 1)).nearest(query)[0], wanted)


def test_background_is_never_matched(draw: Draw) -> None:
    background = draw(40, 8)
    index = _filled(draw(3, 8, seed=1), background=background)
    _, row = index.nearest(background)
    assert set(row.tolist()) <= {0, 1, 2}


def test_projection_shortens_keys_and_keeps_their_neighbours(draw: Draw) -> None:
    keys = draw(50, 400)
    index = _filled(keys, projection=128, projection_seed=3)
    assert index.keys.shape == (50, 128)
    _, row = index.nearest(keys + 0.2 * draw(50, 400, seed=1))
    assert row.tolist() == list(range(50))
    again = _filled(keys, projection=128, projection_seed=3)
    assert again.keys.equal(index.keys)
    assert not _filled(keys, projection=128, projection_seed=4).keys.equal(index.keys)
    # Random signs keep lengths on average.
    ratio = index.keys.norm(dim=1) / keys.norm(dim=1)
    assert abs(ratio.mean().item() - 1.0) < 0.05


@pytest.mark.parametrize("projection", [0, 7])
def test_state_round_trip(draw: Draw, projection: int) -> None:
    index = _filled(draw(6, 20), ridge=0.7, background=draw(3, 20, seed=1), projection=projection)
    again = KeyIndex.from_state(index.state_tensors(), index.state_meta())
    assert again.state_meta() == index.state_meta()
    queries = draw(4, 20, seed=2)
    for new, old in zip(again.nearest(queries), index.nearest(queries), strict=True):
        assert new.equal(old)
    # Keys that arrive later go through the same projection.
    for each in (index, again):
        each.add(draw(1, 20, seed=3), [0], ["new"])
    assert again.keys.equal(index.keys)


def test_state_that_does_not_fit(draw: Draw) -> None:
    index = _filled(draw(3, 5))
    tensors, meta = index.state_tensors(), index.state_meta()
    with pytest.raises(ValueError, match=r"keys must be fp32 \[n, 5\]"):
        KeyIndex.from_state(tensors | {"keys": draw(3, 4)}, meta)
    with pytest.raises(ValueError, match="background must be fp32"):
        KeyIndex.from_state(tensors | {"background": draw(3, 5).double()}, meta)
    with pytest.raises(ValueError, match="one for each id"):
        KeyIndex.from_state(tensors, meta | {"ids": ["a"]})
    with pytest.raises(ValueError, match="2 keys for 3 ids"):
        KeyIndex.from_state(tensors | {"keys": draw(2, 5)}, meta)


def test_bad_arguments(draw: Draw) -> None:
    index = KeyIndex(5)
    with pytest.raises(ValueError, match=r"must be \[n, 5\], got \[2, 4\]"):
        index.add(draw(2, 4), [0, 0], ["a", "b"])
    with pytest.raises(ValueError, match="2 keys, 1 shards and 2 ids"):
        index.add(draw(2, 5), [0], ["a", "b"])
    with pytest.raises(ValueError, match="shard >= 0"):
        index.add(draw(1, 5), [-1], ["a"])
    with pytest.raises(ValueError, match="not finite"):
        index.add(torch.full((1, 5), torch.inf), [0], ["a"])
    with pytest.raises(ValueError, match="empty"):
        index.nearest(draw(1, 5))
    assert len(index) == 0
    with pytest.raises(ConfigError, match="ridge"):
        KeyIndex(5, ridge=0.0)
    with pytest.raises(ConfigError, match="projection is 6"):
        KeyIndex(5, projection=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling_takes_real_tokens_only(draw: Draw, dtype: torch.dtype) -> None:
    activation = draw(3, 5, 8).to(dtype)
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    poisoned = torch.where(real.unsqueeze(-1), activation, torch.nan)
    pooled = pool_tokens(poisoned, real)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[0], activation[0, 2:].float().mean(0))
    torch.testing.assert_close(pooled[1], activation[1, :2].float().mean(0))
    assert pooled[2].equal(torch.zeros(8))
