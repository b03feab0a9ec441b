"""Late interaction: every implementation against the formula in float64, and what it leaves out."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from wise_ext import ops
from wise_ext.errors import NativeError

ABOUT = ("max_sim",)
EVERYTHING = -1.0


class Case(NamedTuple):
    """Valid arguments of `max_sim`, but for the floor."""

    query: Tensor
    keys: Tensor
    scales: Tensor
    places: Tensor
    weights: Tensor


def make(batch: int, tokens: int, width: int, entries: int, most: int = 8, seed: int = 0) -> Case:
    """Entries that share words with each other and with the queries; some have fewer tokens."""
    draw = torch.Generator().manual_seed(seed)
    words = normalize(torch.randn(60, width, generator=draw, device="cpu"), dim=-1)

    def some(*shape: int) -> Tensor:
        told = torch.randint(0, len(words), shape, generator=draw, device="cpu")
        noise = torch.randn(*shape, width, generator=draw, device="cpu") / max(width, 1) ** 0.5
        return normalize(words[told] + 0.4 * noise, dim=-1)

    keys = some(entries * most)
    keys = (keys / keys.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8)
    lengths = torch.randint(0, most + 1, (entries, 1), generator=draw, device="cpu")
    places = torch.randperm(entries * most, generator=draw, device="cpu").view(entries, most)
    places = torch.where(torch.arange(most, device="cpu") < lengths, places, -1).int()
    weights = torch.rand(entries, most, generator=draw, device="cpu") ** 3
    weights = weights.sort(dim=1, descending=True).values
    query = some(batch, tokens)
    query[:, 1::5] = 0
    case = Case(query, keys, 1 / keys.float().norm(dim=1), places, normalize(weights, p=1, dim=1))
    return Case(*(tensor.to(torch.get_default_device()) for tensor in case))


def oracle(case: Case) -> Tensor:
    """The formula, a loop over the entries, float64 [B, n]."""
    keys = case.keys.double() * case.scales.double().unsqueeze(1)
    scores = torch.zeros(len(case.query), len(case.places), dtype=torch.float64)
    for e, (places, weights) in enumerate(zip(case.places, case.weights, strict=True)):
        for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
            if place >= 0 and case.query.shape[1]:
                cosines = case.query.double() @ keys[place]
                scores[:, e] += weight * cosines.amax(1).clamp(min=0)
    return scores


SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 64, 7),
    (3, 17, 45, 40),
    (1, 64, 512, 33),
    (2, 80, 128, 600),
    (2, 130, 192, 9),
    (0, 4, 64, 3),
    (2, 4, 64, 0),
    (2, 0, 64, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("floor", [EVERYTHING, 0.2, 0.6])
def test_scores_are_the_formula_above_the_floor(provider, shape, floor):
    case = make(*shape)
    got, want = ops.max_sim(*case, floor), oracle(case)
    assert got.dtype == torch.float32 and got.shape == want.shape
    near = (want - floor).abs() < 1e-5
    want = torch.where(want > floor, want, 0.0)
    assert ((got.double() - want).abs() < 2e-6)[~near].all()
    if floor == 0.6 and shape == (2, 80, 128, 600):
        assert 0 < int((got > 0).sum()) < got.numel() // 2


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([3, 64, 128, 200]),
    tokens=st.integers(0, 70),
    floor=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
def test_nothing_above_the_floor_is_left_out(width, tokens, floor, seed):
    """The early ways out, by bytes and by what is left, never cost an entry its score."""
    case = make(2, tokens, width, 24, seed=seed)
    everything, some = ops.max_sim(*case, EVERYTHING), ops.max_sim(*case, floor)
    assert torch.equal(some, torch.where(everything > floor, everything, 0.0))


def test_a_row_does_not_depend_on_its_company(provider):
    case = make(5, 20, 64, 50)
    together = ops.max_sim(*case, 0.4)
    for b in range(5):
        alone = ops.max_sim(case.query[b : b + 1], *case[1:], 0.4)
        torch.testing.assert_close(alone[0], together[b], atol=2e-6, rtol=0)
        # its zeros in other places, as pads put them
        moved = ops.max_sim(case.query[b : b + 1].flip(1), *case[1:], 0.4)
        torch.testing.assert_close(moved[0], together[b], atol=2e-6, rtol=0)


@pytest.mark.skipif(not ops.native_loaded(), reason="needs the native module")
@pytest.mark.parametrize("isa", ops.ISAS)
def test_native_scores_are_the_same_bits_alone_and_for_any_number_of_threads(isa):
    try:
        ops.set_cpu_isa(isa)
    except NativeError:
        pytest.skip(f"no {isa} here")
    case = make(3, 70, 128, 900)
    threads = torch.get_num_threads()
    try:
        together = ops.max_sim(*case, 0.3)
        alone = ops.max_sim(case.query[1:2], *case[1:], 0.3)
        torch.set_num_threads(3)
        assert torch.equal(ops.max_sim(*case, 0.3), together)
        assert torch.equal(alone[0], together[1])
    finally:
        torch.set_num_threads(threads)
        ops.set_cpu_isa("auto")


def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(provider):
    case = make(3, 6, 64, 10)
    whole = ops.max_sim(*case, 0.2)
    case.query[1, 3, 5] = torch.inf
    got = ops.max_sim(*case, 0.2)
    assert bool(got[1].isnan().all())
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]], atol=2e-6, rtol=0)


def test_strides_do_not_matter(provider):
    case = make(2, 6, 64, 10)
    views = (
        case.query.transpose(1, 2).contiguous().transpose(1, 2),
        case.keys.t().contiguous().t(),
        case.scales.repeat_interleave(2)[::2],
        case.places.t().contiguous().t(),
        case.weights.t().contiguous().t(),
    )
    assert torch.equal(ops.max_sim(*views, 0.3), ops.max_sim(*case, 0.3))
