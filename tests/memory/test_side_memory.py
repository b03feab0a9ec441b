from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import (
    METHODS,
    IndicatorRouter,
    KeyIndex,
    KeyRouter,
    Shard,
    SideMemory,
    TokenKeys,
    merge,
)

MakeShard = Callable[..., Shard]
Draw = Callable[..., Tensor]
SHAPE = (6, 40)
LAYER = "model.layers.4.mlp.down_proj"
EARLY = "model.layers.1.mlp.down_proj"


def _memory(shards: list[Shard], keys: Tensor | None = None) -> SideMemory:
    """One key for each edit; without keys the indicator decides."""
    if keys is None:
        return SideMemory(LAYER, SHAPE, shards, routing="indicator")
    index = KeyIndex(keys.shape[1])
    names = [(i, name) for i, shard in enumerate(shards) for name in shard.edit_ids]
    words = [TokenKeys(torch.tensor([n]), keys[n : n + 1]) for n in range(len(names))]
    index.add(words, [i for i, _ in names], [name for _, name in names])
    return SideMemory(LAYER, SHAPE, shards, key_layer=EARLY, key_index=index, radius=0.4)


def test_what_a_memory_knows(make_shard: MakeShard, draw: Draw) -> None:
    shards = [make_shard(0, ids=["a", "b"]), make_shard(1, ids=["c"])]
    memory = _memory(shards, draw(3, 40))
    assert memory.edit_ids == ["a", "b", "c"]
    assert [memory.shard_of(name) for name in "abcd"] == [0, 0, 1, None]
    assert memory.nbytes(torch.bfloat16) == sum(s.nbytes(torch.bfloat16) for s in shards)
    bank = memory.bank(torch.float16)
    assert (bank.num_shards, bank.values.dtype) == (2, torch.float16)
    router = memory.router()
    assert isinstance(router, KeyRouter)
    assert router.layer == EARLY


def test_indicator_router_may_share_a_bank(make_shard: MakeShard) -> None:
    memory = _memory([make_shard(0, threshold=2.5)])
    router = memory.router()
    assert isinstance(router, IndicatorRouter)
    assert router.layer == LAYER
    assert router.thresholds.tolist() == [2.5]
    assert router.bank.values.dtype == torch.float32
    bank = memory.bank(torch.bfloat16)
    shared = memory.router(bank)
    assert isinstance(shared, IndicatorRouter)
    assert shared.bank is bank


def test_an_empty_memory_has_no_router(draw: Draw) -> None:
    assert _memory([]).router() is None
    assert _memory([], draw(0, 40)).router() is None
    assert _memory([]).bank().num_shards == 0


def test_adding_replacing_and_removing_shards(make_shard: MakeShard, draw: Draw) -> None:
    keys = draw(3, 40)
    memory = _memory([make_shard(i, ids=[name]) for i, name in enumerate("abc")], keys)
    assert memory.key_index is not None
    assert memory.add_shard(make_shard(7, ids=["d"])) == 3
    memory.remove_shard(1)
    assert memory.edit_ids == ["a", "c", "d"]
    assert memory.key_index.ids == ["a", "c"]
    assert memory.key_index.shards.tolist() == [0, 1]
    memory.replace_shard(0, make_shard(8, ids=["a"]))
    assert memory.shards[0].seed == 8
    other = make_shard(9, shape=(6, 41))
    for put in (memory.add_shard, lambda shard: memory.replace_shard(0, shard)):
        with pytest.raises(ValueError, match=r"the shard is \(6, 41\)"):
            put(other)
        with pytest.raises(ValueError, match="bfloat16"):
            put(make_shard(9, dtype=torch.bfloat16))


@pytest.mark.parametrize("method", METHODS)
def test_merging_shards(make_shard: MakeShard, draw: Draw, method: str) -> None:
    shards = [make_shard(i, threshold=3.0 - i, ids=[f"{i}a", f"{i}b"]) for i in range(4)]
    memory = _memory(list(shards), draw(8, 40))
    place = memory.merge_shards([3, 1], method, [1.0, 2.0], density=0.5, seed=5)
    assert place == 1
    assert memory.edit_ids == ["0a", "0b", "3a", "3b", "1a", "1b", "2a", "2b"]
    wanted = merge([shards[3].dense(), shards[1].dense()], method, [1.0, 2.0], 0.5, 5)
    merged = memory.shards[1]
    assert merged.dense().equal(wanted)
    assert merged.nnz == int((wanted != 0).sum())
    assert (merged.threshold, merged.seed) == (0.0, -1)
    assert [memory.shards[0], memory.shards[2]] == [shards[0], shards[2]]
    assert memory.key_index is not None
    homes = dict(zip(memory.key_index.ids, memory.key_index.shards.tolist(), strict=True))
    assert all(memory.shard_of(name) == home for name, home in homes.items())
    assert len(homes) == 8


def test_merging_everything_with_a_given_threshold(make_shard: MakeShard) -> None:
    memory = _memory([make_shard(i) for i in range(3)])
    assert memory.merge_shards([2, 0, 1], threshold=9.5) == 0
    assert [shard.threshold for shard in memory.shards] == [9.5]
    assert memory.edit_ids == ["edit-2", "edit-0", "edit-1"]


def test_merging_keeps_the_dtype(make_shard: MakeShard) -> None:
    memory = _memory([make_shard(i, dtype=torch.bfloat16) for i in range(2)])
    memory.merge_shards([0, 1])
    assert memory.shards[0].values.dtype == torch.bfloat16


@pytest.mark.parametrize("indices", [[], [0, 0], [0, 2], [-1]])
def test_merging_what_is_not_there(make_shard: MakeShard, indices: list[int]) -> None:
    memory = _memory([make_shard(0), make_shard(1)])
    with pytest.raises(ValueError, match="shard"):
        memory.merge_shards(indices)
    assert len(memory.shards) == 2


@given(
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([-math.inf, 0.0, 1 / 3, 1e30]),
)
def test_state_round_trip(count: int, keyed: bool, dtype: torch.dtype, threshold: float) -> None:
    shards = []
    for seed in range(count):
        delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
        bits = torch.full((6, 2), 0xF0, dtype=torch.int32)
        shards.append(Shard.from_delta(delta, bits, threshold, [f"é-{seed}"], seed))
    memory = _memory(shards, torch.randn(count, 40) if keyed else None)
    meta = json.loads(json.dumps(memory.state_meta(), allow_nan=False))
    again = SideMemory.from_state(memory.state_tensors(), meta)
    assert again.state_meta() == memory.state_meta()
    old, new = memory.state_tensors(), again.state_tensors()
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    assert all(old[name].equal(new[name]) for name in old)
    for before, after in zip(memory.shards, again.shards, strict=True):
        assert after.dense().equal(before.dense())
        assert after.threshold == before.threshold


def test_state_that_does_not_fit(make_shard: MakeShard, draw: Draw) -> None:
    memory = _memory([make_shard(0), make_shard(1)], draw(2, 40))
    tensors, meta = memory.state_tensors(), memory.state_meta()

    def broken(match: str, meta_changes: dict[str, object], **changes: Tensor) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        with pytest.raises(ValueError, match=match):
            SideMemory.from_state(tensors | named, meta | meta_changes)

    broken("thresholds must be fp64", {"shards": meta["shards"][:1]})
    broken(r"sparse must be bool \[2\]", {}, bank__sparse=torch.zeros(3, dtype=torch.bool))
    broken("mask for 1 shards", {}, bank__sparse=torch.tensor([True, False]))
    broken("thresholds must be fp64", {}, bank__thresholds=torch.zeros(2))
    broken("144 entries, got 143 values", {}, bank__values=tensors["bank.values"][1:])
    broken("number of mask bits", {}, bank__row_ptr=tensors["bank.row_ptr"].flip(0))
    broken("does not fit 70 columns", {"shape": [6, 70]})
    broken("none of the 2 shards", {}, key_index__shards=torch.tensor([0, 2], dtype=torch.int32))
    broken("none of the 2 shards", {}, key_index__shards=torch.tensor([0, -1], dtype=torch.int32))
    with pytest.raises(KeyError, match=r"bank\.row_ptr"):
        SideMemory.from_state({n: t for n, t in tensors.items() if n != "bank.row_ptr"}, meta)


def test_columns_that_do_not_fit(draw: Draw) -> None:
    bits = torch.zeros(6, 2, dtype=torch.int32)
    bits[:, 0] = 0b101
    memory = _memory([Shard.from_delta(draw(6, 40), bits)] * 2, None)
    memory.shards[1] = Shard.from_delta(draw(6, 40), torch.full((6, 2), 255, dtype=torch.int32))
    tensors, meta = memory.state_tensors(), memory.state_meta()
    assert tensors["bank.columns"].tolist() == [0, 2] * 6 and len(tensors["bank.mask_bits"]) == 1

    def broken(match: str, columns: list[int], dtype: torch.dtype = torch.uint16) -> None:
        changed = {"bank.columns": torch.tensor(columns, dtype=dtype)}
        with pytest.raises(ValueError, match=match):
            SideMemory.from_state(tensors | changed, meta)

    broken("11 columns for 12 entries", [0, 2] * 5 + [0])
    broken("column 40 is none of 40", [0, 2] * 5 + [0, 40])
    broken("the columns of a row do not ascend", [0, 2] * 5 + [2, 0])
    broken("the columns of a row do not ascend", [0, 2] * 5 + [2, 2])
    broken("columns must be uint16", [0, 2] * 6, torch.int32)


def test_settings_that_contradict(draw: Draw) -> None:
    with pytest.raises(ConfigError, match="needs key_layer"):
        SideMemory(LAYER, SHAPE)
    with pytest.raises(ConfigError, match="unknown router"):
        SideMemory(LAYER, SHAPE, routing="oracle")
    with pytest.raises(ConfigError, match="unknown variant"):
        SideMemory(LAYER, SHAPE, routing="indicator", variant="both")
    with pytest.raises(ConfigError, match="radius"):
        SideMemory(LAYER, SHAPE, routing="indicator", radius=math.nan)
