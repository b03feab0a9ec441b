"""The stored form of a bank: values rounded to bytes, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import Shard, SideMemory, random_mask_bits
from wise_ext.memory.bank_form import from_bytes, to_bytes

SHAPE = (6, 40)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def int8_memory(seed: int = 0, dtype: torch.dtype = torch.float32) -> SideMemory:
    shards = []
    for number, ratio in enumerate((0.3, 0.02, 0.5)):
        delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + number)).to(dtype)
        bits = random_mask_bits(*SHAPE, ratio, number)
        shards.append(Shard.from_delta(delta, bits, edit_ids=[f"e{number}"], seed=number))
    return SideMemory("layer", SHAPE, shards, "indicator", stored="int8")


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([1e-30, 1e-3, 1.0, 3e20]),
    st.integers(0, 2**30),
)
def test_bytes_are_near_and_rounding_them_again_changes_nothing(
    lengths: list[int], size: float, seed: int
) -> None:
    row_ptr = offsets(lengths)
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(int(row_ptr[-1]), generator=draw) * size
    whole, scales = to_bytes(values, row_ptr)
    again = from_bytes(whole, scales, row_ptr)
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert whole.dtype == torch.int8 and scales.shape == (len(lengths),)
    assert ((again - values).abs() <= 0.5001 * scales[row]).all()
    largest = torch.zeros(len(lengths)).scatter_reduce(0, row, values.abs(), "amax")
    told = largest > 0
    assert (scales[told] < 2 * largest[told] / 127 * 1.0001).all()  # no scale is a power too large
    assert torch.equal(again.bfloat16().float(), again)
    for rounded, first in zip(to_bytes(again, row_ptr), (whole, scales), strict=True):
        assert torch.equal(rounded[: len(first)], first) or not told.all()
    assert torch.equal(from_bytes(*to_bytes(again, row_ptr), row_ptr), again)


def test_powers_of_two_at_the_edge() -> None:
    row_ptr = offsets([1, 1, 1])
    whole, scales = to_bytes(torch.tensor([127.0, 127.5, -63.5]), row_ptr)
    assert scales.tolist() == [1.0, 2.0, 0.5] and whole.tolist() == [127, 64, -127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_in_bytes(dtype: torch.dtype) -> None:
    memory = int8_memory(dtype=dtype)
    tensors, meta = memory.state_tensors(), memory.state_meta()
    assert tensors["bank.values"].dtype == torch.int8
    again = SideMemory.from_state(tensors, meta)
    assert again.stored == "int8" and again.rounding() == 0 < memory.rounding() < 0.01
    for before, after in zip(memory.shards, again.shards, strict=True):
        assert after.mask_bits.equal(before.mask_bits) and after.values.dtype == torch.float32
        scale = before.values.float().abs().max() / 127
        assert ((after.values - before.values.float()).abs() <= scale).all()
    later = again.state_tensors()
    assert later.keys() == tensors.keys()
    assert all(later[name].equal(tensors[name]) for name in tensors)
    exact = SideMemory("layer", SHAPE, memory.shards, "indicator")
    assert exact.rounding() == 0 and "bank.scales" not in exact.state_tensors()


def test_what_does_not_fit() -> None:
    memory = int8_memory()
    tensors, meta = memory.state_tensors(), memory.state_meta()

    def broken(match: str, **changes: Tensor) -> None:
        named = {f"bank.{name}": tensor for name, tensor in changes.items()}
        with pytest.raises(ValueError, match=match):
            SideMemory.from_state(tensors | named, meta)

    scales = tensors["bank.scales"]
    broken(r"scales must be fp32 \[18\]", scales=scales[1:])
    broken(r"scales must be fp32 \[18\]", scales=scales.double())
    broken("a scale is no positive number", scales=-scales)
    broken("a scale is no positive number", scales=scales / 0)
    broken("entries, got", values=tensors["bank.values"][1:])
    with pytest.raises(KeyError, match=r"scales"):
        SideMemory.from_state({n: t for n, t in tensors.items() if n != "bank.scales"}, meta)
    with pytest.raises(ConfigError, match="stored is 'int4': choose one of"):
        SideMemory("layer", SHAPE, routing="indicator", stored="int4")
