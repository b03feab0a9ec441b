"""What an editing run reports, and small questions about the ledger's entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wise_ext.editing.edits import Edit
from wise_ext.errors import DataError


@dataclass(frozen=True)
class EditReport:
    """What an ``edit`` call did.

    Attributes:
        edits: edits asked for.
        seconds: wall time of this call.
        cpu_seconds: CPU time of the whole process during this call.
        iterations: optimiser rounds, summed over the edits that took part in them.
        shards: shards of the memory now.
        memory_bytes: their packed size as trained (fp32 values).
        conflicts: pairs (older id, newer id) of one prompt with two targets; the newer wins.
        unconverged: edits that ran out of iterations before all their labels were greedy.
        rounding: by how much saving puts the values off (``stored="int8"``), relatively.
    """

    edits: int
    seconds: float
    cpu_seconds: float
    iterations: int
    shards: int
    memory_bytes: int
    conflicts: list[tuple[str, str]]
    unconverged: list[str]
    rounding: float = 0.0


def edit_of(entry: dict[str, Any]) -> Edit:
    """The edit that a ledger entry records."""
    return Edit(**entry["record"])


def was_trained(entry: dict[str, Any]) -> bool:
    """Of two edits with one prompt in one step the older is recorded, and not trained."""
    return entry["shard"] is not None


def check_ids(edits: Sequence[Edit], taken: set[str]) -> None:
    """Every edit needs an id of its own.

    Raises:
        DataError: one is in the memory already, or appears twice.
    """
    seen = set(taken)
    for edit in edits:
        if edit.id in seen:
            where = "is in the memory already" if edit.id in taken else "appears twice"
            raise DataError(f"edit id {edit.id!r} {where}: give each edit its own id")
        seen.add(edit.id)
