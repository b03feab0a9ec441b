"""What comes next: the steps of a run, as they are to be trained.

Which edits a step takes, which part they go into and whom they invite follows from the edits and
their keys alone. No trained value has a say in it, under any settings: margins hold a part against
the prompts of other parts' edits, not against what was made of them, and merging comes after
training. So steps can be planned ahead, and parts be trained in any order, by anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit, find_conflicts
from wise_ext.editing.homes import answered_anew, guests_for, invited
from wise_ext.editing.ledger import ANYEDIT, WISE, edit_of, entry_of, is_passage, was_trained
from wise_ext.editing.naming import named_in
from wise_ext.editing.parts import Parts
from wise_ext.editing.practice import Coach
from wise_ext.editing.wise import Outcome
from wise_ext.memory import KeyIndex, TokenKeys

Ledger = list[dict[str, Any]]


class Task(NamedTuple):
    """One step that is to be trained.

    Attributes:
        method: one of ``METHODS``.
        step: its number.
        part: the part it goes into; of passages, which have one each, the first.
        edits: what the step takes, in order.
        guests: by edit, the edits of full parts that it asks in.
        joining: what is trained: the edits that no later one of the step supersedes, and guests.
        there: what the part was trained on before.
        foreign: edits of earlier parts, where margins are trained against them.
        values: those of the part's packed delta, fp32 ``[nnz]``; None for a part that is begun, or
            where an earlier task has yet to make them.
    """

    method: str
    step: int
    part: int
    edits: list[Edit]
    guests: dict[str, list[str]]
    joining: list[Edit]
    there: list[Edit]
    foreign: list[Edit]
    values: Tensor | None = None


@dataclass
class Outline:
    """A memory without its values: enough to say what comes next.

    Attributes:
        coach: makes keys of prompts.
        config: settings.
        in_turn: whether passages are written several at a time.
        index: the keys of all edits; None where nothing is found by key.
        parts: which are full.
        ledger: all edits.
        open: whether the last part is not full.
        there: what that one was trained on, in order.
        values: its packed delta's, as in ``Task``.
    """

    coach: Coach
    config: WiseConfig
    in_turn: bool
    index: KeyIndex | None
    parts: Parts
    ledger: Ledger
    open: bool
    there: list[Edit]
    values: Tensor | None

    def room(self, method: str) -> int:
        """How many edits the next step may take."""
        if method == ANYEDIT:
            # Each is written by itself; only those sought in turn gain from company.
            return self.config.batch_size if self.in_turn else 1
        return min(self.config.batch_size, self.config.shard_size - len(self.there))

    def plan(self, edits: Sequence[Edit], method: str) -> Task:
        """The step that takes these edits, no more than there is room for."""
        step = 1 + max((int(e["step"]) for e in self.ledger), default=-1)
        if method == ANYEDIT:
            first = self.parts.closed + self.open
            return passages(first, step, edits, answered_anew(self.ledger, edits))
        keys = [key for edit in edits for key in self.coach.found_by(edit)[:1]]
        guests = guests_for(self.index, self.config.radius, self.parts, self.ledger, edits, keys)
        task = lesson(self.config, self.ledger, self.parts.closed, step, edits, guests, self.there)
        return task._replace(values=self.values)

    def ahead(self) -> Outline:
        """An outline of its own, to be moved on by ``follow``."""
        return replace(
            self, index=copy(self.index), parts=copy(self.parts), ledger=list(self.ledger)
        )

    def follow(self, task: Task) -> None:
        """Go on as if a planned step were done. What passages are found by is left out: the same
        run plans nothing that would ask for it."""
        blank = {edit.id: Outcome(edit, None, 0, {}, 0.0, False) for edit in task.joining}
        entries = [
            entry_of(
                edit,
                blank.get(edit.id),
                method=task.method,
                part=task.part,
                step=task.step,
                guests=task.guests[edit.id],
            )
            for edit in task.edits
        ]
        self.ledger.extend(entries)
        self.values = None
        if task.method == ANYEDIT:
            self.parts.closed = task.part + len(task.joining)
            self.open, self.there = False, []
            return
        store_keys(self.index, self.coach, entries, [0])
        self.open, self.there = True, [*task.there, *task.joining]
        if len(self.there) >= self.config.shard_size:
            self.parts.closed += 1
            self.open, self.there = False, []


def lesson(
    config: WiseConfig,
    ledger: Ledger,
    part: int,
    step: int,
    edits: Sequence[Edit],
    guests: dict[str, list[str]],
    there: Sequence[Edit],
) -> Task:
    """A step of WISE edits into a part, given whom they ask in."""
    kept = _kept(edits)
    foreign = []
    if config.margins and config.replay:
        earlier = [e for e in ledger if e["part"] < part and not is_passage(e)]
        foreign = [edit_of(e) for e in earlier if was_trained(e)]
    joining = [*kept, *invited(ledger, there, kept, guests)]
    return Task(WISE, step, part, list(edits), guests, joining, list(there), foreign)


def passages(first: int, step: int, edits: Sequence[Edit], guests: dict[str, list[str]]) -> Task:
    """A step of AnyEdit edits, into parts from ``first`` on."""
    return Task(ANYEDIT, step, first, list(edits), guests, _kept(edits), [], [])


def store_keys(index: KeyIndex | None, coach: Coach, entries: Ledger, slots: Sequence[int]) -> None:
    """Let edits be found, one slot each or all in one; those that nobody trained are not."""
    trained = [e for e in entries if was_trained(e)]
    if index is not None and trained:
        keys = [_addresses(coach, e) for e in trained]
        each = list(slots) * len(keys) if len(slots) == 1 else slots
        index.add_worded(keys, each, [e["id"] for e in trained])


def _addresses(coach: Coach, entry: dict[str, Any]) -> list[TokenKeys]:
    edit = edit_of(entry)
    if is_passage(entry):
        # It is to be found in other words, too, and there is no practice to tell them apart by.
        return coach.addresses(edit.prompt, edit.subject or named_in(edit.prompt))
    return coach.found_by(edit)


def _kept(edits: Sequence[Edit]) -> list[Edit]:
    """Those of a step that no later one of it supersedes."""
    replaced = {older for older, _ in find_conflicts(edits)}
    return [edit for edit in edits if edit.id not in replaced]
