"""The editor: edits in, a side memory out, journaled on the way, the model patched at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.builder import MemoryBuilder
from wise_ext.editing.config import WiseConfig, settled
from wise_ext.editing.edits import Edit, find_conflicts
from wise_ext.editing.ledger import (
    ANYEDIT,
    METHODS,
    EditReport,
    check_ids,
    edit_of,
    is_passage,
    method_for,
)
from wise_ext.editing.progress import progress_bar
from wise_ext.editing.training import Trainer
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import ConfigError, DataError
from wise_ext.memory import SideMemory
from wise_ext.models.patch import disabled, is_patched, patch, unload
from wise_ext.storage import (
    Journal,
    check_base,
    digest_edits,
    holds_memory,
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
        anyedit: settings of ``method="anyedit"``; None takes those of the memory, else the default.

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
        anyedit: AnyEditConfig | None = None,
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
            old = AnyEditConfig.from_dict(settings.pop("anyedit"))
            if any(map(is_passage, stored.ledger)):
                anyedit = settled(anyedit, old, self._directory)
            config = settled(config, WiseConfig.from_dict(settings), self._directory)
        self.model = model
        self.config = config or WiseConfig()
        self.anyedit = anyedit or AnyEditConfig()
        self._shop = Workshop(model, tokenizer, self.config)
        if stored is None:
            self._builder = MemoryBuilder(self._shop, self.config, self.anyedit)
            return
        check_base(stored.base, self._shop.base["fingerprint"], self._shop.base["name"])
        self._builder = MemoryBuilder(
            self._shop, self.config, self.anyedit, stored.memory, stored.ledger, closed
        )
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
        self,
        edits: Sequence[Edit],
        progress: bool | Callable[[int, int], None] = True,
        method: str | None = None,
        trainer: Trainer | None = None,
    ) -> EditReport:
        """Write edits, in order, up to ``config.batch_size`` of them trained together.

        All are in effect when the call returns. Of two edits with the same prompt and different
        targets the later one wins, within a call and across calls.

        Args:
            edits: new edits.
            progress: True shows a bar on a terminal; a function is called with (done, total).
            method: ``"wise"``, or ``"anyedit"``: each edit in a low-rank shard of its own, for
                answers of any length; None takes that where all edits are long-form records.
            trainer: who trains, to the same bytes; None does it here.

        Raises:
            ConfigError: an unknown method, or settings that it cannot work with.
            DataError: an id is taken, or an edit has no tokens.
            StorageError: the journal cannot be written or resumed; what was recorded is safe.
        """
        start, cpu = time.perf_counter(), time.process_time()
        edits = list(edits)
        method = method_for(edits) if method is None else method
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: choose one of {METHODS}")
        if method == ANYEDIT:
            self._shop.check_passages()
        check_ids(edits, {entry["id"] for entry in self.ledger})
        conflicts = find_conflicts([*map(edit_of, self.ledger), *edits])
        before = len(self.ledger)
        shown = nullcontext(progress) if callable(progress) else progress_bar("editing", progress)
        journal = self._journal(edits, method)
        trainer = trainer or self._builder.trainer
        try:
            with self._bare_model(), shown as move:

                def told(settled: int, step: int) -> None:
                    # A step is never whole before it is recorded.
                    move(len(self.ledger) - before + min(settled, step - 1), len(edits))

                told(0, 1)
                rest = edits[len(self.ledger) - before :]
                tasks = self._builder.tasks(rest, method, trainer.ahead)
                for trained in trainer.train(tasks, told):
                    step = self._builder.take(trained)
                    if journal is not None:
                        journal.record({"entries": step.entries}, step.state, step.kept)
                    told(0, 1)
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
        if all(entry["id"] != edit_id for entry in self.ledger):
            raise DataError(f"the memory has no edit {edit_id!r}: `wise-ext show` lists them")
        with self._bare_model():
            self._builder.undo(edit_id)
        patch(self.model, self.memory)
        if self._directory is not None:
            self.save(self._directory)

    def reset(self) -> None:
        """Forget all edits of this process: the model is the unedited one, and may be edited anew.

        Raises:
            ConfigError: the memory is kept in a directory: undo its edits, or choose another one.
        """
        if self._directory is not None:
            raise ConfigError(f"the memory is kept in {self._directory}: undo its edits instead")
        if is_patched(self.model):
            unload(self.model)
        self._shop.coach.forget()
        self._builder = MemoryBuilder(self._shop, self.config, self.anyedit)

    def digest(self) -> str:
        """See ``Workshop.digest``: who trains for this editor has the same."""
        with self._bare_model():
            return self._shop.digest()

    @property
    def memory(self) -> SideMemory:
        """The side memory as it is now."""
        return self._builder.memory

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One entry an edit, in order; what ``edits.jsonl`` holds."""
        return self._builder.ledger

    # -- journal and state -----------------------------------------------------------------------

    def _journal(self, edits: list[Edit], method: str) -> Journal | None:
        """The journal for these edits; a run to be resumed is brought to where it was."""
        if self._directory is None:
            return None
        settings = self._settings() | {"method": method}
        digest = digest_edits(asdict(edit) for edit in edits)
        if not self._resume:
            return Journal.open(self._directory, settings, self._shop.base, digest)
        self._resume = False
        journal = Journal.resume(self._directory, settings, self._shop.base, digest)
        state = journal.state()
        if state is not None:
            with self._bare_model():
                steps = [step["entries"] for step in state.steps]
                self._builder.replay(steps, state.tensors, state.kept)
        return journal

    def _settings(self) -> dict[str, Any]:
        return self.config.to_dict() | {"anyedit": self.anyedit.to_dict()}

    def _save(self, directory: Path, journal: Journal | None) -> None:
        settings = self._settings() | {"closed_parts": self._builder.parts.closed}
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
