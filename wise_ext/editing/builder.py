"""A side memory as it is built, step by step, and taken apart again: the memory, its ledger, parts.

Everything here follows from the model, the settings and the ledger, so any part of a memory can be
made again to the same bits. What a step leaves is enough to take it without training (``Step``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit, find_conflicts
from wise_ext.editing.homes import (
    answered_anew,
    guests_for,
    invited,
    joining,
    parts_with_guest,
    settle,
    trained_in,
)
from wise_ext.editing.ledger import (
    ANYEDIT,
    WISE,
    edit_of,
    entry_of,
    is_passage,
    was_trained,
)
from wise_ext.editing.naming import named_in
from wise_ext.editing.parts import Parts, count_parts, steps_of
from wise_ext.editing.passages import PassageWriter
from wise_ext.editing.wise import OpenShard
from wise_ext.editing.workshop import Workshop
from wise_ext.memory import LowRankShard, Shard, SideMemory, TokenKeys

Ledger = list[dict[str, Any]]
Progress = Callable[[int], None]


class Step(NamedTuple):
    """What a step did: its ledger entries, the tensors of the part that it leaves open, and those
    that it leaves for good."""

    entries: Ledger
    state: dict[str, Tensor]
    kept: dict[str, Tensor] | None


class MemoryBuilder:
    """One memory in the making.

    Args:
        shop: model, tokenizer and what is made of them.
        config: settings.
        anyedit: of passages.
        memory: to be built on; None begins with an empty one.
        ledger: its edits.
        closed: how many of its parts are full.
    """

    def __init__(
        self,
        shop: Workshop,
        config: WiseConfig,
        anyedit: AnyEditConfig,
        memory: SideMemory | None = None,
        ledger: Ledger | None = None,
        closed: int = 0,
    ) -> None:
        self._shop = shop
        self._writer = shop.writer
        self._config = config
        self._anyedit = anyedit
        self.memory = memory or shop.empty_memory()
        self.ledger = ledger or []
        self.parts = Parts.of(config, closed)
        self._open: OpenShard | None = None
        self._reopen()

    def room(self, method: str) -> int:
        """How many edits the next step may take."""
        if method == ANYEDIT:
            # Each is written by itself; only those sought in turn gain from company.
            return self._config.batch_size if self._anyedit.schedule == "in_turn" else 1
        taken = len(self._open.edits) if self._open else 0
        return min(self._config.batch_size, self._config.shard_size - taken)

    def write(self, edits: list[Edit], method: str, progress: Progress) -> Step:
        """One step: edits into the open part, or (``"anyedit"``) each into a part of its own.

        Raises:
            DataError: an edit has no tokens.
        """
        step = 1 + max((int(e["step"]) for e in self.ledger), default=-1)
        if method == ANYEDIT:
            first = len(self.memory.shards)
            guests = answered_anew(self.ledger, edits)
            entries, passages = self._passages(edits, guests, first, step, progress)
            self._take_passages(entries, passages)
            return Step(entries, {}, _tensors_of(passages))
        if self._open is None:
            self._open = self._writer.open(self.parts.closed)
        guests = guests_for(self.memory, self.parts, self.ledger, edits, self._keys(edits))
        entries, shard = self._train(self._open, edits, guests, step, progress)
        full = len(self._open.edits) >= self._config.shard_size
        self._take(entries, shard, self._open.edits, full)
        state = {
            "values": shard.values,
            "threshold": torch.tensor(shard.threshold, dtype=torch.float64),
        }
        return Step(entries, {} if full else state, state if full else None)

    def replay(
        self,
        steps: list[Ledger],
        state: dict[str, Tensor],
        kept: list[dict[str, Tensor]],
    ) -> None:
        """Take steps that were recorded, without training anything again.

        Args:
            steps: the entries of each.
            state: the latest step's.
            kept: of each step, empty where it kept nothing.
        """
        if any(is_passage(e) for entries in steps for e in entries):
            for entries, tensors in zip(steps, kept, strict=True):
                self._take_passages(entries, _passages_of(tensors))
            return
        blank = self._writer.open(self.parts.closed)
        blank.edits = trained_in(self.ledger, blank.number)
        for number, (entries, full) in enumerate(zip(steps, kept, strict=True)):
            blank.edits += joining(self.ledger, blank.edits, entries)
            packed = full or (state if number == len(steps) - 1 else None)
            shard = blank.seal(-math.inf)
            if packed is not None:
                shard.values = packed["values"]
                shard.threshold = float(packed["threshold"])
            self._take(entries, shard, blank.edits, bool(full))
            if full:
                blank = self._writer.open(self.parts.closed)
        self._reopen()

    def undo(self, edit_id: str) -> None:
        """Take one edit, which the ledger has, back; see ``Editor.undo``."""
        entry = next(e for e in self.ledger if e["id"] == edit_id)
        total = max(count_parts(self.ledger), self.parts.closed)
        parts = {*self.parts.beside(entry["part"], total), *parts_with_guest(self.ledger, edit_id)}
        if self._config.margins and self._config.replay:
            parts = set(range(min(parts), total))
        self.ledger = [e for e in self.ledger if e["id"] != edit_id]
        for other in self.ledger:
            other["guests"] = [name for name in other["guests"] if name != edit_id]
        for group in self.parts.by_slots(sorted(parts)):
            first, last = self.parts.slot(group[0]), self.parts.slot(group[-1])
            self.memory.shards[first : last + 1] = self._retrained(group, first)
        # A part that is full keeps its place when it empties; the open one never was, then.
        if total > max(count_parts(self.ledger), self.parts.closed):
            del self.memory.shards[-1]
        self._renumber()
        self._reopen()

    @cached_property
    def _passage_writer(self) -> PassageWriter:
        return self._shop.passages(self._anyedit)

    # -- what a step is made of ------------------------------------------------------------------

    def _train(
        self,
        shard: OpenShard,
        edits: list[Edit],
        guests: dict[str, list[str]],
        step: int,
        progress: Progress = lambda settled: None,
    ) -> tuple[Ledger, Shard]:
        """Train one step; its ledger entries and the shard sealed as it then is."""
        kept = _kept(edits)
        asked = invited(self.ledger, shard.edits, kept, guests)
        earlier = [e for e in self.ledger if e["part"] < shard.number and not is_passage(e)]
        foreign = [edit_of(e) for e in earlier if was_trained(e)]
        outcomes = {
            o.edit.id: o for o in self._writer.write(shard, [*kept, *asked], foreign, progress)
        }
        entries = [
            entry_of(
                edit,
                outcomes.get(edit.id),
                method=WISE,
                part=shard.number,
                slot=self.parts.slot(shard.number),
                step=step,
                guests=guests[edit.id],
            )
            for edit in edits
        ]
        return entries, shard.seal(self._writer.threshold(shard.delta, shard.edits))

    def _passages(
        self,
        edits: list[Edit],
        guests: dict[str, list[str]],
        first: int,
        step: int,
        progress: Progress = lambda done: None,
    ) -> tuple[Ledger, list[LowRankShard]]:
        """Write one step of passages, into parts from ``first`` on: entries and shards."""
        kept = _kept(edits)
        written = self._passage_writer.write(kept, progress)
        place = {outcome.edit.id: first + n for n, (outcome, _) in enumerate(written)}
        outcomes = {outcome.edit.id: outcome for outcome, _ in written}
        beside = dict(find_conflicts(edits))
        entries = []
        for edit in edits:
            part = place[beside.get(edit.id, edit.id)]
            entries.append(
                entry_of(
                    edit,
                    outcomes.get(edit.id),
                    method=ANYEDIT,
                    part=part,
                    slot=part,
                    step=step,
                    guests=guests[edit.id],
                )
            )
        return entries, [shard for _, shard in written]

    def _take(self, entries: Ledger, shard: Shard, trained: list[Edit], full: bool) -> None:
        """Put a step's shard, all it was trained on so far, its keys and its entries into the
        memory; close the part if it is full."""
        part = int(entries[0]["part"])
        slot = self.parts.slot(part)
        if slot < len(self.memory.shards):
            self.memory.replace_shard(slot, shard)
        else:
            self.memory.add_shard(shard)
        self.ledger.extend(entries)
        self._add_keys([e for e in entries if was_trained(e)], [slot])
        if full:
            self._close()
        settle(self.memory, self.parts, self.ledger, {part: trained})

    def _take_passages(self, entries: Ledger, shards: list[LowRankShard]) -> None:
        """Put a step's passages into the memory, each a part of its own. A part that was open is
        full now, however little it holds."""
        if self.parts.closed < len(self.memory.shards):
            self._close()
        slots = [self.memory.add_shard(shard) for shard in shards]
        self.parts.closed += len(shards)
        self.ledger.extend(entries)
        self._add_keys([e for e in entries if was_trained(e)], slots)
        settle(self.memory, self.parts, self.ledger, {slot: [] for slot in slots})

    def _close(self) -> None:
        self.parts.close(self.memory, self._config, self._threshold)
        self._open = None
        self._shop.coach.forget()

    def _retrained(self, parts: list[int], slot: int) -> list[Shard | LowRankShard]:
        """The memory's shards that ``parts`` make, the first of them at ``slot``, written again
        from the ledger."""
        if isinstance(self.memory.shards[slot], LowRankShard):
            return [self._rewritten(parts[0])]
        scratch = SideMemory(self.memory.layer, self.memory.shape, routing="indicator")
        state = Parts(self.parts.group, self.parts.single, 0 if self.parts.single else parts[0])
        for part in parts:
            shard = self._writer.open(part)
            sealed = shard.seal(math.inf)
            for step, entries in steps_of(self.ledger, part):
                guests = {e["id"]: e["guests"] for e in entries}
                fresh, sealed = self._train(shard, [edit_of(e) for e in entries], guests, step)
                for old, new in zip(entries, fresh, strict=True):
                    old.update(new)
            scratch.add_shard(sealed)
            if part < self.parts.closed:
                state.close(scratch, self._config, self._threshold)
        return scratch.shards

    def _rewritten(self, part: int) -> LowRankShard:
        """A passage's shard; without an edit left, one that does nothing."""
        for step, entries in steps_of(self.ledger, part):
            guests = {e["id"]: e["guests"] for e in entries}
            fresh, shards = self._passages([edit_of(e) for e in entries], guests, part, step)
            for old, new in zip(entries, fresh, strict=True):
                old.update(new)
            return shards[0]
        return LowRankShard.empty(self.memory.shape)

    def _threshold(self, memory: SideMemory, place: int) -> float:
        """Eq. 6 for a merged shard: merging has changed every indicator."""
        ids = set(memory.shards[place].edit_ids)
        edits = [edit_of(e) for e in self.ledger if e["id"] in ids]
        return self._writer.threshold(memory.shards[place].dense(), edits)

    # -- keys and places -------------------------------------------------------------------------

    def _add_keys(self, entries: Ledger, slots: list[int]) -> None:
        """Let edits be found, one slot each or all in one."""
        if self.memory.key_index is not None and entries:
            keys = [self._addresses(e) for e in entries]
            each = slots * len(keys) if len(slots) == 1 else slots
            self.memory.key_index.add_worded(keys, each, [e["id"] for e in entries])

    def _addresses(self, entry: dict[str, Any]) -> list[TokenKeys]:
        edit, coach = edit_of(entry), self._shop.coach
        if is_passage(entry):
            # It is to be found in other words, too, and there is no practice to tell them apart by.
            return coach.addresses(edit.prompt, edit.subject or named_in(edit.prompt))
        return coach.practice(edit).addresses

    def _keys(self, edits: list[Edit]) -> list[TokenKeys]:
        return [key for e in edits for key in self._shop.coach.practice(e).addresses[:1]]

    def _renumber(self) -> None:
        """After an undo: steps without a gap, slots and keys in the ledger's order."""
        steps = {old: new for new, old in enumerate(sorted({e["step"] for e in self.ledger}))}
        for entry in self.ledger:
            entry["step"] = steps[entry["step"]]
        index = self.memory.key_index
        if index is not None:
            trained = [e for e in self.ledger if was_trained(e)]
            lost = [e for e in trained if e["id"] not in set(index.ids)]
            self._add_keys(lost, [0])
            index.reorder([e["id"] for e in trained])
        every = range(count_parts(self.ledger))
        there = {part: trained_in(self.ledger, part) for part in every}
        settle(self.memory, self.parts, self.ledger, there)

    def _reopen(self) -> None:
        """Take the last part up again, if it is not full."""
        part = self.parts.closed
        edits = trained_in(self.ledger, part)
        slot = self.parts.slot(part)
        self._open = None
        if slot < len(self.memory.shards):
            shard = self.memory.shards[slot]
            assert isinstance(shard, Shard)  # a passage's part is full from the beginning
            self._open = self._writer.open(part, shard, edits)


def _kept(edits: Sequence[Edit]) -> list[Edit]:
    """Those of a step that no later one of it supersedes."""
    replaced = {older for older, _ in find_conflicts(edits)}
    return [edit for edit in edits if edit.id not in replaced]


def _tensors_of(passages: Sequence[LowRankShard]) -> dict[str, Tensor]:
    return {
        f"{name}.{i}": getattr(shard, name)
        for i, shard in enumerate(passages)
        for name in ("left", "right")
    }


def _passages_of(tensors: dict[str, Tensor]) -> list[LowRankShard]:
    count = len(tensors) // 2
    return [LowRankShard(tensors[f"left.{i}"], tensors[f"right.{i}"]) for i in range(count)]
