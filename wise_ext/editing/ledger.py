"""What an editing run reports, and small questions about the ledger's entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wise_ext.editing.edits import Edit
from wise_ext.editing.wise import Outcome
from wise_ext.errors import DataError
from wise_ext.storage import ledger_entry

#: How edits are written; the names are the ledger's.
WISE, ANYEDIT = METHODS = ("wise", "anyedit")


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


def method_for(edits: Sequence[Edit]) -> str:
    """AnyEdit where all edits are long-form ones, else WISE."""
    return ANYEDIT if edits and all(edit.is_long for edit in edits) else WISE


def entry_of(
    edit: Edit,
    outcome: Outcome | None,
    *,
    method: str,
    part: int,
    step: int,
    guests: list[str],
) -> dict[str, Any]:
    """The ledger's entry for an edit.

    Args:
        edit: what was asked for.
        outcome: how it went; None for an edit that a later one of its step supersedes.
        method: one of ``METHODS``.
        part: the part it was written in; ``settle`` says which shard of the memory that is.
        step: the number of the step.
        guests: what was asked in with it.
    """
    entry = ledger_entry(
        asdict(edit),
        locality_prompt=outcome.locality_prompt if outcome else edit.locality_prompt,
        shard=part if outcome else None,
        step=step,
        iterations=outcome.iterations if outcome else 0,
        losses=outcome.losses if outcome else {},
        indicator=outcome.indicator if outcome else None,
        guests=guests,
    )
    converged = bool(outcome and outcome.converged)
    return entry | {"part": part, "method": method, "converged": converged}


def edit_of(entry: dict[str, Any]) -> Edit:
    """The edit that a ledger entry records."""
    return Edit(**entry["record"])


def was_trained(entry: dict[str, Any]) -> bool:
    """Of two edits with one prompt in one step the older is recorded, and not trained."""
    return entry["shard"] is not None


def is_passage(entry: dict[str, Any]) -> bool:
    """Whether an edit was written by AnyEdit, into a shard of its own."""
    return bool(entry["method"] == ANYEDIT)


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
