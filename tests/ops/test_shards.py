"""Shards as wholes: pack, unpack and ties_merge."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wise_ext import ops

ABOUT = ("pack", "unpack", "ties_merge")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=arrays.arrays(bool, st.tuples(st.integers(0, 9), st.integers(0, 100))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_pack_then_unpack_is_the_masked_delta(provider, to_bits, mask, dtype, seed):
    mask = torch.from_numpy(mask)
    delta = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bits = to_bits(mask) if mask.numel() else torch.zeros(len(mask), -(-mask.shape[1] // 32)).int()
    values, row_ptr = ops.pack(delta, bits)
    assert values.dtype == dtype and torch.equal(values, delta[mask])
    assert row_ptr.dtype == torch.int64 and row_ptr[0] == 0
    assert torch.equal(row_ptr.diff(), mask.sum(1))
    assert torch.equal(ops.unpack(bits, values, row_ptr, mask.shape[1]), delta * mask)


def test_unpack_takes_a_slice_of_a_bank(provider, make_bank):
    bank = make_bank(3, 5, 45)
    got = ops.unpack(bank.mask_bits[1], bank.values, bank.row_ptr[5:11], 45)
    assert torch.equal(got.double(), bank.dense[1])


def test_pack_takes_any_strides_and_ignores_tail_bits(provider, to_bits):
    mask = torch.rand(6, 45) < 0.5
    delta = torch.randn(45, 6).T
    bits = to_bits(mask)
    stray = bits.clone()
    stray[:, 1] |= -(1 << 20)
    for words in (bits, stray, bits.T.contiguous().T):
        values, row_ptr = ops.pack(delta, words)
        assert torch.equal(values, delta[mask])
        assert torch.equal(ops.unpack(words, values, row_ptr, 45), delta * mask)


def ties_by_definition(deltas, weights, density):
    """Element by element, from the sentence that defines it."""
    trimmed = []
    for delta in deltas:
        magnitudes = sorted((abs(v) for v in delta.flatten().tolist() if v != 0), reverse=True)
        keep = math.ceil(density * len(magnitudes))
        least = magnitudes[keep - 1] if magnitudes else 0.0
        trimmed.append(torch.where(delta.abs() >= least, delta, 0.0).double())
    out = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for index in np.ndindex(*out.shape):
        entries = [(w, float(t[index])) for w, t in zip(weights, trimmed, strict=True)]
        positive = sum(w * v for w, v in entries) >= 0
        agreeing = [(w, v) for w, v in entries if (v > 0 if positive else v < 0)]
        total = sum(w for w, _ in agreeing)
        out[index] = sum(w * v for w, v in agreeing) / total if total else 0.0
    return out


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 45), (9, 64), (0, 5)], ids=str)
def test_ties_merge_is_its_definition(provider, shape, density):
    deltas = [torch.randn(shape) * (torch.rand(shape) < 0.5) for _ in range(4)]
    before = [delta.clone() for delta in deltas]
    weights = [1.0, 0.5, 2.0, 0.0]
    got = ops.ties_merge(deltas, weights, density)
    torch.testing.assert_close(got.double(), ties_by_definition(deltas, weights, density))
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stacked=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20)),
        # Few distinct values: ties at the threshold and sums that cancel are the rule.
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-40, -1e-40, 3e38]),
    ),
    density=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]),
)
def test_ties_merge_with_ties(provider, stacked, density):
    deltas = [torch.from_numpy(one.copy()) for one in stacked]
    weights = [0.25] * len(deltas)
    torch.testing.assert_close(
        ops.ties_merge(deltas, weights, density).double(),
        ties_by_definition(deltas, weights, density),
    )


def test_trimming_counts_non_zero_entries_only(provider):
    """A delta that is mostly zeros is trimmed too: half of its four entries go."""
    delta = torch.zeros(10, 10)
    delta[0, :4] = torch.tensor([4.0, -3.0, 2.0, -1.0])
    expected = torch.zeros(10, 10)
    expected[0, :2] = torch.tensor([4.0, -3.0])
    assert torch.equal(ops.ties_merge([delta], [1.0], 0.5), expected)


def test_a_delta_of_zeros_and_strides_merge(provider):
    a, b = torch.zeros(40, 50), torch.randn(50, 40).T
    assert torch.equal(ops.ties_merge([a, b], [1.0, 1.0], 1.0), b)


def test_ties_merge_bits_do_not_depend_on_threads(provider):
    deltas = [torch.randn(500, 700) for _ in range(3)]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            results.append(ops.ties_merge(deltas, [1.0, 2.0, 3.0], 0.2))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.skipif(not ops.native_loaded(), reason="needs the native module")
def test_every_implementation_merges_to_the_same_bits():
    deltas = [torch.randn(65, 515) * (torch.rand(65, 515) < 0.4) for _ in range(4)]
    reference = torch.ops.wise_ext_reference.ties_merge(deltas, [1.0, 0.5, 2.0, 0.0], 0.3)
    best = ops.cpu_isa()
    try:
        for isa in ops.ISAS[: ops.ISAS.index(best) + 1]:
            ops.set_cpu_isa(isa)
            assert torch.equal(ops.ties_merge(deltas, [1.0, 0.5, 2.0, 0.0], 0.3), reference)
    finally:
        ops.set_cpu_isa("auto")
