"""``wise-ext edit``: write a file of edits into a model and save the memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .choices import (
    ChunkKind,
    DeviceOption,
    DtypeOption,
    EditsArgument,
    Into,
    JsonOption,
    LimitOption,
    Method,
    ModelArgument,
    OffsetOption,
    Preset,
    RouterKind,
    StoredKind,
    Variant,
)
from .clusters import connected, loader, trainer
from .console import note, number_of, say, size_name
from .files import check_file, check_folder, write_json
from .weights import edit_weights

if TYPE_CHECKING:
    from ..editing.ledger import EditReport


def edit(
    model: ModelArgument,
    edits: EditsArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where the memory goes.", show_default=False),
    ],
    limit: LimitOption = None,
    offset: OffsetOption = 0,
    method: Annotated[
        Method | None,
        typer.Option(
            "--method",
            help="wise: short answers, anyedit: of any length, both into a side memory; the others "
            "into the weights.  [anyedit for question/answer records, else wise]",
        ),
    ] = None,
    into: Annotated[
        Into | None,
        typer.Option("--into", help="A side memory, or the model's own weights.  [method's]"),
    ] = None,
    chunks: Annotated[
        ChunkKind | None,
        typer.Option("--chunks", help="Where AnyEdit cuts answers.  [needed]"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, metavar="N", help="Tokens of such a chunk at most.  [1; else 40]"
        ),
    ] = None,
    preset: Annotated[
        Preset, typer.Option("--preset", help="Our best settings, or the paper's.")
    ] = Preset.default,
    variant: Annotated[
        Variant | None,
        typer.Option("--variant", help="Keep full shards apart, or merge them.  [preset's]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, metavar="B", help="Edits trained together.  [preset's]"
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option("--shard-size", min=1, metavar="N", help="Edits in one shard.  [preset's]"),
    ] = None,
    router: Annotated[
        RouterKind | None,
        typer.Option("--router", help="What chooses between memories.  [preset's]"),
    ] = None,
    layer: Annotated[
        str,
        typer.Option(
            "--layer", help="auto, a block's number, or the dotted path of a down projection."
        ),
    ] = "auto",
    stored: Annotated[
        StoredKind, typer.Option("--stored", help="Values as they are, or a third of the size.")
    ] = StoredKind.exact,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another setting of the method (AnyEdit's own: anyedit.NAME); may be repeated.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Train shards side by side on a Ray cluster; without an address, on this machine.",
            show_default=False,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option("--ray-workers", min=1, metavar="N", help="Processes.  [as many as fit]"),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write edits into a model, by default into a side memory: its weights stay as they are."""
    from ..editing.edits import read_edits

    records = read_edits(edits, limit=limit, offset=offset)
    check_folder(out, "--out")
    check_file(json, "--json")

    from ..editing.anyedit_config import AnyEditConfig
    from ..editing.config import WiseConfig
    from ..editing.ledger import ANYEDIT, method_for
    from ..editing.ledger import METHODS as SIDE
    from ..editing.settings import apart, read_settings
    from ..errors import ConfigError

    how = method.value if method else method_for(records)
    if (into or _place(how)) != _place(how):
        raise ConfigError(
            f"--into {into}: {how} edits "
            + ("a side memory: anyedit-alphaedit is for the weights" if how in SIDE else "weights")
        )
    cut = _given(chunks=chunks and chunks.value, window=window)
    if cut and how != ANYEDIT:
        raise ConfigError(f"--{next(iter(cut))} is of --method anyedit: these edits are for wise")
    block: int | str = int(layer) if layer.isdecimal() else layer
    chosen: dict[str, Any] = {"layer": block}
    of_side = _given(
        variant=variant and variant.value,
        batch_size=batch_size,
        shard_size=shard_size,
        router=router and router.value,
        stored=None if stored is StoredKind.exact else stored.value,
    )
    more = read_settings(settings or ())
    if how in SIDE:
        more, own = apart(more, ANYEDIT, how)
        chosen |= {"seed": seed} | _given(chat_template=chat or None) | of_side
        config = WiseConfig.preset(preset.value, **chosen | more)
        passages = AnyEditConfig.preset(preset.value, **cut | own) if how == ANYEDIT else None
    else:
        of_side |= _given(resume=resume or None, ray=ray, ray_workers=ray_workers)
        if of_side:
            name = next(iter(of_side)).replace("_", "-")
            raise ConfigError(f"--{name} is of a side memory: {how} edits the weights")
        chosen |= {"chat": chat} | more
        from ..storage import check_new

        check_new(out)

    from ..editing.editor import Editor
    from ..editing.progress import progress_bar
    from ..models import load_model
    from ..storage.commit import has_journal

    if how not in SIDE:
        network, tokenizer = load_model(model, dtype=dtype, device=device)
        found = edit_weights(network, tokenizer, how, records, out, **chosen)
        if json is not None:
            write_json(json, found)
        return
    try:
        with connected(ray, ray_workers) as cluster:
            network, tokenizer = load_model(model, dtype=dtype, device=device)
            editor = Editor(network, tokenizer, config, out, resume, passages)
            load = loader(model, dtype=dtype, device=device)
            with (
                trainer(cluster, editor, load, len(records), how) as others,
                progress_bar("editing") as move,
            ):
                # saves in out, when done
                report = editor.edit(records, progress=move, method=how, trainer=others)
    except KeyboardInterrupt:
        kept = f"what was done so far is kept in {out}: run the same command with --resume to go on"
        raise KeyboardInterrupt(
            f"interrupted; {kept if has_journal(out) else 'nothing was done yet'}"
        ) from None
    _print(report, out)
    if json is not None:
        write_json(json, numbers(report))


def _given(**options: Any) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _place(method: str) -> Into:
    return Into.side if method in (Method.wise, Method.anyedit) else Into.main


def numbers(report: EditReport) -> dict[str, Any]:
    """The numbers of an editing run; ``cpu_seconds`` and the peak are the whole process's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "edits": report.edits,
        "seconds": report.seconds,
        "cpu_seconds": time.process_time(),
        "seconds_per_edit": report.seconds / max(report.edits, 1),
        "iterations": report.iterations,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "shards": report.shards,
        "memory_bytes": report.memory_bytes,
    }


def remarks(report: EditReport) -> None:
    """Say what the user should know about an editing run, on standard error."""
    for earlier, later in report.conflicts:
        note(f"conflict: edit {earlier} is superseded by {later} (same prompt, another target)")
    if report.unconverged:
        names = ", ".join(report.unconverged[:10])
        more = len(report.unconverged) - 10
        note(f"not fully learned: {names}" + (f" and {more} more" if more > 0 else ""))


def _print(report: EditReport, out: Path) -> None:
    remarks(report)
    say(
        f"{number_of(report.edits, 'edit')} in {report.seconds:.1f} s "
        f"({report.seconds / max(report.edits, 1):.2f} s an edit, {report.iterations} iterations), "
        f"{number_of(report.shards, 'shard')}, {size_name(report.memory_bytes)}"
    )
    if report.rounding:
        say(f"values are stored in 8 bits, which puts them off by {report.rounding:.2%}")
    say(f"saved in {out}", style="green")
