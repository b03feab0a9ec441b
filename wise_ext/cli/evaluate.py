"""``wise-ext eval``: measure a saved memory on a file of edits."""

from __future__ import annotations

from .choices import (
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


def evaluate(
    model: ModelArgument,
    edits: EditsArgument,
    memory: MemoryOption,
    limit: LimitOption = None,
    offset: OffsetOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure an edited model: did the edits take, generalise, and leave the rest alone."""
    from ..editing.edits import find_conflicts, read_edits

    records = read_edits(edits, limit=limit, offset=offset)
    check_file(json, "--json")

    from ..evaluation import evaluate as measure
    from .opening import open_edited

    network, tokenizer, chat = open_edited(model, memory, device=device, dtype=dtype)
    for earlier, later in find_conflicts(records):
        note(f"conflict: edit {earlier} has the prompt of {later}, which supersedes it")
    report = measure(network, tokenizer, records, chat=chat)
    metrics_table(f"{len(records)} edits of {edits.name}", report)
    if json is not None:
        write_json(json, report)
