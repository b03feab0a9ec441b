"""Banks of some columns of a projection: together they do what the whole one does."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.memory import LowRankBank, LowRankShard, MixedBank, PackedBank, Shard
from wise_ext.memory.masks import random_mask_bits
from wise_ext.memory.shards import VALUE_DTYPES


def packed(d_out: int, d_in: int, ratio: float, count: int) -> list[Shard]:
    shards = []
    for seed in range(count):
        delta = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
        shards.append(Shard.from_delta(delta, random_mask_bits(d_out, d_in, ratio, seed)))
    return shards


@given(
    st.integers(1, 6),
    st.integers(1, 100),
    st.floats(0.01, 1.0),
    st.integers(0, 4),
    st.sampled_from(VALUE_DTYPES),
    st.data(),
)
def test_a_part_has_the_columns_of_the_dense_shards(
    d_out: int, d_in: int, ratio: float, count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, d_in - 1))
    stop = data.draw(st.integers(start + 1, d_in))
    bank = PackedBank.from_shards(packed(d_out, d_in, ratio, count), (d_out, d_in), dtype)
    part = bank.part(start, stop)
    assert part.shape == (d_out, stop - start) and part.num_shards == count
    assert part.values.dtype == dtype
    for shard in range(count):
        assert part.dense(shard).equal(bank.dense(shard)[:, start:stop])


@given(st.integers(1, 40), st.lists(st.booleans(), min_size=1, max_size=4), st.data())
def test_parts_of_a_mixed_bank_add_up(d_in: int, is_low: list[bool], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, d_in))
    d_out, masked = 5, packed(5, d_in, 0.4, is_low.count(False))
    draw = torch.Generator().manual_seed(3)
    low = [
        LowRankShard(torch.randn(2, d_out, generator=draw), torch.randn(2, d_in, generator=draw))
        for _ in range(is_low.count(True))
    ]
    bank = MixedBank(
        PackedBank.from_shards(masked, (d_out, d_in)),
        LowRankBank.from_shards(low, (d_out, d_in), torch.float32),
        is_low,
    )
    route = torch.arange(-1, len(is_low), dtype=torch.int32)
    x = torch.randn(len(route), d_in, generator=draw)
    whole, summed = torch.zeros(len(route), d_out), torch.zeros(len(route), d_out)
    bank.add_side_(whole, x, route)
    for start, stop in ((0, cut), (cut, d_in)):
        if start < stop:
            part = bank.part(start, stop)
            assert part.shape == (d_out, stop - start)
            part.add_side_(summed, x[:, start:stop].contiguous(), route)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)
    assert not summed[0].any()
