"""The editor: edits in, a side memory out, journaled on the way, the model patched at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wise_ext.editing.config import WiseConfig, settled
from wise_ext.editing.edits import Edit, find_conflicts
from wise_ext.editing.homes import (
    guests_for,
    invited,
    joining,
    parts_with_guest,
    settle,
    trained_in,
)
from wise_ext.editing.ledger import EditReport, check_ids, edit_of, was_trained
from wise_ext.editing.parts import Parts, count_parts, steps_of
from wise_ext.editing.progress import part_way, progress_bar
from wise_ext.editing.wise import OpenShard
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import ConfigError, DataError
from wise_ext.memory import Shard, SideMemory, TokenKeys
from wise_ext.models.patch import disabled, is_patched, patch
from wise_ext.storage import (
    Journal,
    check_base,
    digest_edits,
    holds_memory,
    ledger_entry,
    load_memory_dir,
    save_memory,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Editor:
    """Edits a Hugging Face causal LM in place; its weights stay as they are.

    Args:
        model: the model; once there is an edit it is patched, and still the same object.
        tokenizer: its tokenizer.
        config: settings; None takes those of the memory in ``directory``, else the default preset.
        directory: where the memory is kept: each step is journaled there, so that a killed run
            loses at most the step in flight, and ``edit`` and ``undo`` end by saving. A memory it
            holds already is taken up. None keeps everything in the process until ``save``.
        resume: go on with the unfinished run in ``directory``: call ``edit`` with the same edits.

    Raises:
        ModelError: the model's layers are not found, or it cannot be replayed.
        ConfigError: settings that contradict the model or the memory in ``directory``.
        StorageError: the memory in ``directory`` is damaged or of another base model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: WiseConfig | None = None,
        directory: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        if is_patched(model):
            raise ConfigError("the model has a side memory: unload it, or edit on with its Editor")
        if resume and directory is None:
            raise ConfigError("resume needs the directory of the run to go on with")
        self._directory = None if directory is None else Path(directory)
        self._resume = resume
        stored = None
        if self._directory is not None and holds_memory(self._directory):
            stored = load_memory_dir(self._directory)
            settings = dict(stored.config)
            closed = int(settings.pop("closed_parts"))
            config = settled(config, WiseConfig.from_dict(settings), self._directory)
        self.model = model
        self.config = config or WiseConfig()
        self._shop = Workshop(model, tokenizer, self.config)
        self._writer = self._shop.writer
        self.ledger: list[dict[str, Any]] = []
        self._open: OpenShard | None = None
        if stored is None:
            self._parts = Parts.of(self.config)
            self.memory = self._shop.empty_memory()
            return
        check_base(stored.base, self._shop.base["fingerprint"], self._shop.base["name"])
        self._parts = Parts.of(self.config, closed)
        self.memory, self.ledger = stored.memory, stored.ledger
        self._reopen()
        patch(model, self.memory)

    @classmethod
    def open(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str | Path
    ) -> Editor:
        """Take up the memory in a directory with its own settings, to edit on or to undo.

        Raises:
            StorageError: there is none, it is damaged, or of another base model.
        """
        if not holds_memory(directory):
            load_memory_dir(directory)  # raises, and says what is missing
        return cls(model, tokenizer, directory=directory)

    def edit(
        self, edits: Sequence[Edit], progress: bool | Callable[[int, int], None] = True
    ) -> EditReport:
        """Write edits, in order, up to ``config.batch_size`` of them trained together.

        All are in effect when the call returns. Of two edits with the same prompt and different
        targets the later one wins, within a call and across calls.

        Args:
            edits: new edits.
            progress: True shows a bar on a terminal; a function is called with (done, total).

        Raises:
            DataError: an id is taken, or an edit has no tokens.
            StorageError: the journal cannot be written or resumed; what was recorded is safe.
        """
        start, cpu = time.perf_counter(), time.process_time()
        edits = list(edits)
        check_ids(edits, {entry["id"] for entry in self.ledger})
        conflicts = find_conflicts([*map(edit_of, self.ledger), *edits])
        before = len(self.ledger)
        shown = nullcontext(progress) if callable(progress) else progress_bar("editing", progress)
        journal = self._journal(edits)
        try:
            with self._bare_model(), shown as move:
                while (done := len(self.ledger) - before) < len(edits):
                    move(done, len(edits))
                    room = self.config.shard_size - (len(self._open.edits) if self._open else 0)
                    step = edits[done : done + min(self.config.batch_size, room)]
                    told = part_way(move, done, len(step), len(edits))
                    self._write(step, journal, told)
                move(len(edits), len(edits))
            if self._directory is not None:
                self._save(self._directory, journal)
        finally:
            if journal is not None:
                journal.close()
        patch(self.model, self.memory)
        new = self.ledger[before:]
        return EditReport(
            edits=len(edits),
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            iterations=sum(entry["iterations"] for entry in new),
            shards=len(self.memory.shards),
            memory_bytes=self.memory.nbytes(),
            conflicts=[pair for pair in conflicts if pair[1] in {e.id for e in edits}],
            unconverged=[e["id"] for e in new if e["shard"] is not None and not e["converged"]],
            rounding=self.memory.rounding(),
        )

    def save(self, directory: str | Path) -> None:
        """Write the memory to a directory, as a whole.

        Raises:
            StorageError: the disk refuses; what the directory held is unharmed.
        """
        self._save(Path(directory), None)

    def undo(self, edit_id: str) -> None:
        """Take one edit back: its shard is trained again, step by step, without it.

        The result is what the same steps would have made, had that edit never been there. Shards
        it was merged with are trained again too, and, where margins are trained against the edits
        of earlier shards (``replay``), the later ones.

        Raises:
            DataError: no such edit.
            StorageError: the directory cannot be written; it then holds the memory as it was.
        """
        entry = next((e for e in self.ledger if e["id"] == edit_id), None)
        if entry is None:
            raise DataError(f"the memory has no edit {edit_id!r}: `wise-ext show` lists them")
        total = max(count_parts(self.ledger), self._parts.closed)
        parts = {*self._parts.beside(entry["part"], total), *parts_with_guest(self.ledger, edit_id)}
        if self.config.margins and self.config.replay:
            parts = set(range(min(parts), total))
        self.ledger = [e for e in self.ledger if e["id"] != edit_id]
        for other in self.ledger:
            other["guests"] = [name for name in other["guests"] if name != edit_id]
        with self._bare_model():
            for group in self._parts.by_slots(sorted(parts)):
                first, last = self._parts.slot(group[0]), self._parts.slot(group[-1])
                self.memory.shards[first : last + 1] = self._retrained(group)
        # A part that is full keeps its place when it empties; the open one never was, then.
        if total > max(count_parts(self.ledger), self._parts.closed):
            del self.memory.shards[-1]
        self._renumber()
        self._reopen()
        patch(self.model, self.memory)
        if self._directory is not None:
            self.save(self._directory)

    # -- training --------------------------------------------------------------------------------

    def _write(
        self, edits: list[Edit], journal: Journal | None, progress: Callable[[int], None]
    ) -> None:
        """One step: train edits into the open part, and record it."""
        part = self._parts.closed
        if self._open is None:
            self._open = self._writer.open(part)
        step = 1 + max((int(e["step"]) for e in self.ledger), default=-1)
        guests = guests_for(self.memory, self._parts, self.ledger, edits, self._keys(edits))
        entries, shard = self._train(self._open, edits, guests, step, progress)
        full = len(self._open.edits) >= self.config.shard_size
        self._take(entries, shard, self._open.edits, full)
        if journal is not None:
            state = {
                "values": shard.values,
                "threshold": torch.tensor(shard.threshold, dtype=torch.float64),
            }
            journal.record({"entries": entries}, {} if full else state, state if full else None)

    def _train(
        self,
        shard: OpenShard,
        edits: list[Edit],
        guests: dict[str, list[str]],
        step: int,
        progress: Callable[[int], None] = lambda settled: None,
    ) -> tuple[list[dict[str, Any]], Shard]:
        """Train one step; its ledger entries and the shard sealed as it then is."""
        replaced = {older for older, _ in find_conflicts(edits)}
        kept = [edit for edit in edits if edit.id not in replaced]
        asked = invited(self.ledger, shard.edits, kept, guests)
        foreign = [edit_of(e) for e in self.ledger if e["part"] < shard.number and was_trained(e)]
        outcomes = {
            o.edit.id: o for o in self._writer.write(shard, [*kept, *asked], foreign, progress)
        }
        entries = []
        for edit in edits:
            o = outcomes.get(edit.id)
            entry = ledger_entry(
                asdict(edit),
                locality_prompt=o.locality_prompt if o else edit.locality_prompt,
                shard=self._parts.slot(shard.number) if o else None,
                step=step,
                iterations=o.iterations if o else 0,
                losses=o.losses if o else {},
                indicator=o.indicator if o else None,
                guests=guests[edit.id],
            )
            entries.append(entry | {"part": shard.number, "converged": bool(o and o.converged)})
        return entries, shard.seal(self._writer.threshold(shard.delta, shard.edits))

    def _take(
        self, entries: list[dict[str, Any]], shard: Shard, trained: list[Edit], full: bool
    ) -> None:
        """Put a step's shard, all it was trained on so far, its keys and its entries into the
        memory; close the part if it is full."""
        part = int(entries[0]["part"])
        slot = self._parts.slot(part)
        if slot < len(self.memory.shards):
            self.memory.replace_shard(slot, shard)
        else:
            self.memory.add_shard(shard)
        self.ledger.extend(entries)
        self._add_keys([edit_of(e) for e in entries if was_trained(e)], slot)
        if full:
            self._parts.close(self.memory, self.config, self._threshold)
            self._open = None
            self._shop.coach.forget()
        settle(self.memory, self._parts, self.ledger, {part: trained})

    def _retrained(self, parts: list[int]) -> list[Shard]:
        """The memory's shards that ``parts`` make, trained again from the ledger."""
        scratch = SideMemory(self.memory.layer, self.memory.shape, routing="indicator")
        state = Parts(self._parts.group, self._parts.single, 0 if self._parts.single else parts[0])
        for part in parts:
            shard = self._writer.open(part)
            sealed = shard.seal(math.inf)
            for step, entries in steps_of(self.ledger, part):
                guests = {e["id"]: e["guests"] for e in entries}
                fresh, sealed = self._train(shard, [edit_of(e) for e in entries], guests, step)
                for old, new in zip(entries, fresh, strict=True):
                    old.update(new)
            scratch.add_shard(sealed)
            if part < self._parts.closed:
                state.close(scratch, self.config, self._threshold)
        return scratch.shards

    def _threshold(self, memory: SideMemory, place: int) -> float:
        """Eq. 6 for a merged shard: merging has changed every indicator."""
        ids = set(memory.shards[place].edit_ids)
        edits = [edit_of(e) for e in self.ledger if e["id"] in ids]
        return self._writer.threshold(memory.shards[place].dense(), edits)

    # -- keys, journal, state --------------------------------------------------------------------

    def _add_keys(self, edits: list[Edit], slot: int) -> None:
        if self.memory.key_index is not None and edits:
            keys = [self._shop.coach.practice(e).addresses for e in edits]
            self.memory.key_index.add_worded(keys, [slot] * len(keys), [e.id for e in edits])

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
            lost = [edit_of(e) for e in trained if e["id"] not in set(index.ids)]
            self._add_keys(lost, 0)
            index.reorder([e["id"] for e in trained])
        every = range(count_parts(self.ledger))
        there = {part: trained_in(self.ledger, part) for part in every}
        settle(self.memory, self._parts, self.ledger, there)

    def _reopen(self) -> None:
        """Take the last part up again, if it is not full."""
        part = self._parts.closed
        edits = trained_in(self.ledger, part)
        slot = self._parts.slot(part)
        self._open = None
        if slot < len(self.memory.shards):
            self._open = self._writer.open(part, self.memory.shards[slot], edits)

    def _journal(self, edits: list[Edit]) -> Journal | None:
        """The journal for these edits; a run to be resumed is brought to where it was."""
        if self._directory is None:
            return None
        settings = self.config.to_dict()
        digest = digest_edits(asdict(edit) for edit in edits)
        if not self._resume:
            return Journal.open(self._directory, settings, self._shop.base, digest)
        self._resume = False
        journal = Journal.resume(self._directory, settings, self._shop.base, digest)
        state = journal.state()
        if state is not None:
            with self._bare_model():
                self._replay(state.steps, state.tensors, state.kept)
        return journal

    def _replay(
        self,
        steps: list[dict[str, Any]],
        tensors: dict[str, Tensor],
        kept: list[dict[str, Tensor]],
    ) -> None:
        """Bring the memory to where the journal is, without training anything again."""
        blank = self._writer.open(self._parts.closed)
        blank.edits = trained_in(self.ledger, blank.number)
        for number, (step, full) in enumerate(zip(steps, kept, strict=True)):
            entries = step["entries"]
            blank.edits += joining(self.ledger, blank.edits, entries)
            packed = full or (tensors if number == len(steps) - 1 else None)
            shard = blank.seal(-math.inf)
            if packed is not None:
                shard.values = packed["values"]
                shard.threshold = float(packed["threshold"])
            self._take(entries, shard, blank.edits, bool(full))
            if full:
                blank = self._writer.open(self._parts.closed)
        self._reopen()

    def _save(self, directory: Path, journal: Journal | None) -> None:
        settings = {**self.config.to_dict(), "closed_parts": self._parts.closed}
        save_memory(directory, self.memory, settings, self.ledger, self._shop.base, journal)

    @contextmanager
    def _bare_model(self) -> Iterator[None]:
        """The model as it was before any edit, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        try:
            with disabled(self.model) if is_patched(self.model) else nullcontext():
                yield
        finally:
            self.model.train(training)
