"""Algorithm 1's rules, on points of a plane."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.editing.methods.codebook import Codebook

Point = tuple[float, float]
# Quarters: distances and their halves are as good as exact, and collisions happen.
coordinate = st.integers(-12, 12).map(lambda n: n / 4)
point = st.tuples(coordinate, coordinate)
edits = st.lists(st.tuples(point, st.integers(0, 2)), min_size=1, max_size=12)
ROOM = 1e-5


def tensor(place: Point) -> torch.Tensor:
    return torch.tensor(place)


def snapshot(book: Codebook) -> list[tuple[Point, float, tuple[int, ...]]]:
    keys = [(float(x), float(y)) for x, y in book.keys]
    return list(zip(keys, book.radii.tolist(), book.targets, strict=True))


def nearest(book: Codebook, place: Point) -> tuple[float, int]:
    """Distance and entry, the newest of equals."""
    pairs = [(math.dist(key, place), -i) for i, (key, _, _) in enumerate(snapshot(book))]
    distance, entry = min(pairs)
    return distance, -entry


def filled(sequence: list[tuple[Point, int]], radius: float = 1.0) -> Codebook:
    book = Codebook(radius)
    for number, (key, target) in enumerate(sequence):
        book.admit(tensor(key), [target], torch.tensor([float(number)]))
    return book


@given(edits, st.floats(0.25, 2))
def test_an_edit_is_found_by_its_own_key(sequence: list[tuple[Point, int]], radius: float) -> None:
    book = Codebook(radius)
    for number, (key, target) in enumerate(sequence):
        shared = book.shared(tensor(key), [target])
        entry = book.admit(tensor(key), [target], torch.tensor([float(number)]))
        assert book.find(tensor(key)[None]).tolist() == [entry]
        assert book.targets[entry] == (target,)
        assert float(book.values[entry]) == number
        assert shared is None or shared == entry
        assert len(book) == len(book.keys) == len(book.values) == len(book.radii) <= number + 1
        assert (book.radii > 0).all()


@given(edits, point, st.integers(0, 2))
def test_add_expand_split(sequence: list[tuple[Point, int]], key: Point, target: int) -> None:
    book = filled(sequence)
    before, (distance, near) = snapshot(book), nearest(book, key)
    entry = book.admit(tensor(key), [target], torch.zeros(1))
    after = snapshot(book)
    # Nobody but the nearest entry is touched, and no key moves.
    for i, (old, new) in enumerate(zip(before, after, strict=False)):
        assert old[0] == new[0]
        assert old == new or i == near
    radius = before[near][1]
    if distance > radius + 1 + ROOM:  # add
        assert entry == len(before) and after == [*before, (key, 1.0, (target,))]
    elif distance < radius + 1 - ROOM and before[near][2] == (target,):  # expand
        assert entry == near and len(after) == len(before)
        assert after[near][1] == pytest.approx(max(radius, distance))
        assert book.shared(tensor(key), [target]) == near
    elif distance == 0:  # taken over
        assert entry == near and len(after) == len(before)
        assert after[near] == (before[near][0], radius, (target,))
    elif distance < radius + 1 - ROOM:  # split
        assert entry == len(before) == len(after) - 1
        assert after[near][1] == after[entry][1] == pytest.approx(distance / 2)


@given(edits, st.lists(point, min_size=1, max_size=5))
def test_lookup_takes_the_nearest_or_defers(
    sequence: list[tuple[Point, int]], queries: list[Point]
) -> None:
    book = filled(sequence)
    found = book.find(torch.tensor(queries)).tolist()
    for query, entry in zip(queries, found, strict=True):
        distance, near = nearest(book, query)
        radius = float(book.radii[near])
        if abs(distance - radius) > ROOM:
            assert entry == (near if distance < radius else -1)
            assert [entry] == book.find(tensor(query)[None]).tolist()
        if entry >= 0:
            assert math.dist(query, book.keys[entry].tolist()) <= float(book.radii[entry]) + ROOM


def test_an_empty_codebook_defers() -> None:
    book = Codebook(1.0)
    assert len(book) == 0
    assert book.find(torch.rand(3, 2)).tolist() == [-1, -1, -1]
    assert book.shared(torch.rand(2), [1]) is None


def test_by_hand() -> None:
    """A stream on a line: added, expanded, added, split; then each point asks for its own."""
    book = Codebook(1.0)
    stream = [(0.0, 7), (1.5, 7), (6.0, 8), (2.5, 9), (2.5, 7)]
    entries = [book.admit(torch.tensor([x]), [y], torch.tensor([x + y])) for x, y in stream]
    # 1.5 < 1 + 1 expands to 1.5; 2.5 <= 1.5 + 1 splits into 1.25 and 1.25, then is taken over.
    assert entries == [0, 0, 1, 2, 2]
    assert book.radii.tolist() == [1.25, 1.0, 1.25]
    assert book.targets == [(7,), (8,), (7,)]
    assert book.values[:, 0].tolist() == [8.5, 14.0, 9.5]
    asked = torch.tensor([[-1.25], [-1.3], [1.2], [1.3], [3.7], [3.8], [5.0], [7.0], [7.1]])
    assert book.find(asked).tolist() == [0, -1, 0, 2, 2, -1, 1, 1, -1]


def test_short_distances_between_long_keys_are_exact() -> None:
    """As keys are: thousands of numbers, neighbours that differ in the sixth place."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(4096, generator=generator) * 100
    near = key + 1e-3 * torch.randn(4096, generator=generator)
    book = Codebook(0.1)
    book.admit(key, [1], torch.zeros(1))
    true = float((key.double() - near.double()).norm())
    assert 0.05 < true < 0.1
    assert book.find(near[None]).tolist() == [0]
    book.admit(near, [2], torch.ones(1))
    assert book.radii.tolist() == pytest.approx([true / 2] * 2, rel=1e-2)
