"""Banks that grow: nothing that is there is copied, and what was handed out stays what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wise_ext.memory import PackedBank, Shard, SideMemory

SHAPE = (6, 40)


def shard(seed: int) -> Shard:
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    bits = torch.zeros(6, 2, dtype=torch.int32)
    bits[:, 0] = seed % 7 * 9 + 1
    return Shard.from_delta(delta, bits, edit_ids=[f"e{seed}"])


def same(one: PackedBank, other: PackedBank) -> bool:
    pairs = zip(one.held().values(), other.held().values(), strict=True)
    return all(a.dtype == b.dtype and a.equal(b) for a, b in pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["add", "add", "add", "replace", "remove", "ask"]), max_size=14),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_history_gives_the_bank_of_the_shards(steps: list[str], dtype: torch.dtype) -> None:
    memory = SideMemory("layer", SHAPE, routing="indicator")
    handed: list[tuple[PackedBank, PackedBank]] = []
    for number, step in enumerate(steps):
        if step == "add":
            memory.add_shard(shard(number))
        elif step == "replace" and memory.shards:
            memory.replace_shard(number % len(memory.shards), shard(number))
        elif step == "remove" and memory.shards:
            memory.remove_shard(number % len(memory.shards))
        fresh = PackedBank.from_shards(memory.shards, SHAPE, dtype)
        if step == "ask" or number % 2:
            handed.append((memory.bank(dtype), fresh))
        assert all(same(old, wanted) for old, wanted in handed)
    assert same(memory.bank(dtype), PackedBank.from_shards(memory.shards, SHAPE, dtype))


def test_a_shard_is_added_behind_the_others() -> None:
    memory = SideMemory("layer", SHAPE, [shard(n) for n in range(3)], "indicator")
    memory.bank()
    places = []
    for number in range(3, 40):
        memory.add_shard(shard(number))
        bank = memory.bank()
        places.append((bank.mask_bits.data_ptr(), bank.values.data_ptr(), bank.row_ptr.data_ptr()))
    assert len(set(places)) <= 6  # for room that doubles
    assert same(bank, PackedBank.from_shards(memory.shards, SHAPE))


@pytest.mark.parametrize("change", [lambda m: m.remove_shard(0), lambda m: m.shards.reverse()])
def test_other_shards_make_another_bank(change: Callable[[SideMemory], None]) -> None:
    memory = SideMemory("layer", SHAPE, [shard(n) for n in range(4)], "indicator")
    before = memory.bank()
    kept = [tensor.clone() for tensor in before.held().values()]
    change(memory)
    assert memory.bank().values.data_ptr() != before.values.data_ptr()
    assert all(a.equal(b) for a, b in zip(before.held().values(), kept, strict=True))
