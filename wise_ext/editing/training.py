"""Steps trained: a planned step in, its ledger entries and the tensors of its part out.

Whoever trains needs the model, the settings and the step, and gives back plain numbers; so it may
be this process or another machine (``Trainer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.edits import find_conflicts
from wise_ext.editing.ledger import ANYEDIT, entry_of
from wise_ext.editing.passages import PassageWriter
from wise_ext.editing.planning import Ledger, Task
from wise_ext.editing.wise import OpenShard, Outcome
from wise_ext.editing.workshop import Workshop
from wise_ext.memory import LowRankShard

#: Called with how many edits of a step are settled so far, and how many it has.
Progress = Callable[[int, int], None]


def no_progress(settled: int, total: int) -> None:
    """Nobody looks."""


class Trained(NamedTuple):
    """What training made of one step, or of several of one part: their ledger entries in order, and
    what the part, or the passages, are now, as the journal keeps it."""

    entries: Ledger
    tensors: dict[str, Tensor]


class Trainer(Protocol):
    """Who trains the steps of a run.

    Attributes:
        ahead: whether it asks for steps before it has given back what it made of earlier ones.
    """

    ahead: bool

    def train(self, tasks: Iterator[Task], progress: Progress = ...) -> Iterator[Trained]:
        """Train all steps and give back what became of them, in order. Steps of one part may come
        back together."""
        ...


class LocalTrainer:
    """Trains in this process, one step after another."""

    ahead = False

    def __init__(self, shop: Workshop, anyedit: AnyEditConfig) -> None:
        self._shop = shop
        self._anyedit = anyedit
        self._at_hand: tuple[OpenShard, Tensor] | None = None

    def train(self, tasks: Iterator[Task], progress: Progress = no_progress) -> Iterator[Trained]:
        """See ``Trainer``.

        Raises:
            DataError: an edit has no tokens.
        """
        return (self.step(task, progress) for task in tasks)

    def step(self, task: Task, progress: Progress = no_progress) -> Trained:
        """Train one step; otherwise as ``train``."""

        def told(settled: int) -> None:
            progress(settled, len(task.edits))

        if task.method == ANYEDIT:
            written = self._passage_writer.write(task.joining, told)
            entries = _entries(task, [outcome for outcome, _ in written])
            return Trained(entries, _factors([shard for _, shard in written]))
        writer, shard = self._shop.writer, self._opened(task)
        self._at_hand = None  # half trained, if this is interrupted
        outcomes = writer.write(shard, task.joining, task.foreign, told)
        sealed = shard.seal(writer.threshold(shard.delta, shard.edits))
        self._at_hand = shard, sealed.values
        threshold = torch.tensor(sealed.threshold, dtype=torch.float64)
        return Trained(_entries(task, outcomes), {"values": sealed.values, "threshold": threshold})

    def forget(self) -> None:
        """Free what was made for the edits of the part at hand."""
        self._at_hand = None
        self._shop.coach.forget()

    def _opened(self, task: Task) -> OpenShard:
        """The part as the task says it is: the one at hand, if it is that, or unpacked."""
        if self._at_hand is not None and task.values is not None:
            shard, values = self._at_hand
            same = (shard.number, shard.edits) == (task.part, task.there)
            if same and torch.equal(values, task.values):
                return shard
        return self._shop.writer.open(task.part, task.values, task.there)

    @cached_property
    def _passage_writer(self) -> PassageWriter:
        return self._shop.passages(self._anyedit)


def passages_of(tensors: dict[str, Tensor]) -> list[LowRankShard]:
    """The passages of a step, as the journal keeps them."""
    count = len(tensors) // 2
    return [LowRankShard(tensors[f"left.{i}"], tensors[f"right.{i}"]) for i in range(count)]


def _factors(passages: list[LowRankShard]) -> dict[str, Tensor]:
    return {
        f"{name}.{i}": getattr(shard, name)
        for i, shard in enumerate(passages)
        for name in ("left", "right")
    }


def _entries(task: Task, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    how = {outcome.edit.id: outcome for outcome in outcomes}
    parts = {edit.id: task.part for edit in task.edits}
    if task.method == ANYEDIT:
        own = {edit.id: task.part + n for n, edit in enumerate(task.joining)}
        beside = dict(find_conflicts(task.edits))
        parts = {edit.id: own[beside.get(edit.id, edit.id)] for edit in task.edits}
    return [
        entry_of(
            edit,
            how.get(edit.id),
            method=task.method,
            part=parts[edit.id],
            step=task.step,
            guests=task.guests[edit.id],
        )
        for edit in task.edits
    ]
