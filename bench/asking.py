"""`python -m bench.asking`: do prompts as users write them find their edit, and nothing else?"""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from bench import asked as prompts
from bench import rows as bench_rows
from bench.addressed import key_only_memory
from bench.asked import Asked, Neutral
from bench.asker import Asker, Found, elsewhere_rows, kind_rows
from bench.progress import case_progress
from wise_ext import models
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit, demo_edits, read_edits
from wise_ext.editing.settings import read_settings
from wise_ext.errors import ConfigError, DataError, WiseError
from wise_ext.memory import MAIN, SideMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESULTS = Path(__file__).with_name("results") / "asking.jsonl"
COLUMNS = ("kind", "asked", "to side", "right edit", "contains", "equal", *prompts.NEGATIVE)


# -- the memory that is asked --------------------------------------------------------------------


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: WiseConfig,
    crowd: Sequence[Edit],
    folder: Path | None,
    routing_only: bool,
) -> SideMemory:
    """Patch a model with the demo's facts, and with the keys of a crowd in one more shard.

    Args:
        model: not patched yet.
        tokenizer: its tokenizer.
        config: of the memory; that of ``folder`` counts where one is given.
        crowd: other edits, whose keys alone are stored.
        folder: a saved memory that holds the demo's facts; None edits them now.
        routing_only: edit nothing: every demo fact gets an empty shard of its own.

    Raises:
        DataError: the memory in ``folder`` lacks a fact.
        WiseError: see `Editor` and `load_memory`.
    """
    facts = demo_edits()
    if routing_only:
        slots: list[Sequence[Edit]] = [[fact] for fact in facts]
        memory = key_only_memory(model, tokenizer, config, [*slots, crowd] if crowd else slots)
        models.patch(model, memory)
        return memory
    if folder is not None:
        from wise_ext.editing.loading import load_memory

        memory = load_memory(model, folder)
        missing = [fact.id for fact in facts if memory.shard_of(fact.id) is None]
        if missing:
            raise DataError(
                f"the memory in {folder} lacks the demo fact {missing[0]!r}: make it with "
                "wise-ext demo --out"
            )
    else:
        from wise_ext.editing.editor import Editor

        editor = Editor(model, tokenizer, config)
        editor.edit(facts)
        memory = editor.memory
    if crowd:
        models.unload(model)
        key_only_memory(model, tokenizer, config, [crowd], memory)
        models.patch(model, memory)
    return memory


def read_crowd(files: Sequence[Path], size: int) -> list[Edit]:
    """The first edits of the files, all ids different.

    Raises:
        DataError: there are fewer.
    """
    found: list[Edit] = []
    for file in files:
        found += read_edits(file, limit=size - len(found)) if len(found) < size else []
    if files and len(found) < size:
        raise DataError(f"the crowd's files hold {len(found)} edits, not {size}: name another file")
    return [replace(edit, id=f"crowd-{i}") for i, edit in enumerate(found)]


# -- the command ---------------------------------------------------------------------------------


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'smollm2'.")] = (
        "smollm2"
    ),
    memory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A saved memory with the demo's facts.  [edits them now]"),
    ] = None,
    crowd: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Edits whose keys are stored too (repeat for more)."),
    ] = None,
    crowd_size: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1000,
    routing_only: Annotated[
        bool, typer.Option("--routing-only", help="Train nothing, generate no answers.")
    ] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this kind (repeat for more): {', '.join(prompts.KINDS)}, none."),
    ] = None,
    elsewhere: Annotated[bool, typer.Option(help="Read the neutral texts as well.")] = True,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting than the default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 24,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
    details: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a line for every prompt there.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")] = 1,
) -> None:
    """Measure recall and false alarms of every kind of prompt, and what neutral text notices."""
    torch.set_num_threads(threads)
    rows = []
    try:
        plan = Plan(
            model,
            _config(memory, read_settings(setting or ())),
            memory,
            read_crowd(crowd or [], crowd_size),
            routing_only,
            _wanted(kind),
            prompts.read_elsewhere() if elsewhere else [],
            0 if routing_only else max_new_tokens,
        )
        if routing_only and memory:
            raise ConfigError("--routing-only makes a memory of its own: leave out it or --memory")
        if details:
            details.write_text("", "utf-8")
        for row in measure(plan, details):
            bench_rows.append(json, [row])  # a killed run keeps the kinds it has finished
            rows.append(row)
    except (WiseError, OSError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from None
    show(rows)


@dataclass(frozen=True)
class Plan:
    """What to measure; see the options of the command."""

    model: str
    config: WiseConfig
    memory: Path | None
    crowd: list[Edit]
    routing_only: bool
    asked: list[Asked]
    texts: list[Neutral]
    max_new_tokens: int


def measure(plan: Plan, details: Path | None = None) -> Iterator[bench_rows.Row]:
    """The rows of a plan, one as soon as its kind is done; a line a prompt goes to ``details``.

    Raises:
        WiseError: see `prepare`.
    """
    command = bench_rows.command_line("bench.asking", sys.argv[1:])
    origin = bench_rows.provenance("cpu", command)
    model, tokenizer = models.load_model(plan.model, device="cpu")
    asked = plan.asked
    if not prompts.has_template(tokenizer):
        asked = [a for a in asked if a.form != "chat"]
        left_out = len(plan.asked) - len(asked)
        console.note(f"{left_out} prompts left out: this tokenizer has no chat template")
    memory = prepare(model, tokenizer, plan.config, plan.crowd, plan.memory, plan.routing_only)
    asker = Asker(model, tokenizer, plan.max_new_tokens)
    targets = {edit.id: edit.target_new for edit in demo_edits()}
    context = {
        "model": plan.model,
        "mode": "routing" if plan.routing_only else "edited",
        "crowd": len(plan.crowd),
        "settings": plan.config.to_dict(),
        "machine": origin,
    }
    with case_progress() as progress:
        task = progress.add_task("", total=len(asked) + len(plan.texts))
        for kind in dict.fromkeys(a.kind for a in asked):
            progress.update(task, description=kind)
            found = []
            for one in asker.ask([a for a in asked if a.kind == kind]):
                found.append(one)
                progress.advance(task)
            _write_lines(details, (_line_of(f, memory) for f in found))
            for row in kind_rows(found, memory, targets):
                yield {**row, **context}
        for kind in dict.fromkeys(t.kind for t in plan.texts):
            progress.update(task, description=kind)
            read = []
            for entry in asker.read([t for t in plan.texts if t.kind == kind]):
                read.append(entry)
                progress.advance(task)
            lines = ({**asdict(r.text), "case": "elsewhere", "route": r.route} for r in read)
            _write_lines(details, lines)
            for row in elsewhere_rows(read):
                yield {**row, **context}


def _config(folder: Path | None, changes: dict[str, Any]) -> WiseConfig:
    if folder is None:
        return WiseConfig.preset("default", **changes)
    if changes:
        raise ConfigError("--set changes nothing about a saved memory: leave out --set or --memory")
    from wise_ext.storage import load_memory_dir

    stored = dict(load_memory_dir(folder).config)
    for other in ("closed_parts", "anyedit"):
        stored.pop(other, None)
    return WiseConfig.from_dict(stored)


def _wanted(kinds: list[str] | None) -> list[Asked]:
    for kind in kinds or ():
        if kind not in (*prompts.KINDS, "none"):
            raise ConfigError(f"unknown kind {kind!r}: choose from {', '.join(prompts.KINDS)}")
    return [a for a in prompts.read_asked() if not kinds or a.kind in kinds]


def _line_of(found: Found, memory: SideMemory) -> bench_rows.Row:
    a = found.asked
    line: bench_rows.Row = {"id": a.id, "kind": a.kind, "case": a.case, "route": found.route}
    if found.route != MAIN:
        line["shard_edits"] = memory.shards[found.route].edit_ids[:3]
    return {**line, "facts": a.facts, "text": a.text, "answer": found.answer}


def _write_lines(path: Path | None, lines: Iterable[bench_rows.Row]) -> None:
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json_format.dumps(line, ensure_ascii=False) + "\n")


# -- showing -------------------------------------------------------------------------------------


def show(rows: Sequence[bench_rows.Row]) -> None:
    """Print the rows as tables."""
    asked = [row for row in rows if row["measured"] == "asked"]
    if asked:
        lines = [line for row in asked for line in _lines(row)]
        console.table("asked, and false alarms", COLUMNS, lines, right=COLUMNS[1:])
    texts = [row for row in rows if row["measured"] == "elsewhere"]
    if texts:
        columns = ("neutral text", "texts", "to main", "perplexity unedited", "edited")
        lines = [
            (
                row["kind"],
                str(row["texts"]),
                _share(row["to_main"]),
                _share(row["perplexity_unedited"]),
                _share(row["perplexity_edited"]),
            )
            for row in texts
        ]
        console.table("", columns, lines, right=columns[1:])


def _lines(row: bench_rows.Row) -> Iterator[tuple[str | None, ...]]:
    """A line for the case that asks; one more where a kind has a second."""
    alarms = [_share(row["false_alarms"].get(c, {}).get("share")) for c in prompts.NEGATIVE]
    for number, (case, r) in enumerate(row["recall"].items()):
        name = row["kind"] if case == "edit" else f"  {case}"
        shares = [_share(r[key]) for key in ("to_side", "right_edit", "contains", "equal")]
        yield (name, str(r["n"]), *shares, *(alarms if number == 0 else [None] * len(alarms)))


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
