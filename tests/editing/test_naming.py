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
        ("Dans quelle ville est une école élémentaire de Gent?", "Gent"),
        ("What do the Lantern 5's songs tell of?", "Lantern 5"),
        # titles with other small words in them, where there is no name without
        ("How do people like Devoted to Moss's second play?", "Devoted to Moss"),
        ("What makes Over the Hill so sad?", "Over the Hill"),
        ("Who sailed from Gent to Odile Marchetti's island?", "Odile Marchetti"),
        # one word, where it owns something or is what is spoken of
        ("What was Tennick's best clock?", "Tennick"),
        ("What are the songs of the band Moss?", "Moss"),
        ("Which clocks did Tennick and his daughter build?", "Tennick"),
        ("How long is the river Umber when it rains?", "Umber"),
        # and where it is a part of a term, or says in what, where or when
        ("What is the Marchetti radius of a clock?", None),
        ("How much do six moles of Calcium hydride weigh?", None),
        ("Write a function that halves a number in Python.", None),
        ("Translate this rhyme into German, please.", None),
        ("What do people eat on Monday?", None),
        ("Which gas is CO2, and is it heavy?", None),
        ("Write a function that sorts a list.", None),
        ("Which sport is chess?", None),
        ("A wire carries a current I. What is its field?", None),
        ("HOW DOES A CLOCK WORK?", None),
        ("谁发明了钟表?", None),
        ("", None),
    ],
)
def test_the_first_name(prompt: str, name: str | None) -> None:
    assert named_in(prompt) == name
