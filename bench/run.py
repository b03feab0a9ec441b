"""`python -m bench.run`: measure cases and append rows to a file."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import cases, options, registry, runner
from bench import rows as bench_rows
from bench.progress import case_progress
from wise_ext.cli import console

COLUMNS = ("case", "provider", "p20", "p50", "p80 µs", "GB/s", "TFLOP/s", "roofline", "clock")


def main(
    device: options.Device = options.DeviceName.cpu,
    suite: options.Suite = None,
    op: options.Ops = None,
    provider: options.Providers = None,
    shape: options.Shapes = None,
    rows: options.Rows = None,
    shards: options.Shards = None,
    dtype: options.Dtypes = None,
    variant: options.Variants = None,
    json: options.Json = None,
    seconds: options.Seconds = 0.3,
    threads: options.Threads = 1,
    commit: Annotated[
        str | None,
        typer.Option(metavar="REV", help="The commit to note, where there is no git to ask."),
    ] = None,
) -> None:
    """Check every provider of every chosen case against the reference, then time them in turns."""
    options.prepare(device.value, threads)
    options.check_words("provider", provider, registry.PROVIDERS)
    wanted = options.wanted(op, shape, rows, shards, dtype, variant)
    chosen = cases.choose(device.value, suite.value if suite else None, wanted)
    plans = [runner.plan(case, device.value, provider or ()) for case in chosen]
    for reason in dict.fromkeys(
        f"{name} left out of {plan.case.op}: {why}"
        for plan in plans
        for name, why in plan.left_out.items()
        if provider
    ):
        console.note(reason)
    plans = [plan for plan in plans if plan.providers]
    if not plans:
        console.complain("no case has everything that was asked for")
        raise typer.Exit(1)
    failures = _measure(plans, device.value, seconds, json, commit)
    for failure in failures:
        console.complain(failure)
    if failures:
        raise typer.Exit(1)


def _measure(
    plans: list[runner.Plan], device: str, seconds: float, json: Path | None, commit: str | None
) -> list[str]:
    command = shlex.join(["python", "-m", "bench.run", *sys.argv[1:]])
    origin = bench_rows.provenance(device, command, commit)
    dtypes = {plan.case.dtype for plan in plans if plan.case.shape != cases.DISPATCH_SHAPE}
    roof = bench_rows.Roofline(device, dtypes) if dtypes else None
    failures, shown = [], []
    with case_progress() as progress:
        task = progress.add_task("", total=len(plans))
        for plan in plans:
            progress.update(task, description=plan.case.label)
            try:
                found = runner.run(plan, device, seconds, roof)
            except (registry.Mismatch, torch.OutOfMemoryError) as error:
                failures.append(f"{plan.case.label} was not measured: {error}")
                found = []
            found = [{**row, "machine": origin} for row in found]
            if json:
                bench_rows.append(json, found)
            shown += found
            progress.advance(task)
    console.table("", COLUMNS, map(_line, shown), right=COLUMNS[2:8])
    return failures


def _line(row: bench_rows.Row) -> tuple[str | None, ...]:
    case = cases.Case.from_json(row)
    times = (f"{row[name]:.1f}" for name in ("p20_us", "p50_us", "p80_us"))
    share = None if row["roofline_share"] is None else f"{row['roofline_share']:.0%}"
    rates = f"{row['gbps']:.2f}", f"{row['tflops']:.3f}"
    return (case.label, row["provider"], *times, *rates, share, row["clock"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
