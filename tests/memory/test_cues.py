"""Cues are random signs made of a number: the same everywhere, and unlike one another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.memory import NO_CUE, Cues, cue_number

PRIME = 2**31 - 1
NUMBERS = st.integers(1, 2**62 - 1)


def oracle(number: int, width: int) -> list[bool]:
    """Which entries are positive, in Python's whole numbers, which have no end."""
    high, low = divmod(number, PRIME)
    firsts = [pow(low * place + high, 3, PRIME) for place in range(1, width + 1)]
    return [pow(x + high * (i + 1), 3, PRIME) < PRIME // 2 for i, x in enumerate(firsts)]


@given(st.lists(NUMBERS, min_size=1, max_size=4), st.integers(1, 70))
def test_every_entry_is_that_of_whole_numbers(numbers: list[int], width: int) -> None:
    made = Cues(0.5, width).vectors(torch.tensor(numbers))
    assert made.dtype == torch.float32 and made.shape == (len(numbers), width)
    assert made.abs().eq(0.5).all()
    assert (made > 0).tolist() == [oracle(number, width) for number in numbers]


def test_the_widest_projection_stays_within_64_bits() -> None:
    width = 1 << 16
    made = Cues(1.0, width).vectors(torch.tensor([2**62 - 1]))
    assert (made[0, -64:] > 0).tolist() == oracle(2**62 - 1, width)[-64:]


def test_no_cue_is_nothing() -> None:
    made = Cues(2.0, 8).vectors(torch.tensor([NO_CUE, 5, NO_CUE]))
    assert made[[0, 2]].eq(0).all() and made[1].abs().eq(2).all()


@pytest.mark.parametrize("numbers", ["hashed", "counted"])
def test_cues_are_as_unlike_as_random_signs(numbers: str) -> None:
    names = [cue_number(f"Who wrote book {i}?") for i in range(500)]
    chosen = names if numbers == "hashed" else list(range(1, 501))
    made = Cues(1.0, 1536).vectors(torch.tensor(chosen))
    cosines = (made @ made.T / 1536).fill_diagonal_(0)
    # Of random signs the deviation is 1 / sqrt(1536), and the largest of 125,000 about 4.7 of it.
    assert 0.024 < float(cosines.std()) < 0.027
    assert float(cosines.abs().max()) < 0.16
    assert float(made.mean(0).abs().max()) < 0.2


@given(st.text())
def test_a_prompt_has_one_number(prompt: str) -> None:
    assert 1 <= cue_number(prompt) < 2**62
    assert cue_number(prompt) != cue_number(prompt + "?")


def test_numbers_do_not_change_with_versions() -> None:
    assert cue_number("The capital of Norway is") == 4367011503778378392
