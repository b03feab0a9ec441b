"""Where edits are found: the last part that they were trained in."""

from __future__ import annotations

from typing import Any

from wise_ext.editing.homes import homes_of, parts_with_guest


def _entry(name: str, part: int, *guests: str, shard: int | None = 0) -> dict[str, Any]:
    return {"id": name, "part": part, "shard": shard, "guests": list(guests)}


def test_homes() -> None:
    ledger = [
        _entry("a", 0),
        _entry("b", 0),
        _entry("c", 1, "a"),
        _entry("d", 2, "a", "c"),
        _entry("e", 3, "b"),
        _entry("f", 3, "b"),
    ]
    assert homes_of(ledger) == {"a": 2, "b": 3, "c": 2, "d": 2, "e": 3, "f": 3}
    # In what order the parts were trained again says nothing.
    assert homes_of([*reversed(ledger)]) == homes_of(ledger)
    assert parts_with_guest(ledger, "a") == [1, 2]
    assert parts_with_guest(ledger, "f") == []
    assert homes_of([]) == {}


def test_an_edit_that_was_not_trained_invites_nobody() -> None:
    ledger = [_entry("a", 0), _entry("b", 1, "a", shard=None), _entry("c", 1)]
    assert homes_of(ledger)["a"] == 0
    # It will, though, if the edit that replaced it is undone.
    assert parts_with_guest(ledger, "a") == [1]


def test_a_guest_that_is_gone_has_no_home() -> None:
    assert homes_of([_entry("b", 1, "a")]) == {"b": 1}
