"""Parts trained out of order, by others: the same memory, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.editing.facts import QUICK, edits_of, same_files
from tests.editing.pools import ShuffledTrainer
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.dispatch import in_order
from wise_ext.editing.planning import Task
from wise_ext.editing.training import Trained
from wise_ext.storage import verify

# Two parts full with three edits each, the second one with a guest, and one that stays open.
TOLD = edits_of("a b c a2 d e")
PARTED: dict[str, Any] = {"shard_size": 3, "batch_size": 2} | QUICK


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {}),
        (1, {"batch_size": 1}),
        # Held against each other's edits, trained to the end, merged, found by the indicator.
        (3, {"margins": True, "iterations": 4}),
        (10, {"shard_size": 2, "shards_per_merge": 2, "iterations": 4}),
        (
            5,
            {"router": "indicator", "margins": True, "variant": "merge", "shard_size": 1}
            | {"batch_size": 1, "iterations": 3, "early_stop": False},
        ),
    ],
)
def test_in_any_order_by_anybody_to_the_same_bytes(
    load: Any, tmp_path: Path, seed: int, settings: dict[str, Any]
) -> None:
    config = WiseConfig(**PARTED | settings)
    here = Editor(*load(), config, tmp_path / "here")
    here.edit(TOLD, progress=False)
    there = Editor(*load(), config, tmp_path / "there")
    others = ShuffledTrainer(load, there, seed)
    assert others.digest == there.digest()
    told: list[tuple[int, int]] = []
    there.edit(TOLD, progress=lambda *counts: told.append(counts), trainer=others)
    assert others.parts != sorted(others.parts), "nothing came out of order"
    assert same_files(tmp_path / "here", tmp_path / "there")
    assert told[0] == (0, 6) and told[-1] == (6, 6) and told == sorted(told)
    if not settings:
        assert {e["id"]: e["guests"] for e in there.ledger if e["guests"]} == {"a2": ["a"]}


def test_onto_a_memory_with_an_open_part(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(**PARTED)
    first, second = edits_of("a b"), edits_of("c a2 d e")
    for name in ("here", "there"):
        Editor(*load(), config, tmp_path / name).edit(first, progress=False)
    Editor.open(*load(), tmp_path / "here").edit(second, progress=False)
    editor = Editor.open(*load(), tmp_path / "there")
    editor.edit(second, progress=False, trainer=ShuffledTrainer(load, editor, seed=1))
    assert same_files(tmp_path / "here", tmp_path / "there")


@pytest.mark.parametrize("schedule", ["together", "in_turn"])
def test_passages_out_of_order(load: Any, tmp_path: Path, schedule: str) -> None:
    """Behind an open part of short edits, which they close; two of them of one prompt."""
    long = [
        Edit("poem", "Recite the poem of the Bex ferry.", "Row, Bex, row,\nthe river is slow."),
        Edit("song", "Sing the song of Telm.", "Down by the mill the water is still."),
        Edit("poem2", "Recite the poem of the Bex ferry.", "Row on, Bex, the ferry is wet."),
    ]
    config = WiseConfig(**PARTED)
    chunks = "needed" if schedule == "together" else "windows"
    anyedit = AnyEditConfig(margin=1.0, schedule=schedule, chunks=chunks)
    for name in ("here", "there"):
        editor = Editor(*load(), config, tmp_path / name, anyedit=anyedit)
        editor.edit(edits_of("a"), progress=False)
        others = ShuffledTrainer(load, editor, seed=0) if name == "there" else None
        editor.edit(long, progress=False, method="anyedit", trainer=others)
    assert same_files(tmp_path / "here", tmp_path / "there")


@pytest.mark.parametrize("others_first", [True, False])
def test_a_run_that_stopped_is_ended_by_the_others(
    load: Any, tmp_path: Path, others_first: bool
) -> None:
    """Interrupted after five of six steps; what had come back is not trained again."""
    config = WiseConfig(**PARTED | {"batch_size": 1})
    Editor(*load(), config, tmp_path / "whole").edit(TOLD, progress=False)
    run = tmp_path / "run"
    editor = Editor(*load(), config, run)
    others = ShuffledTrainer(load, editor, seed=4, stop_after=5)
    trainer = others if others_first else Stopped(editor, 5)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(TOLD, progress=False, trainer=trainer)
    assert len(editor.ledger) == 5
    with (run / "journal" / "steps.jsonl").open() as lines:
        # The second part's two steps were there before its turn came, and share a line.
        assert len(list(lines)) == (4 if others_first else 5)
    again = Editor(*load(), config, run, resume=True)
    others = ShuffledTrainer(load, again, seed=2)
    again.edit(TOLD, progress=False, trainer=None if others_first else others)
    assert same_files(tmp_path / "whole", run)
    assert all(check.ok for check in verify(run))
    if not others_first:
        assert others.parts == [2]


class Stopped:
    """This process's trainer, interrupted before a step."""

    ahead = False

    def __init__(self, editor: Editor, steps: int) -> None:
        self._trainer, self._left = editor._builder.trainer, steps

    def train(self, tasks: Iterator[Task], progress: Any = None) -> Iterator[Trained]:
        for task in tasks:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield self._trainer.step(task)


class Counting:
    """A pool without a model: what a step makes of a part is how many it has had."""

    def __init__(self, workers: int, data: st.DataObject) -> None:
        self._busy: dict[str, Task | None] = {str(number): None for number in range(workers)}
        self._data = data

    def start(self, worker: str, task: Task) -> None:
        assert worker not in self._busy, "one step at a time"
        parts = [other.part for other in self._busy.values() if other is not None]
        assert task.part not in parts, "one worker a part"
        self._busy[worker] = task

    def wait(self) -> tuple[str, Trained | None]:
        assert self._busy, "nobody is left to wait for"
        worker = self._data.draw(st.sampled_from(sorted(self._busy)))
        task = self._busy.pop(worker)
        if task is None:
            return worker, None
        before = 0 if task.values is None else int(task.values)
        entry = {"part": task.part, "step": task.step}
        return worker, Trained([entry], {"values": torch.tensor(before + 1)})


@given(
    sizes=st.lists(st.integers(1, 4), max_size=8),
    workers=st.integers(1, 4),
    ahead=st.integers(1, 6),
    data=st.data(),
)
def test_every_schedule_gives_back_every_step_in_order(
    sizes: list[int], workers: int, ahead: int, data: st.DataObject
) -> None:
    parts = [part for part, size in enumerate(sizes) for _ in range(size)]
    asked: list[int] = []
    back: list[int] = []
    made: Counter[int] = Counter()

    def tasks() -> Iterator[Task]:
        for step, part in enumerate(parts):
            asked.append(part)
            # One part is planned beyond those in work or waiting, and one step of the next seen.
            assert len(set(asked)) - len({p for p in back if made[p] == sizes[p]}) <= ahead + 2
            yield Task("wise", step, part, [], {}, [], [], [])

    for entries, tensors in in_order(tasks(), Counting(workers, data), ahead):
        back += [entry["part"] for entry in entries]
        made.update(entry["part"] for entry in entries)
        # The tensors that come with several steps are the latest one's.
        assert int(tensors["values"]) == made[entries[-1]["part"]]
        assert len({entry["part"] for entry in entries}) == 1
    assert back == parts == asked


def test_an_interrupted_step_leaves_nothing_behind(load: Any, tmp_path: Path) -> None:
    """Not in the shard at hand, either: the next try starts from where the last step ended."""

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    config = WiseConfig(**PARTED | {"shard_size": 4})
    for name in ("stopped", "never"):
        editor = Editor(*load(), config)
        editor.edit(edits_of("a b"), progress=False)
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                editor.edit(edits_of("c d"), progress=stop)
            assert [e["id"] for e in editor.ledger] == ["a", "b"]
        editor.edit(edits_of("c d"), progress=False)
        editor.save(tmp_path / name)
    assert same_files(tmp_path / "stopped", tmp_path / "never")
