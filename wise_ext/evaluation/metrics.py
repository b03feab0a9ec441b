"""Text comparison and means: what counts as the same answer."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def normalise(text: str) -> str:
    """``text`` trimmed, case folded and without punctuation at its ends.

    A text of nothing but punctuation keeps it, so that two different ones stay different.
    """
    folded = unicodedata.normalize("NFC", text).strip().casefold()
    start, end = 0, len(folded)
    while start < end and _is_edge(folded[start]):
        start += 1
    while end > start and _is_edge(folded[end - 1]):
        end -= 1
    return folded[start:end] or folded


def same_text(answer: str, target: str) -> bool:
    """Whether the whole answer is the target, after :func:`normalise`."""
    return normalise(answer) == normalise(target)


def contains(answer: str, target: str) -> bool:
    """Whether the target occurs anywhere in the answer, after :func:`normalise`."""
    return normalise(target) in normalise(answer)


def share_equal(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """The share of positions at which two equally long, non-empty sequences agree."""
    hits = sum(p == e for p, e in zip(predicted, expected, strict=True))
    return hits / len(expected)


def mean(values: Iterable[float | bool | None]) -> float | None:
    """The mean of the values that are there; ``None`` where none is."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")
