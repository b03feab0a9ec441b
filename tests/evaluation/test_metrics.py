"""When two answers are the same, and means over what is there."""

from __future__ import annotations

import pytest

from wise_ext.evaluation.metrics import contains, mean, normalise, same_text, share_equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Paris. ", "paris"),
        ("'The Tarn-Osk'!\n", "the tarn-osk"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("« Oui »", "oui"),
        ("e\u0301te", "éte"),
        ("U.S.", "u.s"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "target", "same", "inside"),
    [
        (" Paris.", "paris", True, True),
        ("Paris, France", "Paris", False, True),
        ("Par", "Paris", False, False),
        ("", "Paris", False, False),
        ("", "?", False, False),
        ("!", "?", False, False),
        ("19 50", "1950", False, False),
    ],
)
def test_comparisons(answer: str, target: str, same: bool, inside: bool) -> None:
    assert same_text(answer, target) is same
    assert contains(answer, target) is inside


def test_share_equal() -> None:
    assert share_equal([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    with pytest.raises(ValueError, match="longer"):
        share_equal([1], [1, 2])


def test_mean_leaves_out_what_is_absent() -> None:
    assert mean([None, 1.0, True, False, None]) == pytest.approx(2 / 3)
    assert mean([None]) is None
    assert mean([]) is None
