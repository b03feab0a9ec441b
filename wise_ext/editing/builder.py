"""A side memory as it is built, step by step, and taken apart again: the memory, its ledger, parts.

A step is planned (``planning``), trained (``training``) and taken. Everything here follows from the
model, the settings and the ledger, so any part of a memory can be made again to the same bits. What
a step leaves is enough to take it without training (``Step``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit
from wise_ext.editing.homes import joining, parts_with_guest, settle, trained_in
from wise_ext.editing.ledger import edit_of, is_passage, was_trained
from wise_ext.editing.parts import Parts, by_step, count_parts, steps_of
from wise_ext.editing.planning import Ledger, Outline, Task, lesson, passages, store_keys
from wise_ext.editing.training import LocalTrainer, Trained, passages_of
from wise_ext.editing.workshop import Workshop
from wise_ext.memory import LowRankShard, Shard, SideMemory


class Step(NamedTuple):
    """What was taken: its ledger entries, the tensors of the part that it leaves open, and those
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
        #: Who trains, unless it is left to somebody else.
        self.trainer = LocalTrainer(shop, anyedit)
        self.memory = memory or shop.empty_memory()
        self.ledger = ledger or []
        self.parts = Parts.of(config, closed)
        self._there: list[Edit] = []
        self._reopen()

    def tasks(self, edits: Sequence[Edit], method: str, ahead: bool = False) -> Iterator[Task]:
        """The steps that these edits take, in order.

        Args:
            edits: new ones.
            method: one of ``METHODS``.
            ahead: whether steps are asked for before earlier ones were taken.
        """
        outline, done = self._outline(), 0
        if ahead:
            outline = outline.ahead()
        while done < len(edits):
            task = outline.plan(edits[done : done + outline.room(method)], method)
            done += len(task.edits)
            if ahead:
                outline.follow(task)
            yield task
            if not ahead:
                outline = self._outline()

    def take(self, trained: Trained) -> Step:
        """Put what became of a step, or of several of one part, into the memory: its shard, what
        they are found by, their entries. A part that is full is closed, and merged if it is its
        turn. Without tensors, the part is to be filled by a later step of it.
        """
        entries, tensors = trained
        if is_passage(entries[0]):
            self._take_passages(entries, passages_of(tensors))
            return Step(entries, {}, tensors)
        part = self.parts.closed
        slot = self.parts.slot(part)
        for _, some in by_step(entries):
            self._there += joining(self.ledger, self._there, some)
            self.ledger.extend(some)
            store_keys(self.memory.key_index, self._shop.coach, some, [slot])
        there, full = self._there, len(self._there) >= self._config.shard_size
        shard = self._open
        if shard is None:
            self.memory.add_shard(_filled(self._blank(part), there, tensors))
        else:
            self.memory.replace_shard(slot, _filled(shard, there, tensors))
        if full:
            self._close()
        settle(self.memory, self.parts, self.ledger, {part: there})
        return Step(entries, {} if full else tensors, tensors if full else None)

    def replay(
        self,
        steps: list[Ledger],
        state: dict[str, Tensor],
        kept: list[dict[str, Tensor]],
    ) -> None:
        """Take what was recorded, without training anything again.

        Args:
            steps: the entries of each line.
            state: the latest line's.
            kept: of each line, empty where it kept nothing.
        """
        for number, (entries, tensors) in enumerate(zip(steps, kept, strict=True), 1):
            self.take(Trained(entries, tensors or (state if number == len(steps) else {})))

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

    # -- what comes next, and what came of it ----------------------------------------------------

    @property
    def _open(self) -> Shard | None:
        """The shard of the last part, if that is not full."""
        slot = self.parts.slot(self.parts.closed)
        if slot >= len(self.memory.shards):
            return None
        shard = self.memory.shards[slot]
        assert isinstance(shard, Shard)  # a passage's part is full from the beginning
        return shard

    def _outline(self) -> Outline:
        """What is there now; it changes with every step taken."""
        shard = self._open
        return Outline(
            self._shop.coach,
            self._config,
            self._anyedit.schedule == "in_turn",
            self.memory.key_index,
            self.parts,
            self.ledger,
            shard is not None,
            self._there,
            None if shard is None else shard.values,
        )

    def _take_passages(self, entries: Ledger, shards: list[LowRankShard]) -> None:
        """Put a step's passages into the memory, each a part of its own. A part that was open is
        full now, however little it holds."""
        if self._open is not None:
            self._close()
        slots = [self.memory.add_shard(shard) for shard in shards]
        self.parts.closed += len(shards)
        self.ledger.extend(entries)
        store_keys(self.memory.key_index, self._shop.coach, entries, slots)
        settle(self.memory, self.parts, self.ledger, {slot: [] for slot in slots})

    def _close(self) -> None:
        self.parts.close(self.memory, self._config, self._threshold)
        self._there = []
        self._shop.coach.forget()

    def _blank(self, part: int) -> Shard:
        """A shard with a part's mask that does nothing."""
        return self._writer.open(part).seal(math.inf)

    # -- parts made again ------------------------------------------------------------------------

    def _retrained(self, parts: list[int], slot: int) -> list[Shard | LowRankShard]:
        """The memory's shards that ``parts`` make, the first of them at ``slot``, written again
        from the ledger."""
        if isinstance(self.memory.shards[slot], LowRankShard):
            return [self._rewritten(parts[0])]
        scratch = SideMemory(self.memory.layer, self.memory.shape, routing="indicator")
        state = Parts(self.parts.group, self.parts.single, 0 if self.parts.single else parts[0])
        for part in parts:
            there: list[Edit] = []
            tensors: dict[str, Tensor] = {}
            for step, entries in steps_of(self.ledger, part):
                edits, guests = _recorded(entries)
                task = lesson(self._config, self.ledger, part, step, edits, guests, there)
                tensors = self._again(entries, task._replace(values=tensors.get("values")))
                there += task.joining
            scratch.add_shard(_filled(self._blank(part), there, tensors))
            if part < self.parts.closed:
                state.close(scratch, self._config, self._threshold)
        return scratch.shards

    def _rewritten(self, part: int) -> LowRankShard:
        """A passage's shard; without an edit left, one that does nothing."""
        for step, entries in steps_of(self.ledger, part):
            return passages_of(self._again(entries, passages(part, step, *_recorded(entries))))[0]
        return LowRankShard.empty(self.memory.shape)

    def _again(self, entries: Ledger, task: Task) -> dict[str, Tensor]:
        """Train a step that the ledger knows; its entries say from now on how that went."""
        fresh, tensors = self.trainer.step(task)
        for old, new in zip(entries, fresh, strict=True):
            old.update(new)
        return tensors

    def _threshold(self, memory: SideMemory, place: int) -> float:
        """Eq. 6 for a merged shard: merging has changed every indicator."""
        ids = set(memory.shards[place].edit_ids)
        edits = [edit_of(e) for e in self.ledger if e["id"] in ids]
        return self._writer.threshold(memory.shards[place].dense(), edits)

    def _renumber(self) -> None:
        """After an undo: steps without a gap, slots and keys in the ledger's order."""
        steps = {old: new for new, old in enumerate(sorted({e["step"] for e in self.ledger}))}
        for entry in self.ledger:
            entry["step"] = steps[entry["step"]]
        index = self.memory.key_index
        if index is not None:
            trained = [e for e in self.ledger if was_trained(e)]
            lost = [e for e in trained if e["id"] not in set(index.ids)]
            store_keys(index, self._shop.coach, lost, [0])
            index.reorder([e["id"] for e in trained])
        every = range(count_parts(self.ledger))
        there = {part: trained_in(self.ledger, part) for part in every}
        settle(self.memory, self.parts, self.ledger, there)

    def _reopen(self) -> None:
        """Take the last part up again, if it is not full."""
        self._there = [] if self._open is None else trained_in(self.ledger, self.parts.closed)


def _filled(shard: Shard, edits: Sequence[Edit], tensors: Mapping[str, Tensor]) -> Shard:
    """A shard of the same mask with the values and the threshold of its last step, if there are
    any, and the edits that it was trained on."""
    ids = [edit.id for edit in edits]
    if not tensors:
        return replace(shard, edit_ids=ids)
    threshold = float(tensors["threshold"])
    return replace(shard, values=tensors["values"], threshold=threshold, edit_ids=ids)


def _recorded(entries: Ledger) -> tuple[list[Edit], dict[str, list[str]]]:
    """The edits of a recorded step, and whom each asked in."""
    return [edit_of(e) for e in entries], {e["id"]: e["guests"] for e in entries}
