"""Finding TIES' thresholds by counting bits: the functions the CUDA kernels call themselves."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wise_ext.ops import checks

fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
DENSITIES = st.one_of(st.floats(1e-9, 1.0), st.sampled_from([0.1, 0.2, 1 / 3, 0.3, 0.7, 1.0]))
# All bit patterns: subnormals, infinities and NaN too, and many that are alike or zero.
BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32).map(lambda f: int(np.float32(f).view(np.uint32))),
    st.sampled_from([0, 1 << 31, 0x3F800000, 0xBF800000, 1, 0x7F7FFFFF]),
)


@pytest.fixture
def select(emulator):
    if not hasattr(emulator, "wise_select"):
        pytest.skip("the emulator was built without packed_probes.cu")

    def run(bits: np.ndarray, density: float) -> int:
        emulator.wise_select.restype = ctypes.c_uint32
        pointer = bits.ctypes.data_as(ctypes.c_void_p)
        return emulator.wise_select(pointer, ctypes.c_int64(len(bits)), ctypes.c_double(density))

    return run


@fixed
@given(values=st.lists(BITS, max_size=200), density=DENSITIES)
def test_the_threshold_is_exact(select, values, density):
    bits = np.array(values, dtype=np.uint32)
    magnitudes = sorted((bits & 0x7FFFFFFF)[bits & 0x7FFFFFFF != 0].tolist(), reverse=True)
    expected = magnitudes[checks.kept(density, len(magnitudes)) - 1] if magnitudes else 0
    assert select(bits, density) == expected


def test_neighbouring_magnitudes_of_one_bin_are_told_apart(select):
    start = 0x3DCCCCCD
    bits = np.arange(start, start + 3000, dtype=np.uint32) | np.uint32(1 << 31)
    for kept in (1, 2, 1499, 2999, 3000):
        assert select(bits, kept / 3000) == start + 3000 - kept


@fixed
@given(density=DENSITIES, nonzero=st.integers(1, 2**45))
def test_how_many_stay_is_as_on_the_cpu(emulator, density, nonzero):
    if not hasattr(emulator, "wise_rank_to_keep"):
        pytest.skip("the emulator was built without packed_probes.cu")
    emulator.wise_rank_to_keep.restype = ctypes.c_int64
    got = emulator.wise_rank_to_keep(ctypes.c_double(density), ctypes.c_int64(nonzero))
    assert got == min(max(math.ceil(density * float(nonzero)), 1), nonzero)
