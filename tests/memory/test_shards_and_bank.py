from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.memory import PackedBank, Shard, bits_to_bool, random_mask_bits
from wise_ext.memory.shards import VALUE_DTYPES

MakeShard = Callable[..., Shard]
Draw = Callable[..., Tensor]


@given(
    st.integers(1, 8),
    st.integers(1, 100),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
    st.sampled_from(VALUE_DTYPES),
)
def test_packing_through_shards_and_bank_keeps_every_entry(
    d_out: int, d_in: int, ratio: float, count: int, dtype: torch.dtype
) -> None:
    shards, deltas = [], []
    for seed in range(count):
        bits = random_mask_bits(d_out, d_in, ratio, seed)
        delta = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
        shards.append(Shard.from_delta(delta, bits))
        deltas.append(torch.where(bits_to_bool(bits, d_in), delta, 0.0))
        assert shards[-1].dense().equal(deltas[-1].float())
    bank = PackedBank.from_shards(shards, (d_out, d_in), dtype)
    assert bank.num_shards == count
    entries = (
        torch.cat([shard.values for shard in shards]) if count else torch.zeros(0, dtype=dtype)
    )
    assert bank.values.equal(entries)
    route = torch.arange(-1, count, dtype=torch.int32)
    x = torch.randn(count + 1, d_in, generator=torch.Generator().manual_seed(9)).to(dtype)
    y = torch.ones(count + 1, d_out)
    bank.add_side_(y, x, route)
    expected = torch.ones(count + 1, d_out)
    for index, delta in enumerate(deltas):
        expected[index + 1] += delta.float() @ x[index + 1].float()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y[0].equal(torch.ones(d_out))


def test_side_norm_is_the_indicator(make_shard: MakeShard, draw: Draw) -> None:
    shards = [make_shard(seed) for seed in range(3)]
    bank = PackedBank.from_shards(shards, (6, 40))
    x = draw(4, 40)
    rows = torch.tensor([0, 3, 3], dtype=torch.int32)
    which = torch.tensor([2, 0, 1], dtype=torch.int32)
    wanted = torch.stack(
        [(shards[s].dense() @ x[r]).norm() for r, s in zip(rows, which, strict=True)]
    )
    torch.testing.assert_close(bank.side_norm(x, rows, which), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_gives_its_shards_back(make_shard: MakeShard, dtype: torch.dtype) -> None:
    shards = [make_shard(seed, ratio=0.1 + 0.2 * seed) for seed in range(3)]
    bank = PackedBank.from_shards(shards, (6, 40), dtype)
    for place, shard in enumerate(shards):
        assert bank.dense(place).equal(shard.dense().to(dtype).float())


def test_shard_knows_its_size(make_shard: MakeShard) -> None:
    shard = make_shard(ratio=0.3)
    assert shard.shape == (6, 40)
    assert shard.nnz == 6 * 12
    assert shard.density == pytest.approx(0.3)
    assert shard.nbytes() == 6 * 2 * 4 + 7 * 8 + 72 * 4
    assert shard.nbytes(torch.bfloat16) == 6 * 2 * 4 + 7 * 8 + 72 * 2


def test_packed_bank_is_a_quarter_of_dense_in_bf16() -> None:
    # At a real width, row pointers no longer weigh anything.
    bits = random_mask_bits(64, 14336, 0.2, 0)
    shard = Shard.from_delta(torch.zeros(64, 14336), bits)
    bank = PackedBank.from_shards([shard] * 3, (64, 14336), torch.bfloat16)
    assert bank.nbytes <= 0.264 * 3 * 64 * 14336 * 2
    assert bank.nbytes == bank.mask_bits.nbytes + bank.values.nbytes + bank.row_ptr.nbytes


def test_bank_leaves_no_trace_in_a_state_dict_and_moves_with_its_model(
    make_shard: MakeShard,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.add_module("bank", PackedBank.from_shards([make_shard()], (6, 40)))
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    bank = model.to(torch.bfloat16).bank
    assert isinstance(bank, PackedBank)
    assert bank.values.dtype == torch.bfloat16
    assert bank.mask_bits.dtype == torch.int32
    assert bank.row_ptr.dtype == torch.int64
    assert "shards=1" in repr(bank)


def test_empty_bank_adds_nothing(draw: Draw) -> None:
    bank = PackedBank.from_shards([], (6, 40), torch.float16)
    assert (bank.num_shards, bank.mask_bits.shape) == (0, (0, 6, 2))
    y = draw(3, 6)
    before = y.clone()
    bank.add_side_(y, draw(3, 40), torch.full((3,), -1, dtype=torch.int32))
    assert y.equal(before)


def test_sealing_copies_the_edit_ids_and_detaches() -> None:
    ids = ["a"]
    bits = random_mask_bits(3, 10, 0.5, 0)
    delta = torch.ones(3, 10, requires_grad=True)
    shard = Shard.from_delta(delta, bits, edit_ids=ids)
    ids.append("b")
    assert shard.edit_ids == ["a"]
    assert not shard.values.requires_grad
    assert shard.threshold == -math.inf


def _broken(shard: Shard, **changes: object) -> None:
    fields = {name: getattr(shard, name) for name in ("mask_bits", "values", "row_ptr", "d_in")}
    Shard(**(fields | changes))


def test_tensors_that_do_not_fit_are_refused(make_shard: MakeShard) -> None:
    shard = make_shard()
    with pytest.raises(ValueError, match="72 entries, got 71 values"):
        _broken(shard, values=shard.values[:-1])
    with pytest.raises(ValueError, match="number of mask bits"):
        _broken(shard, row_ptr=torch.arange(7))
    with pytest.raises(ValueError, match="number of mask bits"):
        _broken(shard, mask_bits=shard.mask_bits ^ 1)
    with pytest.raises(ValueError, match="behind the last of 36 columns"):
        _broken(shard, mask_bits=torch.full((6, 2), -1, dtype=torch.int32), d_in=36)
    with pytest.raises(ValueError, match="does not fit 65 columns"):
        _broken(shard, d_in=65)
    with pytest.raises(ValueError, match="values must be"):
        _broken(shard, values=shard.values.double())
    with pytest.raises(ValueError, match="row_ptr must be int64"):
        _broken(shard, row_ptr=shard.row_ptr.int())
    with pytest.raises(ValueError, match="mask_bits must be int32"):
        _broken(shard, mask_bits=shard.mask_bits.long())
    with pytest.raises(ValueError, match="not a number"):
        _broken(shard, threshold=math.nan)


def test_bank_refuses_strangers(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="shard 1 is"):
        PackedBank.from_shards([make_shard(), make_shard(shape=(6, 41))], (6, 40))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        PackedBank.from_shards([], (6, 40), torch.float64)
    shard = make_shard()
    with pytest.raises(ValueError, match=r"\[k, 6, W\]"):
        PackedBank(shard.mask_bits, shard.values, shard.row_ptr, (6, 40))
