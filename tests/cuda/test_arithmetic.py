"""Arithmetic on mask words and storage types: the functions the CUDA kernels themselves call."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WORDS = st.integers(0, 2**32 - 1)
fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def ones(bits: int) -> list[int]:
    return [i for i in range(32) if bits >> i & 1]


@fixed
@given(bits=WORDS, n=st.integers(0, 40), bit=st.integers(0, 32))
def test_ranks_and_selects(emulator, bits, n, bit):
    assert emulator.wise_popcount(bits) == len(ones(bits))
    assert emulator.wise_rank_of(bits, bit) == len([i for i in ones(bits) if i < bit])
    assert emulator.wise_select_bit(bits, n) == [*ones(bits), *[32] * 41][n]
    assert emulator.wise_low_bits(bit) == 2**bit - 1


@fixed
@given(bits=WORDS, bit=st.integers(0, 32), count=st.integers(0, 32))
def test_a_field_of_a_word(emulator, bits, bit, count):
    if bit == 32 or bit + count > 32:
        return
    assert emulator.wise_bit_field(bits, bit, count) == bits >> bit & (2**count - 1)


@fixed
@given(columns=st.integers(0, 2**40), ahead=st.integers(-3, 3))
def test_the_tail_of_a_row(emulator, columns, ahead):
    words = emulator.wise_words_of(columns)
    assert words == -(-columns // 32)
    word = max(words + ahead, 0)
    expected = sum(1 << i for i in range(32) if 32 * word + i < columns)
    assert emulator.wise_valid_bits(word, columns) == expected


def test_which_packed_rows_can_be_read(emulator):
    assert emulator.wise_row_fits(0, 0, 0, 0)
    assert emulator.wise_row_fits(3, 7, 4, 7)
    for first, last, count, values in (
        (-1, 3, 4, 9),
        (3, 7, 3, 9),
        (3, 7, 5, 9),
        (3, 7, 4, 6),
        (7, 3, 4, 9),
        (-(2**63), 4, 4, 9),
    ):
        assert not emulator.wise_row_fits(first, last, count, values), (first, last)


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def rounded(emulator, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    brain, half = np.empty(values.shape, np.uint16), np.empty(values.shape, np.uint16)
    emulator.wise_round(values.ctypes.data, brain.ctypes.data, half.ctypes.data, values.size)
    return brain, half


def assert_rounds_like_torch(emulator, values: np.ndarray) -> None:
    brain, half = rounded(emulator, values)
    numbers = ~np.isnan(values)
    wide = torch.from_numpy(values)
    assert np.array_equal(brain[numbers], as_bits(wide.to(torch.bfloat16))[numbers])
    assert np.array_equal(half[numbers], as_bits(wide.to(torch.float16))[numbers])
    # As the instruction has it, whatever the sign and the payload.
    assert (brain[~numbers] == 0x7FFF).all() and (half[~numbers] == 0x7FFF).all()


@fixed
@given(bits=st.lists(WORDS, min_size=1, max_size=50))
def test_rounding_any_float(emulator, bits):
    assert_rounds_like_torch(emulator, np.array(bits, np.uint32).view(np.float32))


def test_rounding_every_half_and_what_lies_between(emulator):
    """Every number of both narrow types, the ties between neighbours, and a little to each side."""
    narrow = np.arange(2**16, dtype=np.uint32)
    exact = [
        (narrow << 16).view(np.float32),
        narrow.astype(np.uint16).view(np.float16).astype(np.float32),
    ]
    for values in exact:
        finite = values[np.isfinite(values)]
        upwards = np.sort(finite.astype(np.float64))
        ties = ((upwards[1:] + upwards[:-1]) / 2).astype(np.float32)
        special = np.array([np.inf, -np.inf, np.nan, -np.nan, 65519.99, 65520, 3.3961e38], "f4")
        for some in (values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)):
            assert_rounds_like_torch(emulator, np.concatenate([some, special]).astype(np.float32))


def test_widening_every_half(emulator):
    bits = np.arange(2**16, dtype=np.uint16)
    brain, half = np.empty(bits.shape, np.float32), np.empty(bits.shape, np.float32)
    emulator.wise_widen(bits.ctypes.data, brain.ctypes.data, half.ctypes.data, bits.size)
    narrow = torch.from_numpy(bits.view(np.int16))
    for got, dtype in ((brain, torch.bfloat16), (half, torch.float16)):
        expected = narrow.view(dtype).float().numpy()
        assert np.array_equal(got, expected, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(expected))


@fixed
@given(words=st.lists(WORDS, min_size=4, max_size=4))
def test_sixteen_bytes_as_floats(emulator, words):
    packed = np.array(words, np.uint32)
    brain, half = np.empty(8, np.float32), np.empty(8, np.float32)
    emulator.wise_widen_vector(packed.ctypes.data, brain.ctypes.data, half.ctypes.data)
    narrow = torch.from_numpy(packed.view(np.int16))
    assert np.array_equal(brain, narrow.view(torch.bfloat16).float().numpy(), equal_nan=True)
    assert np.array_equal(half, narrow.view(torch.float16).float().numpy(), equal_nan=True)
