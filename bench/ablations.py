"""`python -m bench.ablations`: each ingredient left out, one at a time; other sizes of memories.

Runs `bench.lifelong` once for every change of the default settings and sets the last rows side by
side. It may be killed at any time: the same command goes on where it was, and what is done is not
done again. Each run is a process of its own, with the same seed and the same edits.
"""

from __future__ import annotations

import json as json_format
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import rows
from bench.lifelong_data import DATASETS
from wise_ext.cli import console

RESULTS = Path(__file__).with_name("results") / "ablations.jsonl"
#: By name, what is changed. The first is what the others are compared with.
INGREDIENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-other-forms": {"reworded": 0},
    "no-shorter-wording": {"shortened": 0},
    "no-chat-context": {"chat_context": False},
    "no-contexts": {"contexts_per_edit": 0},
    "bare-prompt-only": {
        "reworded": 0,
        "shortened": 0,
        "chat_context": False,
        "contexts_per_edit": 0,
        "contexts_per_round": 0,
    },
    "no-margin": {"stop_margin": 0.0},
    "sgd": {"optimizer": "sgd", "learning_rate": 1.0},
    "no-cue": {"cue": 0.0},
    "subject-alone": {"lead": 3.0},
    "strict": {"lead": 0.1},
    "indicator-router": {"router": "indicator", "margins": True},
}
#: Edits in a shard and the share of the layer they may change: bytes an edit against quality.
SIZES: dict[str, dict[str, Any]] = {
    f"{size}-edits-at-{ratio:g}": {"shard_size": size, "mask_ratio": ratio}
    for size, ratio in (
        (100, 0.2),
        (100, 0.1),
        (100, 0.05),
        (50, 0.2),
        (50, 0.1),
        (50, 0.05),
        (25, 0.05),
        (300, 0.2),
    )
}
SUITES = {"ingredients": INGREDIENTS, "sizes": SIZES}
_COLUMNS = ("changed", "Rel", "Gen", "Loc", "whole", "right", "unrelated", "bytes", "CPU s")


def main(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "ingredients",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Repeat for more.  [all of the suite]")
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(DATASETS)}.")] = "zsre",
    until: Annotated[int, typer.Option(min=1, metavar="T", help="Edits.")] = 300,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'smollm2'.")] = (
        "smollm2"
    ),
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="The files' folder.")] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="The runs' folder.")] = (
        rows.ROOT / "build" / "ablations"
    ),
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")] = 1,
) -> None:
    """Edit the same facts with one setting changed at a time."""
    if suite not in SUITES:
        console.complain(f"unknown suite {suite!r}: choose from {', '.join(SUITES)}")
        raise typer.Exit(1)
    unknown = set(only or ()) - SUITES[suite].keys()
    if unknown:
        known = ", ".join(SUITES[suite])
        console.complain(f"{suite} has no {sorted(unknown)[0]!r}: choose from {known}")
        raise typer.Exit(1)
    chosen = {n: c for n, c in SUITES[suite].items() if not only or n in only}
    made = []
    for number, (name, changes) in enumerate(chosen.items(), start=1):
        console.note(f"{number} of {len(chosen)}: {name}")
        run = f"{dataset}-{until}-{name}"
        command = [sys.executable, "-m", "bench.lifelong", "--dataset", dataset, "--name", run]
        command += ["--until", str(until), "--at", str(until), "--threads", str(threads)]
        command += ["--model", model, "--work", str(work / run), "--json", str(json)]
        command += ["--data", str(data)] if data is not None else []
        settings = [f"{key}={json_format.dumps(value)}" for key, value in changes.items()]
        command += ["--set", *settings] if settings else []
        status = subprocess.run(command, cwd=rows.ROOT, check=False).returncode
        if status:
            raise typer.Exit(status)
        made.append((name, [row for row in rows.read(json) if row["name"] == run][-1]))
    console.table(f"{dataset}, {until} edits", _COLUMNS, map(_cells, made), right=_COLUMNS[1:])


def _cells(named: tuple[str, rows.Row]) -> list[str | None]:
    name, row = named
    routing = row["routing"]
    shares = [row[key] for key in ("rel", "gen", "loc")]
    shares += [row["generation"]["generalization"]]
    shares += [routing["right_shard_rephrase"], routing["locality_to_main"]]
    stored = row["bytes_per_edit"] + row["key_bytes_per_edit"]
    cells = [None if share is None else f"{share:.3f}" for share in shares]
    return [name, *cells, f"{stored:,.0f}", f"{row['cpu_seconds_edit']:.2f}"]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
