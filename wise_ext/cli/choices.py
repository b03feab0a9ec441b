"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Preset(StrEnum):
    """Where the settings start from."""

    default = "default"
    paper = "paper"


class Method(StrEnum):
    """How edits are written."""

    wise = "wise"
    anyedit = "anyedit"
    anyedit_memit = "anyedit-memit"
    anyedit_alphaedit = "anyedit-alphaedit"
    anyedit_unke = "anyedit-unke"
    memit = "memit"
    alphaedit = "alphaedit"
    rome = "rome"
    unke = "unke"
    ft_l = "ft-l"
    ft_ewc = "ft-ewc"


class Into(StrEnum):
    """Where edits go."""

    side = "side"
    main = "main"


class ChunkKind(StrEnum):
    """Where AnyEdit cuts answers."""

    needed = "needed"
    windows = "windows"
    sentences = "sentences"


class Regime(StrEnum):
    """How editors are compared."""

    each = "each"
    sequence = "sequence"


class Variant(StrEnum):
    """What happens to shards that are full."""

    retrieve = "retrieve"
    merge = "merge"


class RouterKind(StrEnum):
    """What decides whether a prompt goes to the side memory."""

    key = "key"
    indicator = "indicator"


class StoredKind(StrEnum):
    """What the values of shards are rounded to on disk."""

    exact = "exact"
    int8 = "int8"


class Check(StrEnum):
    """What a model has to share with a memory's base."""

    weights = "weights"
    name = "name"
    shape = "shape"


class ExportKind(StrEnum):
    """What a memory is exported as."""

    weights = "weights"
    peft = "peft"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local directory, .gguf file, or 'smollm2'.",
        show_default=False,
    ),
]
EditsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="EDITS",
        help="JSONL (prompt, target_new, …; question, answer, …), EasyEdit's JSON or zsRE's.",
        show_default=False,
    ),
]
FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A saved memory.", show_default=False)
]
MemoryOption = Annotated[
    Path, typer.Option("--memory", metavar="DIR", help="The saved memory.", show_default=False)
]
CheckOption = Annotated[
    Check,
    typer.Option(
        "--check",
        help="What MODEL shares with the memory's base; in another form of it, as quantised, that "
        "is its name or no more than the layer's shape.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="At most N edits of the file.")
]
OffsetOption = Annotated[
    int, typer.Option("--offset", min=0, metavar="K", help="Leave out the first K edits.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, fp32, bf16 or fp16.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")
]
