"""``wise-ext export``: a memory as plain weights, or as PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import DeviceOption, DtypeOption, ExportKind, MemoryOption, ModelArgument
from .console import note, number_of, say, table
from .files import check_folder


def export(
    model: ModelArgument,
    memory: MemoryOption,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="OUT", help="A new folder for it.", show_default=False),
    ],
    kind: Annotated[
        ExportKind, typer.Option("--format", help="A whole model, or LoRA adapters for PEFT.")
    ] = ExportKind.weights,
    shard: Annotated[
        list[int] | None,
        typer.Option("--shard", metavar="N", help="Of these shards alone; may be repeated."),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option("--merge", metavar="METHOD", help="How several shards become one: ties, …"),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Write a memory in a form that needs no wise-ext. Its router does not come along."""
    check_folder(out, "--out")
    if kind is ExportKind.peft:
        _adapters(model, memory, out, shard, merge, device, dtype)
    else:
        _weights(model, memory, out, shard, merge, device, dtype)
    note("the router is lost: what was exported is on for every prompt")
    say(f"saved in {out}", style="green")


def _weights(
    model: str,
    memory: Path,
    out: Path,
    shards: list[int] | None,
    merge: str | None,
    device: str,
    dtype: str,
) -> None:
    from ..integrations.export.baking import chosen_shards, delta_of
    from ..integrations.export.weights import export_weights
    from ..storage import check_new, load_memory_dir
    from .opening import open_edited

    check_new(out)
    stored = load_memory_dir(memory)
    # What cannot be baked is refused before the model is loaded.
    delta_of(stored.memory, chosen_shards(stored.memory, shards), merge, 1.0)
    network, tokenizer, _ = open_edited(model, memory, device=device, dtype=dtype)
    report = export_weights(network, tokenizer, stored, out, shards=shards, merge=merge)
    table(
        f"{number_of(report['edits'], 'edit')} in {report['layer']}, {report['dtype']}",
        ("", "with the router", "in the weights"),
        list(_rows(report["before"], report["after"])),
        right=("with the router", "in the weights"),
    )
    if report["cue"]:
        note("the memory was trained with cues, which plain weights do not have: see the figures")


def _adapters(
    model: str,
    memory: Path,
    out: Path,
    shards: list[int] | None,
    merge: str | None,
    device: str,
    dtype: str,
) -> None:
    from ..errors import ConfigError
    from ..integrations.packages import require

    require("peft", "export", "--format peft")
    if merge is not None:
        raise ConfigError("--merge is of --format weights: adapters stay one a shard")

    from ..integrations.export.adapters import export_adapters
    from ..integrations.export.baking import is_transposed
    from ..models import fingerprint, get_module, load_model
    from ..storage import check_base, check_new, load_memory_dir

    check_new(out)
    stored = load_memory_dir(memory)
    network, _ = load_model(model, dtype=dtype, device=device)
    check_base(stored.base, fingerprint(network), model)
    transposed = is_transposed(get_module(network, stored.memory.layer))
    report = export_adapters(stored, transposed, out, shards=shards)
    table(
        "adapters",
        ("folder", "rank", "edits"),
        [(name, a["rank"], len(a["edits"])) for name, a in report["adapters"].items()],
        right=("rank", "edits"),
    )


def _rows(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Any:
    for key, value in before.items():
        if isinstance(value, dict):
            yield from _rows(value, after[key], f"{prefix}{key}.")
        else:
            yield prefix + key, _number(value), _number(after[key])


def _number(value: Any) -> str | None:
    return None if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
