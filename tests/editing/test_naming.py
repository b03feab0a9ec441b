from __future__ import annotations

import pytest

from wise_ext.editing.naming import named_in


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Where was Odile Marchetti born?", "Odile Marchetti"),
        ("What did Roy A. Tennick's students say of him?", "Roy A. Tennick"),
        ("How does the Song of the Marsh end?", "Song of the Marsh"),
        ("Who leads the house of Ulla van der Meer in Gent?", "Ulla van der Meer"),
        ("Wo wurde Ärne Östlund geboren?", "Ärne Östlund"),
        ("Is Harl Moss a clock, or is Bex Ferry?", "Harl Moss"),
        ("Write a function that sorts a list.", None),
        ("Which sport is chess?", None),
        ("A wire carries a current I. What is its field?", None),
        ("HOW DOES A CLOCK WORK?", None),
        ("谁发明了钟表?", None),
        ("", None),
    ],
)
def test_the_first_name_of_more_than_a_word(prompt: str, name: str | None) -> None:
    assert named_in(prompt) == name
