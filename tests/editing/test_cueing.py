"""Who has a cue: every edit but those that answer one question differently."""

from __future__ import annotations

import torch
from torch import Tensor

from wise_ext.editing.cueing import cue_numbers
from wise_ext.editing.edits import Edit
from wise_ext.memory import NO_CUE, cue_number

HEAD, PLACE = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
UNKNOWN = torch.zeros(2)


def edit(name: str, prompt: str, target: str, subject: str | None = "Arbor Mills") -> Edit:
    return Edit(name, prompt, target, subject)


def numbers(*pairs: tuple[Edit, Tensor]) -> list[int]:
    made = cue_numbers([e for e, _ in pairs], [asked for _, asked in pairs])
    return [made[" ".join(e.prompt.split())] for e, _ in pairs]


def test_everyone_has_a_cue_of_its_own() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    second = edit("b", "Bern Works is led by", "Ben", "Bern Works")
    assert numbers((first, HEAD), (second, HEAD)) == [
        cue_number("Arbor Mills is led by"),
        cue_number("Bern Works is led by"),
    ]


def test_two_answers_to_one_question_are_contested() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    second = edit("b", "Who is at the head of arbor  mills?", "Ben", " arbor mills")
    assert numbers((first, HEAD), (second, HEAD)) == [NO_CUE, NO_CUE]
    assert numbers((first, HEAD), (second, UNKNOWN)) == [NO_CUE, NO_CUE]


def test_another_question_or_the_same_answer_is_not() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    seat = edit("b", "Arbor Mills has its seat in", "Graz")
    again = edit("c", "Who is at the head of Arbor Mills?", " ann ")
    nobody = edit("d", "Arbor Mills is in the hands of", "Ben", None)
    assert NO_CUE not in numbers((first, HEAD), (seat, PLACE), (again, HEAD), (nobody, HEAD))


def test_who_answers_a_prompt_anew_takes_its_cue() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    anew = edit("b", " Arbor Mills is  led by", "Ben")
    own = cue_number("Arbor Mills is led by")
    assert numbers((first, HEAD), (anew, HEAD)) == [own, own]
    # What no longer holds contests nothing.
    other = edit("c", "Who is at the head of Arbor Mills?", "Ben")
    assert NO_CUE not in numbers((first, HEAD), (anew, HEAD), (other, HEAD))
