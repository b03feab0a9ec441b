"""Which edits share a shard: what a prompt could confuse is kept together.

A new edit invites, as its guests, the edits of full shards that its prompt could be taken for, or
that could be taken for it. They are trained again, together with it, in its shard, and found there
from then on: telling them apart is a matter of training then, and not of routing. Every entry of
the ledger names the guests it asked for, so that a shard can be trained again from the ledger.

A passage (an edit written by AnyEdit) has a shard of its own. It is nobody's guest; as its guests
count the edits whose prompt it answers anew, which are found there from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wise_ext.editing.cueing import cue_numbers
from wise_ext.editing.edits import Edit, find_conflicts, squeezed
from wise_ext.editing.ledger import edit_of, is_passage, was_trained
from wise_ext.editing.parts import Parts, steps_of
from wise_ext.memory import NO_CUE, KeyIndex, SideMemory, TokenKeys

Ledger = Sequence[dict[str, Any]]


def guests_for(
    index: KeyIndex | None,
    radius: float,
    parts: Parts,
    ledger: Ledger,
    edits: Sequence[Edit],
    keys: Sequence[TokenKeys],
) -> dict[str, list[str]]:
    """By new edit, the edits of full shards that it could be confused with.

    One that is a guest in the open shard already is named again: it must stay when the edit that
    asked it in is undone.

    Args:
        index: the keys of the edits so far; without it, or where shards are merged, nobody has
            guests.
        radius: score above which one may be taken for the other.
        parts: which are full.
        ledger: the edits so far.
        edits: the new ones.
        keys: the tokens of their prompts.
    """
    if index is None or not parts.apart:
        return {edit.id: [] for edit in edits}
    full = {e["id"] for e in ledger if e["part"] < parts.closed and not is_passage(e)}
    anew = answered_anew([e for e in ledger if is_passage(e)], edits)
    near = index.like(keys, radius)
    return {
        edit.id: [name for name in names if name in full] + anew[edit.id]
        for edit, names in zip(edits, near, strict=True)
    }


def answered_anew(ledger: Ledger, edits: Sequence[Edit]) -> dict[str, list[str]]:
    """By new edit, the edits of a ledger that have its prompt."""
    there: dict[str, list[str]] = {}
    for entry in ledger:
        there.setdefault(squeezed(entry["record"]["prompt"]), []).append(entry["id"])
    return {edit.id: there.get(squeezed(edit.prompt), []) for edit in edits}


def invited(
    ledger: Ledger, there: Sequence[Edit], edits: Sequence[Edit], guests: dict[str, list[str]]
) -> list[Edit]:
    """The guests of new edits that are not ``there`` in the shard yet and still say what holds."""
    present = {edit.id for edit in (*there, *edits)}
    wanted = {name for edit in edits for name in guests[edit.id]} - present
    known = [edit_of(e) for e in ledger if e["id"] in wanted and not is_passage(e)]
    replaced = {older for older, _ in find_conflicts([*known, *there, *edits])}
    return [edit for edit in known if edit.id not in replaced]


def trained_in(ledger: Ledger, part: int) -> list[Edit]:
    """What a part was trained on, guests included, in order; nothing, if it is a passage."""
    there: list[Edit] = []
    for _, entries in steps_of([e for e in ledger if not is_passage(e)], part):
        there += joining(ledger, there, entries)
    return there


def joining(ledger: Ledger, there: Sequence[Edit], entries: Ledger) -> list[Edit]:
    """What one step of the ledger added to a part: its edits and their guests."""
    new = [edit_of(e) for e in entries if was_trained(e)]
    return [*new, *invited(ledger, there, new, {e["id"]: e["guests"] for e in entries})]


def settle(
    memory: SideMemory, parts: Parts, ledger: Ledger, trained: Mapping[int, Sequence[Edit]]
) -> None:
    """Every edit is found in the last shard that it was trained in, and listed there alone.

    Args:
        memory: changed in place.
        parts: where they went.
        ledger: all edits so far.
        trained: of the parts that have changed, what they were trained on; their edits' cues are
            settled anew. A passage has none.
    """
    homes = homes_of(ledger)
    held: list[list[str]] = [[] for _ in memory.shards]
    for entry in ledger:
        if was_trained(entry):
            entry["shard"] = parts.slot(homes[entry["id"]])
            held[entry["shard"]].append(entry["id"])
    index = memory.key_index
    if index is not None:
        asked = index.stored_asks()
        numbers = dict(zip(index.ids, index.cues.tolist(), strict=True))
        prompts = {e["id"]: squeezed(e["record"]["prompt"]) for e in ledger}
        for part, edits in trained.items():
            cues = cue_numbers(edits, [asked[edit.id] for edit in edits])
            found = (name for name in numbers if homes[name] == part)
            numbers.update({name: cues.get(prompts[name], NO_CUE) for name in found})
        index.place([parts.slot(homes[n]) for n in index.ids], [numbers[n] for n in index.ids])
    if parts.apart:
        for shard, ids in zip(memory.shards, held, strict=True):
            shard.edit_ids = ids


def homes_of(ledger: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The part each edit is found in: the last it was trained in, on its own account or as the
    guest of a later edit. One whose prompt a later edit answers anew is found beside that edit,
    without having been trained there: no wording may lead back to the old answer."""
    homes = {e["id"]: int(e["part"]) for e in ledger}
    trained = {e["id"] for e in ledger if was_trained(e)}
    for entry in ledger:
        for guest in entry["guests"] if was_trained(entry) else ():
            if guest in trained:
                homes[guest] = max(homes[guest], int(entry["part"]))
    return homes


def parts_with_guest(ledger: Sequence[dict[str, Any]], edit_id: str) -> list[int]:
    """The parts that an edit was trained in as a guest, or whose guests it may have asked in."""
    return [int(e["part"]) for e in ledger if edit_id in e["guests"]]
