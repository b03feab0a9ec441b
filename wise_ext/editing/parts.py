"""Parts: the shards as they were trained, before any merging, and where each went.

Part p is the p-th shard trained. Its mask is drawn for p, its edits name it in the ledger. Merging
(WISE-Merge, or k shards a memory under WISE-Retrieve) puts several parts into one slot of the
memory's list of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wise_ext.editing.config import WiseConfig
from wise_ext.memory import SideMemory


@dataclass
class Parts:
    """How many parts are ``closed`` (full), ``group`` of which are merged at a time, into slots of
    their own or (``single``) into one."""

    group: int
    single: bool
    closed: int = 0

    @classmethod
    def of(cls, config: WiseConfig, closed: int = 0) -> Parts:
        """The parts of a memory made with these settings."""
        return cls(config.shards_per_merge, config.variant == "merge", closed)

    @property
    def merged(self) -> int:
        """How many parts have been merged."""
        return self.closed - self.closed % self.group

    def slot(self, part: int) -> int:
        """The memory's shard that a part is in now."""
        if part < self.merged:
            return 0 if self.single else part // self.group
        slots = min(self.merged, 1) if self.single else self.merged // self.group
        return slots + part - self.merged

    @property
    def apart(self) -> bool:
        """Whether every part stays a shard of its own."""
        return self.group == 1 and not self.single

    def by_slots(self, parts: Sequence[int]) -> list[list[int]]:
        """Parts (in order) in groups that can be made anew without the others."""
        return [[part] for part in parts] if self.apart else [list(parts)]

    def beside(self, part: int, total: int) -> list[int]:
        """All of ``total`` parts that share a part's slot."""
        return [p for p in range(total) if self.slot(p) == self.slot(part)]

    def close(
        self, memory: SideMemory, config: WiseConfig, threshold: Callable[[SideMemory, int], float]
    ) -> None:
        """Count the last part as full and, where a group is complete, merge it.

        Args:
            memory: its last shards are the unmerged parts; changed in place.
            config: how to merge.
            threshold: of a shard of the memory, by place.
        """
        self.closed += 1
        if self.closed % self.group:
            return
        last = range(len(memory.shards) - self.group, len(memory.shards))
        grown = self.single and last.start > 0
        places = [0, *last] if grown else list(last)
        if len(places) > 1:
            place = memory.merge_shards(
                places,
                config.merge_method,
                density=config.merge_density,
                seed=config.seed + self.closed,
            )
            memory.shards[place].threshold = threshold(memory, place)


def steps_of(
    entries: Iterable[dict[str, Any]], part: int
) -> list[tuple[int, list[dict[str, Any]]]]:
    """A part's ledger entries by training step, in order."""
    return by_step(e for e in entries if e["part"] == part)


def by_step(entries: Iterable[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Ledger entries by training step, in order."""
    return [(step, list(group)) for step, group in groupby(entries, key=lambda e: int(e["step"]))]


def count_parts(entries: Sequence[dict[str, Any]]) -> int:
    """How many parts a ledger speaks of."""
    return max((int(e["part"]) + 1 for e in entries), default=0)
