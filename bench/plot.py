"""`python -m bench.plot [FILE.jsonl ...] [--out DIR]`: recorded rows as figures.

Rows of `bench.run` become speed-ups over plain torch and rooflines, rows of `bench.lifelong` its
metrics against the number of edits, rows of `bench.overhead` costs against the number of shards.
Needs matplotlib, which only this uses (the `bench` extra).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench import lifelong_plot, overhead, overhead_plot
from bench import rows as bench_rows
from bench.cases import DISPATCH_SHAPE, ROUTES, SHAPES, Case
from bench.lifelong_options import RESULTS
from bench.rows import ROOT, Row
from wise_ext.cli import console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour and marker a provider in every figure; the hues hold apart without colour vision too.
STYLES = {
    "cpp": ("#0072B2", "o"),
    "cuda": ("#009E73", "s"),
    "triton": ("#D55E00", "D"),
    "torch": ("#7F7F7F", "x"),
    "torch-dense": ("#56B4E9", "+"),
    "compiled": ("#CC79A7", "^"),
    "reference": ("#B8B8B8", "v"),
}
BASELINE = "torch"
PLOTS = ROOT / "docs" / "plots"
# What is drawn unless files are named.
RECORDED = (RESULTS, overhead.RESULTS)
# More lines than this and labels become small: the figure gets another column.
LINES_A_COLUMN = 36


def _baselines(rows: Iterable[Row]) -> dict[Case, float]:
    return {Case.from_json(row): row["p50_us"] for row in rows if row["provider"] == BASELINE}


def _order(case: Case) -> tuple[object, ...]:
    """Larger shapes further down, then more rows and shards."""
    variants = (*ROUTES, "")
    place = variants.index(case.variant) if case.variant in variants else len(variants)
    return (list(SHAPES).index(case.shape), case.dtype, place, case.rows, case.shards, case.grad)


def _name(case: Case) -> str:
    parts = [case.shape, case.dtype, f"N={case.rows}", f"k={case.shards}", case.variant]
    return "  ".join([*filter(None, parts), *(["grad"] if case.grad else [])])


def ratios(op: str, rows: Sequence[Row]) -> Figure | None:
    """One op: how many times faster than the torch composite every provider is, case by case."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    baselines = _baselines(rows)
    others = [
        row for row in rows if row["provider"] != BASELINE and Case.from_json(row) in baselines
    ]
    cases = sorted({Case.from_json(row) for row in others}, key=_order)
    if not cases:
        return None
    columns = -(-len(cases) // LINES_A_COLUMN)
    a_column = -(-len(cases) // columns)
    figure = Figure((7.5 * columns, 1.9 + 0.26 * a_column), layout="constrained")
    # One scale for all columns: they are one list.
    values = [baselines[Case.from_json(row)] / row["p50_us"] for row in others]
    limits = min(*values, 1.0) / 1.3, max(*values, 1.0) * 1.3
    for number, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        part = cases[number * a_column : (number + 1) * a_column]
        _ratio_lines(axes, part, others, baselines)
        axes.set_xlim(limits)
        if limits[1] < 100 * limits[0]:  # one label a decade is too few to read a value by
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.suptitle(f"{op}: times faster than the torch composite\n{_where(rows)}", fontsize=11)
    # The first column may lack a provider that a later one has.
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    return figure


def _ratio_lines(
    axes: Axes, cases: Sequence[Case], rows: Sequence[Row], baselines: dict[Case, float]
) -> None:
    lines = {case: line for line, case in enumerate(cases)}
    for provider, (colour, marker) in STYLES.items():
        found = [
            (lines[case], baselines[case], row)
            for row in rows
            if row["provider"] == provider and (case := Case.from_json(row)) in lines
        ]
        if not found:
            continue
        middle = [base / row["p50_us"] for _, base, row in found]
        # A slow p80 is a low ratio.
        low = [m - base / row["p80_us"] for m, (_, base, row) in zip(middle, found, strict=True)]
        high = [base / row["p20_us"] - m for m, (_, base, row) in zip(middle, found, strict=True)]
        axes.errorbar(
            middle,
            [line for line, _, _ in found],
            xerr=[[max(0.0, value) for value in low], [max(0.0, value) for value in high]],
            fmt=marker,
            color=colour,
            markersize=5,
            linewidth=1,
            label=provider,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [_name(case) for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel(f"time of {BASELINE} / time (bars: p20 to p80)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(axis="x", which="major", linewidth=0.4)
    axes.grid(axis="y", linewidth=0.2)


def roofline(dtype: str, rows: Sequence[Row]) -> Figure:
    """All rows of one dtype under the roof of the same run: a copy's slope, a matmul's ceiling.

    Without the reference: it is there to be right.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure((9.5, 6.5), layout="constrained")
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    reach = np.geomspace(min(intensity) / 2, max(*intensity, 1.0) * 4, 200)
    copies, matmuls = _median(rows, "copy_gbps"), _median(rows, "matmul_tflops")
    axes.plot(reach, np.minimum(reach * copies / 1e3, matmuls), color="black", linewidth=1.2)
    ops = sorted({row["op"] for row in rows})
    fills = dict(zip(ops, _palette(len(ops)), strict=True))
    for row in rows:
        axes.plot(
            row["flops"] / row["bytes"],
            row["tflops"],
            marker=STYLES[row["provider"]][1],
            color=fills[row["op"]],
            linestyle="none",
            markersize=6,
            alpha=0.8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that has to move")
    axes.set_ylabel("TFLOP/s")
    axes.grid(which="major", linewidth=0.4)
    axes.set_title(
        f"{dtype}: copy {copies:.4g} GB/s, matmul {matmuls:.4g} TFLOP/s\n{_where(rows)}",
        fontsize=11,
    )
    _legends(figure, fills, sorted({row["provider"] for row in rows}))
    return figure


def _legends(figure: Figure, fills: dict[str, Any], providers: Iterable[str]) -> None:
    """Colours are ops, markers are providers."""
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=colour, label=op) for op, colour in fills.items()]
    handles += [
        Line2D([], [], color="black", marker=STYLES[name][1], linestyle="none", label=name)
        for name in providers
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)


def _palette(count: int) -> list[Any]:
    from matplotlib import colormaps

    # The strong colours first, then their pale neighbours.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return [colormaps["tab20"](order[number % 20]) for number in range(count)]


def _median(rows: Sequence[Row], name: str) -> float:
    values = sorted(row[name] for row in rows)
    return float(values[len(values) // 2])


def _where(rows: Sequence[Row]) -> str:
    machine = rows[-1]["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    name = machine.get("gpu") or f"{machine['processor']}, {threads}"
    return f"{name}, torch {machine['torch']}, commit {machine['commit']}"


def draw(rows: Sequence[Row], folder: Path, svg: bool = False) -> list[Path]:
    """Write every figure that the rows give, as PNG and if asked for as SVG too."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = _measured([row for row in rows if "provider" in row])
    figures |= lifelong_plot.figures(rows)
    figures |= overhead_plot.figures(rows)
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg") if svg else ("png",):
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=110)
    return written


def _measured(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures of `bench.run`'s rows; one device a file name."""
    latest = {(row["machine"]["device"], Case.from_json(row), row["provider"]): row for row in rows}
    found: dict[str, Figure | None] = {}
    for device in sorted({key[0] for key in latest}):
        here = [row for key, row in latest.items() if key[0] == device]
        for op in sorted({row["op"] for row in here}):
            own = [row for row in here if row["op"] == op]
            found[f"ratio-{op.strip('_')}-{device}"] = ratios(op, own)
        busy = [
            row
            for row in here
            if row["shape"] != DISPATCH_SHAPE and row["provider"] != "reference" and row["flops"]
        ]
        for dtype in sorted({row["dtype"] for row in busy}):
            part = [row for row in busy if row["dtype"] == dtype]
            found[f"roofline-{dtype}-{device}"] = roofline(dtype, part)
    return {name: figure for name, figure in found.items() if figure is not None}


def main(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]",
            help="Rows of bench.run, bench.lifelong or bench.overhead; without, those of the last "
            "two that are recorded.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the figures go.")] = PLOTS,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Only lifelong runs of this name (repeat for more); * stands for anything.",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[bool, typer.Option("--svg", help="Draw SVGs too.")] = False,
) -> None:
    """Draw rows."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        console.complain("drawing needs matplotlib: pip install 'wise-ext[bench]'")
        raise typer.Exit(1) from error
    chosen = files or [path for path in RECORDED if path.is_file()]
    rows = [row for file in chosen for row in bench_rows.read(file)]
    rows = [
        row
        for row in rows
        if not name
        or not lifelong_plot.is_lifelong(row)
        or any(fnmatchcase(row["name"], pattern) for pattern in name)
    ]
    if not rows:
        console.complain("there are no rows to draw")
        raise typer.Exit(1)
    for path in draw(rows, out, svg):
        console.say(str(path))


if __name__ == "__main__":
    typer.run(main)
