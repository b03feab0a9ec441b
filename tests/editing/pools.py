"""Workers in this process, done in whatever order a test says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from wise_ext import Editor
from wise_ext.editing.dispatch import in_order
from wise_ext.editing.planning import Task
from wise_ext.editing.training import LocalTrainer, Progress, Trained, no_progress
from wise_ext.editing.workshop import Workshop


class ShuffledTrainer:
    """Two workers with a model of their own, done in an order drawn from a seed.

    Args:
        load: makes that model and its tokenizer.
        editor: whose settings they have.
        seed: of the order.
        stop_after: give up, as if interrupted, once so many steps were trained.
    """

    ahead = True

    def __init__(self, load: Any, editor: Editor, seed: int, stop_after: int = 10**9) -> None:
        self._shop = Workshop(*load(), editor.config)
        self._workers = {name: LocalTrainer(self._shop, editor.anyedit) for name in "xy"}
        self._waiting: dict[str, Task | None] = dict.fromkeys(self._workers)
        self._random = random.Random(seed)
        self._left = stop_after
        self.parts: list[int] = []
        self.digest = self._shop.digest()

    def train(self, tasks: Iterator[Task], progress: Progress = no_progress) -> Iterator[Trained]:
        return in_order(tasks, self, ahead=3)

    def start(self, worker: str, task: Task) -> None:
        assert worker not in self._waiting
        self._waiting[worker] = task

    def wait(self) -> tuple[str, Trained | None]:
        worker = self._random.choice(sorted(self._waiting))
        task = self._waiting.pop(worker)
        if task is None:
            return worker, None
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self.parts.append(task.part)
        return worker, self._workers[worker].step(task)
