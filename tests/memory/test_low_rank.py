"""Low-rank shards: their algebra, their bank beside packed ones, and how they are stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import KeyIndex, LowRankShard, MixedBank, Shard, SideMemory, TokenKeys

MakeShard = Callable[..., Shard]
Draw = Callable[..., Tensor]
SHAPE = (6, 40)


def _low(draw: Draw, rank: int, seed: int, ids: list[str] | None = None) -> LowRankShard:
    factors = draw(rank, 6, seed=seed), draw(rank, 40, seed=seed + 1)
    return LowRankShard(*factors, edit_ids=ids or [f"low-{seed}"])


def _memory(shards: list[Shard | LowRankShard]) -> SideMemory:
    index = KeyIndex(8)
    names = [(i, name) for i, shard in enumerate(shards) for name in shard.edit_ids]
    words = [TokenKeys(torch.tensor([n]), torch.eye(8)[n : n + 1]) for n in range(len(names))]
    index.add(words, [i for i, _ in names], [name for _, name in names])
    return SideMemory("layer", SHAPE, shards, key_layer="early", key_index=index, radius=0.4)


@given(
    st.integers(0, 5),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_singular_directions_make_the_same_product(
    rank: int, d_out: int, d_in: int, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(rank, d_out, generator=draw, dtype=dtype)
    right = torch.randn(rank, d_in, generator=draw, dtype=dtype)
    shard = LowRankShard.of(left, right)
    assert shard.rank <= min(d_out, d_in) and shard.shape == (d_out, d_in)
    product = left.double().T @ right.double()
    assert torch.allclose(shard.dense().double(), product, atol=1e-5)
    gram = shard.right @ shard.right.T
    assert torch.allclose(gram, torch.eye(shard.rank), atol=1e-5)
    sizes = shard.left.norm(dim=1)
    assert bool((sizes.diff() <= 1e-5).all())
    # Fewer directions: nothing else of that rank comes closer (Eckart and Young).
    if shard.rank > 1:
        missing = (shard.first(1, torch.float32).dense().double() - product).norm()
        assert torch.allclose(missing, torch.linalg.svdvals(product)[1:].norm(), atol=1e-4)


def test_what_does_not_fit_is_refused(draw: Draw) -> None:
    with pytest.raises(ValueError, match=r"must be \[r, d_out\] and \[r, d_in\]"):
        LowRankShard(draw(2, 6), draw(3, 40))
    with pytest.raises(ValueError, match="must both be fp32, bf16 or fp16"):
        LowRankShard(draw(2, 6), draw(2, 40).double())
    with pytest.raises(ValueError, match=r"the shard is \(5, 40\), layer is \(6, 40\)"):
        _memory([]).add_shard(LowRankShard(draw(1, 5), draw(1, 40)))
    with pytest.raises(ConfigError, match="use router='key'"):
        SideMemory("layer", SHAPE, [_low(draw, 1, 0)], routing="indicator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixed_bank_adds_what_each_shard_does(
    make_shard: MakeShard, draw: Draw, dtype: torch.dtype
) -> None:
    shards = [_low(draw, 3, 5), make_shard(0), _low(draw, 0, 7), make_shard(1), _low(draw, 2, 9)]
    bank = _memory(shards).bank(dtype)
    assert isinstance(bank, MixedBank) and bank.num_shards == 5
    x, y = draw(7, 40, seed=1), draw(7, 6, seed=2)
    route = torch.tensor([0, -1, 1, 2, 4, 3, 0], dtype=torch.int32)
    expected = y.clone()
    for n, shard in enumerate(route.tolist()):
        if shard >= 0:
            expected[n] += shards[shard].dense() @ x[n]
    result = y.clone()
    bank.add_side_(result, x, route)
    assert torch.allclose(result, expected, atol=1e-5 if dtype == torch.float32 else 0.3)
    assert torch.equal(result[[1, 3]], y[[1, 3]])


def test_a_bank_becomes_another(make_shard: MakeShard, draw: Draw) -> None:
    small = _memory([make_shard(0), _low(draw, 2, 3)]).bank()
    large = _memory([make_shard(0), _low(draw, 2, 3), make_shard(1), _low(draw, 4, 5)]).bank()
    small.become(large)
    x, route = draw(4, 40), torch.arange(4, dtype=torch.int32)
    one, other = torch.zeros(4, 6), torch.zeros(4, 6)
    small.add_side_(one, x, route)
    large.add_side_(other, x, route)
    assert torch.equal(one, other) and small.nbytes == large.nbytes


def test_packed_shards_alone_make_a_packed_bank(make_shard: MakeShard, draw: Draw) -> None:
    memory = _memory([make_shard(0)])
    assert not isinstance(memory.bank(), MixedBank)
    assert memory.add_shard(_low(draw, 2, 3, ["x"])) == 1
    before = memory.bank()
    assert isinstance(before, MixedBank)
    # The packed part is not copied when only passages come.
    memory.add_shard(_low(draw, 1, 4, ["y"]))
    after = memory.bank()
    assert isinstance(after, MixedBank)
    assert after.values.data_ptr() == before.values.data_ptr()


def test_storage_round_trip(make_shard: MakeShard, draw: Draw) -> None:
    shards = [_low(draw, 3, 5), make_shard(0), LowRankShard.empty(SHAPE, torch.float32)]
    memory = _memory(shards)
    meta = json.loads(json.dumps(memory.state_meta()))
    restored = SideMemory.from_state(memory.state_tensors(), meta)
    assert [type(s) for s in restored.shards] == [type(s) for s in shards]
    for one, other in zip(restored.shards, shards, strict=True):
        assert torch.equal(one.dense(), other.dense()) and one.edit_ids == other.edit_ids
    assert restored.nbytes() == memory.nbytes()


def test_damage_is_noticed(draw: Draw) -> None:
    memory = _memory([_low(draw, 3, 5)])
    tensors, meta = memory.state_tensors(), memory.state_meta()
    more = copy.deepcopy(meta)
    more["shards"][0]["rank"] = 4
    with pytest.raises(ValueError, match="4 directions described"):
        SideMemory.from_state(tensors, more)
    with pytest.raises(ValueError, match=r"of shape \(6, 39\)"):
        SideMemory.from_state(tensors | {"low_rank.right": tensors["low_rank.right"][:, :39]}, meta)
    with pytest.raises(KeyError, match=r"low_rank\.left"):
        SideMemory.from_state({k: v for k, v in tensors.items() if k != "low_rank.left"}, meta)


def test_removing_and_replacing(make_shard: MakeShard, draw: Draw) -> None:
    memory = _memory([make_shard(0), _low(draw, 2, 3), _low(draw, 2, 7)])
    memory.replace_shard(1, LowRankShard.empty(SHAPE))
    memory.remove_shard(0)
    bank = memory.bank()
    y = torch.zeros(2, 6)
    bank.add_side_(y, draw(2, 40), torch.tensor([0, 1], dtype=torch.int32))
    assert not y[0].any() and bool(y[1].any())
    assert memory.key_index is not None and memory.key_index.shards.tolist() == [0, 1]
