"""``wise-ext demo``: the main job on a real model, start to end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import JsonOption
from .console import metrics_table, note, number_of, route_name, say, shortened, size_name, table
from .edit import numbers, remarks
from .files import check_file, check_folder, write_json


def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the memory goes.  [a temporary folder]"),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Another model than SmolLM2-135M-Instruct.")
    ] = "smollm2",
    json: JsonOption = None,
) -> None:
    """Teach SmolLM2 24 invented facts, and show what changed and what did not."""
    check_file(json, "--json")
    if out is not None:
        check_folder(out, "--out")

    from ..editing.config import WiseConfig
    from ..editing.editor import Editor
    from ..editing.edits import demo_edits
    from ..editing.progress import counted, progress_bar
    from ..evaluation import evaluate, generate_answers
    from ..models import load_model

    edits = demo_edits()
    note(f"loading {model} (the first time it is converted, which takes a while)")
    network, tokenizer = load_model(model)
    folder = out or Path(tempfile.mkdtemp(prefix="wise-ext-demo-"))
    questions = [text for e in edits for text in (e.prompt, e.rephrase_prompt or e.prompt)]
    with counted("asking the unedited model", len(questions)) as tick:
        before = generate_answers(network, tokenizer, questions, progress=tick)

    editor = Editor(network, tokenizer, WiseConfig.preset("default"), directory=folder)
    with progress_bar(f"editing {len(edits)} facts") as move:
        report = editor.edit(edits, progress=move)  # saves in the folder when it is done
    remarks(report)

    result = evaluate(network, tokenizer, edits, details=True)
    details = result.pop("details")
    texts = [answer.text for answer in before]
    table(
        "before and after",
        ("", "prompt", "before", "after", "route"),
        list(_rows(details, texts[::2], texts[1::2])),
    )
    metrics_table("metrics", result)
    say(
        f"{number_of(report.edits, 'edit')} in {report.seconds:.0f} s, "
        f"{number_of(report.shards, 'shard')}, {size_name(report.memory_bytes)}"
    )
    say(f"saved in {folder}", style="green")
    ask = f'--show-route --prompt "{edits[0].prompt}"'
    say(f"try: wise-ext generate {model} --memory {folder} {ask}")
    if json is not None:
        write_json(json, {"edit": numbers(report), "eval": result})


def _rows(
    details: list[dict[str, Any]], before: list[str], rephrased_before: list[str]
) -> Iterator[tuple[object, ...]]:
    """Three lines a fact: the prompt it was taught with, its rephrasing, something unrelated."""
    for row, old, old_rephrased in zip(details, before, rephrased_before, strict=True):
        yield (
            "edit",
            row["prompt"],
            shortened(old),
            shortened(row["answer"]),
            route_name(row["route"]),
        )
        yield (
            "rephrased",
            row["rephrase_prompt"],
            shortened(old_rephrased),
            shortened(row["rephrase_answer"]),
            route_name(row["rephrase_route"]),
        )
        yield (
            "unrelated",
            row["locality_prompt"],
            shortened(row["locality_unedited_answer"]),
            shortened(row["locality_answer"]),
            route_name(row["locality_route"]),
        )
