"""``wise-ext show``, ``undo``, ``verify``: what a memory holds, less of it, whether it is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from .choices import DeviceOption, DtypeOption, FolderArgument
from .console import complain, say, shortened, size_name, table

# Of a prompt and of an answer, which may be paragraphs.
_WIDTH = 80


def show(directory: FolderArgument) -> None:
    """List the shards and the edits of a saved memory."""
    from ..storage import load_memory_dir

    stored = load_memory_dir(directory)
    memory = stored.memory
    settings = [
        ("base model", stored.base.get("name")),
        ("layer", memory.layer),
        ("router", memory.routing),
        ("variant", memory.variant),
        ("shards", len(memory.shards)),
        ("edits", len(stored.ledger)),
    ]
    table(str(directory), ("what", "value"), settings)
    table(
        "shards",
        ("shard", "edits", "density", "threshold", "size"),
        [
            (
                index,
                len(shard.edit_ids),
                f"{shard.density:.3f}",
                f"{shard.threshold:.4g}",
                size_name(shard.nbytes()),
            )
            for index, shard in enumerate(memory.shards)
        ],
        right=("shard", "edits", "density", "threshold", "size"),
    )
    table(
        "edits",
        ("id", "prompt", "target", "shard", "iterations"),
        [
            (
                line.get("id"),
                shortened(line["prompt"], _WIDTH),
                shortened(line["target"], _WIDTH),
                line.get("shard"),
                line.get("iterations"),
            )
            for line in stored.ledger
        ],
        right=("shard", "iterations"),
    )


def undo(
    directory: FolderArgument,
    edit: Annotated[
        str, typer.Option("--edit", metavar="ID", help="The edit to undo.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Where its base model is.  [as recorded]"),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Rebuild a saved memory as if one edit had never been made."""
    from ..errors import DataError
    from ..storage import load_memory_dir

    stored = load_memory_dir(directory)
    ids = [str(line.get("id")) for line in stored.ledger]
    if edit not in ids:
        raise DataError(f"{directory}: no edit {edit!r}: 'wise-ext show {directory}' lists them")

    from ..editing.editor import Editor
    from ..models import load_model

    base = model or str(stored.base["name"])
    network, tokenizer = load_model(base, dtype=dtype, device=device)
    Editor.open(network, tokenizer, directory).undo(edit)  # saves in the directory
    say(f"edit {edit} undone, {len(ids) - 1} left in {directory}", style="green")


def verify(directory: FolderArgument) -> None:
    """Check every file of a saved memory; exit status 1 if anything is wrong."""
    from ..storage import verify as check

    checks = check(directory)
    table(
        str(directory),
        ("check", "", "detail"),
        [(c.name, "ok" if c.ok else "BAD", c.detail) for c in checks],
    )
    if not all(c.ok for c in checks):
        complain(f"{directory} is damaged: restore it from a copy, or edit again")
        raise typer.Exit(1)
