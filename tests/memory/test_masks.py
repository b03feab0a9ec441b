from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.errors import ConfigError
from wise_ext.memory import bits_to_bool, bool_to_bits, popcount, random_mask_bits, row_counts
from wise_ext.memory.masks import (
    bits_per_row,
    bits_to_columns,
    columns_to_bits,
    tail_is_zero,
)
from wise_ext.memory.randomness import BitStream

GOLDEN = [[67404448, 142], [-1575941870, 32]]
GOLDEN_WORDS = [2127338734404830068, 15508555940752962959]

sizes = st.integers(1, 9), st.integers(1, 130)


@given(*sizes, st.floats(0.001, 1.0), st.integers(0, 2**40))
def test_every_row_opens_the_same_exact_number(
    d_out: int, d_in: int, ratio: float, seed: int
) -> None:
    bits = random_mask_bits(d_out, d_in, ratio, seed)
    assert bits.dtype == torch.int32
    assert bits.shape == (d_out, (d_in + 31) // 32)
    counts = bits_to_bool(bits, d_in).sum(1)
    assert counts.tolist() == [bits_per_row(d_in, ratio)] * d_out
    assert abs(bits_per_row(d_in, ratio) - ratio * d_in) <= max(0.5, 1 - ratio * d_in)
    assert row_counts(bits).equal(counts)
    assert popcount(bits) == int(counts.sum())
    assert tail_is_zero(bits, d_in)
    assert bits.equal(random_mask_bits(d_out, d_in, ratio, seed))


@given(*sizes, st.integers(0, 2**30))
def test_bits_and_bool_round_trip(d_out: int, d_in: int, seed: int) -> None:
    mask = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) < 0.4
    bits = bool_to_bits(mask)
    assert bits_to_bool(bits, d_in).equal(mask)
    for column in range(d_in):
        word = int(bits[0, column // 32]) & 0xFFFFFFFF
        assert bool(word >> (column % 32) & 1) == bool(mask[0, column])
    stacked = bool_to_bits(mask.expand(3, -1, -1))
    assert stacked.equal(bits.expand(3, -1, -1))
    assert bits_to_bool(stacked, d_in).equal(mask.expand(3, -1, -1))


@given(*sizes, st.floats(0.0, 1.0), st.integers(0, 2**30))
def test_bits_and_columns_round_trip(d_out: int, d_in: int, ratio: float, seed: int) -> None:
    mask = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) < ratio
    bits, row_ptr = bool_to_bits(mask), torch.zeros(d_out + 1, dtype=torch.int64)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    columns = bits_to_columns(bits, d_in)
    assert columns.dtype == torch.uint16
    assert columns.tolist() == [
        j for row in mask.tolist() for j, is_open in enumerate(row) if is_open
    ]
    assert columns_to_bits(columns, row_ptr, d_in).equal(bits)


def test_columns_beyond_sixteen_bits() -> None:
    widest = torch.zeros(1, 2048, dtype=torch.int32)
    widest[0, -1] = -(2**31)
    assert bits_to_columns(widest, 65536).tolist() == [65535]
    assert columns_to_bits(
        torch.tensor([65535], dtype=torch.uint16), torch.tensor([0, 1]), 65536
    ).equal(widest)
    with pytest.raises(ValueError, match="65537 columns have no 16-bit numbers"):
        bits_to_columns(torch.zeros(1, 2049, dtype=torch.int32), 65537)
    with pytest.raises(ValueError, match="row_ptr does not share out 1 columns"):
        columns_to_bits(torch.zeros(1, dtype=torch.uint16), torch.tensor([0, 2]), 40)


def test_mask_is_the_same_on_every_platform_and_version() -> None:
    # Written down once: a change here would change what every stored seed means.
    assert random_mask_bits(2, 40, 0.25, 7).tolist() == GOLDEN
    assert BitStream(3, 1).words(2).tolist() == GOLDEN_WORDS


def test_masks_of_two_seeds_are_independent() -> None:
    ratio, shape = 0.2, (200, 1000)
    first, second = (bits_to_bool(random_mask_bits(*shape, ratio, s), shape[1]) for s in (1, 2))
    shared = (first & second).float().mean().item()
    # 200,000 entries: a standard deviation of 0.0004.
    assert abs(shared - ratio**2) < 0.002
    assert int(first.sum()) == 40_000


def test_columns_are_chosen_uniformly() -> None:
    share = bits_to_bool(random_mask_bits(4000, 50, 0.3, 5), 50).float().mean(0)
    # A standard deviation of 0.007 a column.
    assert (share - 0.3).abs().max().item() < 0.035


def test_a_large_mask_does_not_depend_on_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_mask_bits(50, 300, 0.2, 11)
    monkeypatch.setattr("wise_ext.memory.masks._CHUNK_ENTRIES", 1000)
    assert random_mask_bits(50, 300, 0.2, 11).equal(whole)


def test_streams_have_names_of_their_own() -> None:
    words = {BitStream(*name).words(1).item() for name in ((0,), (1,), (0, 0), (1, 0), (0, 1))}
    assert len(words) == 5


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask ratio"):
        random_mask_bits(2, 8, ratio, 0)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="d_out"):
        random_mask_bits(0, 8, 0.2, 0)
    with pytest.raises(ValueError, match="2\\*\\*24"):
        random_mask_bits(1, 2**24 + 1, 0.2, 0)
    with pytest.raises(ValueError, match="seed"):
        random_mask_bits(2, 8, 0.2, -1)
    with pytest.raises(ValueError, match="2 words a row: 65 columns need 3"):
        bits_to_bool(torch.zeros(4, 2, dtype=torch.int32), 65)
    with pytest.raises(ValueError, match="int32"):
        bits_to_bool(torch.zeros(4, 2, dtype=torch.int64), 64)
    with pytest.raises(ValueError, match="bool"):
        bool_to_bits(torch.zeros(4, 2))


def test_tail_bits_are_seen() -> None:
    bits = torch.zeros(2, 2, dtype=torch.int32)
    assert tail_is_zero(bits, 40)
    bits[1, 1] = -(2**31)
    assert not tail_is_zero(bits, 40)
    assert tail_is_zero(bits, 64)
