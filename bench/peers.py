"""`python -m bench.peers --easyedit PATH`: WISE of a user's own EasyEdit clone and ours, in turns.

The same model, edits, machine and threads; the peer with the values of its own `llama-7b.yaml`, we
with the default preset. Nothing of the peer is part of this project: it is imported from PATH.
"""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import peer_easyedit
from bench.peer_scoring import METRICS
from bench.peer_worker import BATCHED, PEER, STREAM, Plan, ask, read_plan_edits
from bench.rows import ROOT, command_line
from bench.timing import percentile
from wise_ext import WiseError
from wise_ext.cli import console

Row = dict[str, Any]
# Weights further apart than this, for how far the edit moved them, are of another edit and not of
# the same one faster. Leaving out the weight decay alone would show.
SAME_WEIGHTS = 1e-5


class ThreadsName(StrEnum):
    """How many threads."""

    one = "1"
    all = "all"
    both = "both"


def main(
    easyedit: Annotated[Path, typer.Option(help="Your clone of zjunlp/EasyEdit.")],
    edits: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Edits; without, the invented facts of the demo."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Edits of one batched call.")] = 100,
    stream_edits: Annotated[int, typer.Option(min=1, help="Edits written one at a time.")] = 20,
    peer_edits: Annotated[
        int, typer.Option(min=1, help="Edits of the peer (minutes each), one a round.")
    ] = 2,
    threads: Annotated[
        ThreadsName, typer.Option(help="Threads of both sides; each in its own process.")
    ] = ThreadsName.one,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write ratios and rows, as they come.")
    ] = None,
    same_settings: Annotated[
        bool, typer.Option(help="The peer's own settings and iterations, computed our way.")
    ] = True,
    batched: Annotated[
        bool | None,
        typer.Option(
            "--batched/--one-at-a-time", help="Only this way of ours.", show_default="both"
        ),
    ] = None,
    overhead_pairs: Annotated[
        int, typer.Option(min=0, help="Timings of the inference overhead; 0 for none.")
    ] = 15,
    model: Annotated[str, typer.Option(help="As wise_ext.load_model takes it.")] = "smollm2",
    seed: Annotated[int, typer.Option(min=0, help="Of the peer's mask.")] = 0,
) -> None:
    """CPU seconds an edit, quality and inference overhead of both editors, and their ratios."""
    plan = Plan(
        easyedit=str(easyedit.absolute()),
        model=model,
        edits=None if edits is None else str(edits.absolute()),
        limit=limit,
        stream=stream_edits,
        rounds=peer_edits,
        batched=batched is not False,
        one_at_a_time=batched is not True,
        same=same_settings,
        pairs=overhead_pairs,
        seed=seed,
        command=command_line("bench.peers", sys.argv[1:]),
    )
    try:
        # Both in a moment, and not after the first process has loaded its model.
        peer_easyedit.load(easyedit)
        read_plan_edits(plan)
    except (peer_easyedit.PeerError, WiseError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from error
    rows: list[Row] = []
    failure = None
    for count in _counts(threads):
        name = "1 thread" if count == 1 else f"{count} threads"
        try:
            for row in work(replace(plan, threads=count)):
                rows.append({**row, "threads": count})
                console.note(f"{name}: {_told(row)}")
                if json is not None:
                    write(json, rows)
        except RuntimeError as error:
            failure = f"{name}: {error}"
            break
    _show(rows)
    if failure is not None:
        console.complain(failure)
        raise typer.Exit(1)


def work(plan: Plan) -> Iterator[Row]:
    """The rows of one process with so many threads.

    Raises:
        RuntimeError: it could not do its work; one line that says why.
    """
    threads = str(plan.threads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    command = [sys.executable, "-m", "bench.peer_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # dead already: its status says more
                process.stdin.write(ask(plan))
                process.stdin.close()
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # killed in the middle of a row
                row: Row = json_module.loads(line)
                if "failure" in row:
                    raise RuntimeError(row["failure"])
                yield row
        finally:
            # Of an interrupted comparison nothing goes on measuring.
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
    if process.returncode:
        raise RuntimeError(f"the process ended with status {process.returncode}")


def speedups(rows: Sequence[Row]) -> Row:
    """How many times our CPU seconds an edit the peer takes, from rows of one thread count; with
    `_wall`, wall seconds.

    Medians of ratios taken round by round. None where a side is absent; at the same settings also
    where one edit came out another, because then it is not the same work.
    """
    edits = {row["side"]: row for row in rows if row["kind"] == "edit"}
    same = [row for row in rows if row["kind"] == "same-settings"]
    equal = all(
        row["iterations"] == row["our_iterations"]
        and row["difference"] <= SAME_WEIGHTS * row["moved"]
        for row in same
    )
    found: Row = {}
    for clock, ending in (("cpu", ""), ("wall", "_wall")):
        by_round = {side: row[f"{clock}_s_by_round"] for side, row in edits.items()}
        for name, side in (("default", BATCHED), ("one_at_a_time", STREAM)):
            # A side with fewer edits than rounds has no pair for each.
            pairs = zip(by_round.get(PEER, ()), by_round.get(side, ()), strict=False)
            found[f"speedup_{name}{ending}"] = _median([p / o for p, o in pairs])
        ratios = [row[f"peer_{clock}_s"] / row[f"our_{clock}_s"] for row in same]
        found[f"speedup_same_settings{ending}"] = _median(ratios) if equal else None
    found["largest_difference"] = max((row["difference"] for row in same), default=None)
    return found


def _median(values: Sequence[float]) -> float | None:
    return percentile(values, 0.5) if values else None


def report(rows: Sequence[Row]) -> Row:
    """The document of `--json`: ratios of the fewest threads, of each number of threads, rows."""
    counts = sorted({row["threads"] for row in rows})
    each = {n: speedups([row for row in rows if row["threads"] == n]) for n in counts}
    return {
        **(each[counts[0]] if counts else speedups([])),
        "by_threads": {str(n): found for n, found in each.items()},
        "rows": list(rows),
    }


def write(path: Path, rows: Sequence[Row]) -> None:
    """The report as a whole or not at all: what a killed run has measured stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json_module.dumps(report(rows), indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def _counts(threads: ThreadsName) -> list[int]:
    everything = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    everything = everything or os.cpu_count() or 1
    wanted = {"1": [1], "all": [everything], "both": [1, everything]}[threads.value]
    return list(dict.fromkeys(wanted))


def _told(row: Row) -> str:
    if row["kind"] == "same-settings":
        return (
            f"same settings, edit {row['edit']}: max|dW| {row['difference']:.3g}, "
            f"{row['peer_cpu_s']:.1f} s to {row['our_cpu_s']:.1f} s"
        )
    if row["kind"] == "edit":
        return f"{row['side']}: {row['cpu_s_an_edit']:.2f} CPU s an edit"
    return f"{row['kind']} of {row['side']}"


def _show(rows: Sequence[Row]) -> None:
    """A table of each kind of row there is, and the ratios."""
    layouts: list[tuple[str, str, tuple[str, ...], Callable[[Row], Iterable[object]]]] = [
        ("edit", "Edits", _EDIT, _edit_line),
        ("same-settings", "The peer's settings", _SAME, _same_line),
        ("quality", "Quality", ("side", "n", *METRICS), _quality_line),
        ("overhead", "Inference, edited over bare", _OVERHEAD, _overhead_line),
    ]
    for kind, title, columns, line in layouts:
        lines = [(row["threads"], *line(row)) for row in rows if row["kind"] == kind]
        if lines:
            console.table(title, ("threads", *columns), lines, right=columns[1:])
    for count, found in report(rows)["by_threads"].items():
        for name, value in found.items():
            if value is not None:
                console.say(f"{name} ({console.number_of(int(count), 'thread')}): {value:.3g}")


_EDIT = ("side", "edits", "CPU s an edit", "wall s an edit", "iterations", "setup CPU s")
_SAME = ("edit", "iterations", "max|dW|", "peer CPU s", "our CPU s", "ratio")
_OVERHEAD = ("side", "text", "prefill 128", "p20-p80", "decode", "p20-p80 ")


def _edit_line(row: Row) -> Iterator[object]:
    yield row["side"]
    yield "+".join(map(str, row["edits"]))
    for name in ("cpu_s_an_edit", "wall_s_an_edit", "iterations_an_edit", "setup_cpu_s"):
        yield f"{row[name]:.3g}"


def _same_line(row: Row) -> Iterator[object]:
    yield row["edit"]
    yield row["iterations"]
    ratio = row["peer_cpu_s"] / row["our_cpu_s"]
    for value in (row["difference"], row["peer_cpu_s"], row["our_cpu_s"], ratio):
        yield f"{value:.3g}"


def _quality_line(row: Row) -> Iterator[object]:
    yield row["side"]
    yield row["n"]
    for name in METRICS:
        yield None if row[name] is None else f"{row[name]:.3g}"


def _overhead_line(row: Row) -> Iterator[object]:
    yield row["side"]
    yield row["text"]
    for name in ("prefill", "decode"):
        yield f"{row[name]:.3f}"
        yield f"{row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f}"


if __name__ == "__main__":
    typer.run(main)
