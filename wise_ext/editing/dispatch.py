"""Parts trained side by side, what became of them given back in order.

Steps of one part follow one another, parts do not: each worker trains one part at a time, step by
step. A part that is done before its turn waits; of what it is, the latest step is kept alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Protocol

from torch import Tensor

from wise_ext.editing.planning import Ledger, Task
from wise_ext.editing.training import Trained


class Pool(Protocol):
    """Workers, each with a name, who train one step at a time."""

    def start(self, worker: str, task: Task) -> None:
        """Give an idle worker something to do."""
        ...

    def wait(self) -> tuple[str, Trained | None]:
        """Who is done next, with what; a worker's first word comes without anything."""
        ...


class _Course:
    """The steps of one part: those to come, and what became of those done and not given back."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = deque(tasks)
        self._values: Tensor | None = self._tasks[0].values
        self._entries: Ledger = []
        self._tensors: dict[str, Tensor] = {}
        self.done = False

    def next_task(self) -> Task:
        """The next step, its part as the one before left it."""
        return self._tasks[0]._replace(values=self._values)

    def arrived(self, trained: Trained) -> None:
        """Note what became of the next step."""
        self._tasks.popleft()
        self._entries.extend(trained.entries)
        self._tensors = trained.tensors
        self._values = trained.tensors.get("values")
        self.done = not self._tasks

    def taken(self) -> Trained | None:
        """What became of the steps done since this was last asked."""
        if not self._entries:
            return None
        entries, self._entries = self._entries, []
        return Trained(entries, self._tensors)


def in_order(tasks: Iterator[Task], pool: Pool, ahead: int) -> Iterator[Trained]:
    """Train steps on the workers of a pool as they come free.

    Args:
        tasks: planned ahead, in order; no more of them than needed are asked for.
        pool: who trains.
        ahead: parts, at least one, that may be in work or wait for their turn.

    Yields:
        What became of the steps, in order, those of one part together if they are there together.
    """
    courses = (_Course(group) for _, group in groupby(tasks, key=lambda task: task.part))
    line: deque[_Course] = deque()
    at: dict[str, _Course] = {}
    idle: list[str] = []
    # The one to be begun next is planned while the workers are at others.
    upcoming = next(courses, None)
    while upcoming or line:
        if upcoming and idle and len(line) < ahead:
            worker = idle.pop()
            at[worker] = upcoming
            line.append(upcoming)
            pool.start(worker, upcoming.next_task())
            upcoming = next(courses, None)
        elif line and (trained := line[0].taken()):
            if line[0].done:
                line.popleft()
            yield trained
        else:
            worker, result = pool.wait()
            if result is not None:
                at[worker].arrived(result)
            if worker in at and not at[worker].done:
                pool.start(worker, at[worker].next_task())
            else:
                at.pop(worker, None)
                idle.append(worker)
