"""How the packed kernels find each stored value's column: the functions they call themselves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
WORDS = st.integers(0, 2**32 - 1)
# Words as masks have them: empty ones, full ones, and ones with few bits.
MASKS = st.lists(
    st.one_of(st.just(0), st.just(2**32 - 1), WORDS, st.integers(0, 31).map(lambda i: 1 << i)),
    min_size=1,
    max_size=64,
)


@pytest.fixture
def probe(emulator: ctypes.CDLL) -> Callable[..., Any]:
    """Calls one of packed_probes.cu's functions; arrays are passed by their address."""

    def call(name: str, result: Any, *arguments: Any) -> Any:
        if not hasattr(emulator, name):
            pytest.skip("the emulator was built without packed_probes.cu")
        function = getattr(emulator, name)
        function.restype = result
        return function(
            *(
                a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a
                for a in arguments
            )
        )

    return call


def columns_of(mask: list[int]) -> list[int]:
    return [32 * w + i for w, word in enumerate(mask) for i in range(32) if word >> i & 1]


@fixed
@given(mask=MASKS, lead=st.integers(0, 15), value_bytes=st.sampled_from([2, 4]))
def test_every_value_meets_its_column(probe, mask, lead, value_bytes):
    per_chunk = 32 // value_bytes
    lead %= per_chunk
    columns = np.full(len(mask) * 32 + 2 * per_chunk, -99, dtype=np.int32)
    chunks = probe(
        "wise_walk_piece",
        ctypes.c_int,
        np.array(mask, dtype=np.uint32),
        len(mask),
        lead,
        value_bytes,
        columns,
    )
    expected = columns_of(mask)
    assert chunks == -(-(lead + len(expected)) // per_chunk)
    got = columns[: chunks * per_chunk].tolist()
    assert got[:lead] == list(range(-lead, 0))[:lead]
    assert got[lead : lead + len(expected)] == expected
    # What is left of the last chunk is for idle lanes: zeros behind all columns.
    assert set(got[lead + len(expected) :]) <= {32 * len(mask)}


@fixed
@given(bits=WORDS, count=st.integers(0, 31))
def test_leaving_out_the_lowest_bits(probe, bits, count):
    ones = [i for i in range(32) if bits >> i & 1]
    left = probe("wise_without_lowest", ctypes.c_uint32, ctypes.c_uint32(bits), count)
    assert left == sum(1 << i for i in ones[count:])
    taken = probe("wise_lowest_bits", ctypes.c_uint32, ctypes.c_uint32(bits), count)
    assert taken == sum(1 << i for i in ones[:count])


@fixed
@given(
    chunk=st.lists(st.integers(0, 255), min_size=16, max_size=16),
    first=st.integers(-20, 20),
    last=st.integers(-20, 20),
    value_bytes=st.sampled_from([2, 4]),
)
def test_only_own_elements_are_left(probe, chunk, first, last, value_bytes):
    words = np.array(chunk, dtype=np.uint8).view(np.uint32)
    expected = np.array(chunk, dtype=np.uint8).reshape(-1, value_bytes)
    for i in range(len(expected)):
        if not first <= i < last:
            expected[i] = 0
    probe("wise_only_elements", None, words, first, last, value_bytes)
    assert words.view(np.uint8).tolist() == expected.flatten().tolist()


@pytest.mark.parametrize("value_bytes", [2, 4])
def test_pieces_are_equal_multiples_of_four_words(probe, value_bytes):
    most = 512 // value_bytes
    for words in range(2000):
        piece = probe("wise_piece_words", ctypes.c_int, ctypes.c_int64(words), value_bytes)
        assert 4 <= piece <= most and piece % 4 == 0
        assert -(-words // piece) <= max(-(-words // most), 0)
