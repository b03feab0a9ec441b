"""What `bench.overhead` measures, and how: cases, turns of two sides, memory at its most."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.rows import Row
from bench.timing import percentile

#: tokens of the prompt before those that are decoded
BEHIND = 128


class WrongError(Exception):
    """What is about to be timed does not do what it should."""


@dataclass(frozen=True)
class Case:
    """One line of the bench.

    Attributes:
        phase: "prefill", "decode", "layer" or "layer and routing".
        tokens: of the prompt, or rows of the layer's input.
        batch: rows of the batch.
        routed: "none", "half" or "all" of these rows go to a shard.
    """

    phase: str
    tokens: int
    batch: int
    routed: str

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.phase} {self.tokens} x {self.batch}"

    def shares(self) -> list[bool]:
        """Which rows of the batch are to be routed."""
        every = {"none": 0, "half": 2, "all": 1}[self.routed]
        return [bool(every) and row % every == 0 for row in range(self.batch)]


def in_pairs(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> Row:
    """Both, in turns; the median of the ratios, and between what the middle three fifths lie."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[bool, list[float]] = {True: [], False: []}
    gc.collect()
    for number in range(pairs + 1):  # the first pair warms up
        for first in (True, False) if number % 2 else (False, True):
            began = now()
            (one if first else other)()
            if number:
                spent[first].append(now() - began)
    ratios = [a / b for a, b in zip(spent[True], spent[False], strict=True)]
    return {
        "peak_bytes": _peak(one),
        "bare_peak_bytes": _peak(other),
        "ratio": percentile(ratios, 0.5),
        "ratio_low": percentile(ratios, 0.2),
        "ratio_high": percentile(ratios, 0.8),
        "bare_ms": percentile(spent[False], 0.5) * 1e3,
    }


def _peak(call: Callable[[], Any]) -> int:
    """Bytes of this process in memory while it is called, at most; 0 where none can tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0
    call()
    return memory_of("VmHWM")


def memory_of(line: str) -> int:
    """A line of this process's status, in bytes; 0 where the system has none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = [each.split() for each in text.splitlines() if each.startswith(f"{line}:")]
    return int(found[0][1]) * 1024 if found else 0
