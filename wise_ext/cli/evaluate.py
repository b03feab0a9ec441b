"""``wise-ext eval``: measure a saved memory on a file of edits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .choices import (
    Check,
    CheckOption,
    DeviceOption,
    DtypeOption,
    EditsArgument,
    JsonOption,
    LimitOption,
    MemoryOption,
    ModelArgument,
    OffsetOption,
)
from .console import metrics_table, note
from .files import check_file, write_json

if TYPE_CHECKING:
    from ..editing.edits import Edit


def evaluate(
    model: ModelArgument,
    edits: EditsArgument,
    memory: MemoryOption,
    limit: LimitOption = None,
    offset: OffsetOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    check: CheckOption = Check.weights,
    json: JsonOption = None,
    similarity: Annotated[
        bool,
        typer.Option(
            "--similarity/--no-similarity",
            help="Long answers: compare meanings, too, by a sentence model.",
        ),
    ] = True,
) -> None:
    """Measure an edited model: did the edits take, generalise, and leave the rest alone."""
    from ..editing.edits import find_conflicts, read_edits

    records = read_edits(edits, limit=limit, offset=offset)
    check_file(json, "--json")
    long = _are_long(records, edits)

    from ..evaluation import evaluate as measure
    from ..evaluation import evaluate_long
    from ..evaluation.text_metrics import require_longform

    if long:
        require_longform(similarity)

    from .opening import open_edited

    network, tokenizer, chat = open_edited(model, memory, device=device, dtype=dtype, check=check)
    for earlier, later in find_conflicts(records):
        note(f"conflict: edit {earlier} has the prompt of {later}, which supersedes it")
    if long:
        report = evaluate_long(network, tokenizer, records, chat=chat, similarity=similarity)
    else:
        report = measure(network, tokenizer, records, chat=chat)
    metrics_table(f"{len(records)} edits of {edits.name}", report)
    if json is not None:
        write_json(json, report)


def _are_long(edits: list[Edit], path: Path) -> bool:
    """Whether all edits are long-form.

    Raises:
        DataError: some are and some are not.
    """
    from ..errors import DataError

    long = {edit.is_long: edit.id for edit in edits}
    if len(long) == 2:
        raise DataError(
            f"{path}: edit {long[True]!r} is long-form (question, answer) and edit "
            f"{long[False]!r} is not: they are measured differently, give each kind its own file"
        )
    return True in long
