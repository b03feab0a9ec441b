"""Figures of `bench.lifelong`'s rows: every metric against the number of edits, goals marked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, without the yellow that white paper swallows: apart without colour vision too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_REGIMES: dict[str, Any] = {"batch": "-", "stream": "--"}
_GOAL_MARKERS = {"batch": "*", "stream": "p"}
_COLUMNS = 4


class Panel(NamedTuple):
    """One small figure: its title, what it shows of a row, and its name among the goals."""

    title: str
    value: Callable[[Row], float | None]
    goal: str = ""


def _of(*path: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Any = row
        for name in path:
            found = (found or {}).get(name)
        return None if found is None else float(found)

    return value


_REL = Panel("Rel: target tokens, edit", _of("rel"), "rel")
_GEN = Panel("Gen: target tokens, rephrase", _of("gen"), "gen")
_LOC = Panel("Loc: tokens as unedited", _of("loc"), "loc")
_OUT = Panel("unrelated prompts to main memory", _of("routing", "locality_to_main"), "main")
_WHOLE = Panel("generated whole answer, edit", _of("generation", "reliability"), "edit")
_REPHRASED = Panel(
    "generated whole answer, rephrase", _of("generation", "generalization"), "rephrase"
)
_SHARD = Panel("right shard, edit", _of("routing", "right_shard"), "shard")
_RIGHT = Panel("right shard, rephrase", _of("routing", "right_shard_rephrase"), "shard rephrase")
_IN = Panel("rephrases to side memory", _of("routing", "rephrase_to_side"), "in")
PERPLEXITY = Panel(
    "target's perplexity, median (dotted: unedited)", _of("target_perplexity", "median")
)
_UNEDITED = _of("unedited", "target_perplexity", "median")

PANELS = (_REL, _GEN, _WHOLE, _REPHRASED, _SHARD, _RIGHT, _OUT, _LOC)
HARD_PANELS = (_REL, _GEN, _WHOLE, _REPHRASED, _RIGHT, _IN, _OUT, _LOC)

#: data sets that share a figure, because one goes on where the other ends
FIGURES = {
    "zsre": ("zsre", "zsre+counterfact"),
    "counterfact": ("counterfact",),
    "extra": ("extra",),
    "hallucination": ("hallucination",),
    "temporal": ("temporal",),
}
_TITLES = {
    "zsre": "zsRE, then CounterFact",
    "counterfact": "CounterFact: neighbours with the same wording",
    "extra": "zsRE: other relations of the same subject",
    "hallucination": "hallucination",
    "temporal": "temporal",
}
_HARD = ("counterfact", "extra")

_NAMES = ("rel", "gen", "loc", "edit", "rephrase", "shard", "shard rephrase", "main")
#: by figure, T and regime: what the project set out to reach
GOALS: dict[str, dict[tuple[int, str], dict[str, float]]] = {
    "zsre": {
        key: dict(zip(_NAMES, values, strict=True))
        for key, values in {
            (100, "batch"): (1.00, 0.94, 0.99, 0.99, 0.88, 1.00, 0.98, 0.99),
            (1000, "stream"): (0.98, 0.92, 0.99, 0.96, 0.85, 0.99, 0.97, 0.99),
            (1000, "batch"): (0.99, 0.93, 0.99, 0.98, 0.87, 0.99, 0.97, 0.99),
            (3000, "batch"): (0.97, 0.88, 0.97, 0.95, 0.80, 0.98, 0.92, 0.97),
        }.items()
    },
    "counterfact": {(300, "batch"): {"in": 0.90, "main": 0.90}},
    "extra": {(300, "batch"): {"in": 0.90, "main": 0.90}},
}


def is_lifelong(row: Row) -> bool:
    """Whether a row is one of `bench.lifelong`."""
    return "T" in row and "regime" in row


def figures(rows: Iterable[Row]) -> dict[str, Figure]:
    """A figure for each group of data sets that has rows, by file name."""
    found = [row for row in rows if is_lifelong(row)]
    drawn = {}
    for name, datasets in FIGURES.items():
        here = [row for row in found if row["dataset"] in datasets]
        if here:
            drawn[f"lifelong-{name}"] = draw(name, here)
    return drawn


def draw(name: str, rows: Sequence[Row]) -> Figure:
    """One figure: a panel a metric, a line a run, the goals as stars.

    Of two rows of one run's name at the same T the later counts.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = _lines(rows)
    goals = GOALS.get(name, {})
    shares = HARD_PANELS if name in _HARD else PANELS
    panels = [panel for panel in (*shares, PERPLEXITY) if any(map(panel.value, rows))]
    columns = min(_COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    legend = -(-(len(lines) + 2) // 3)
    figure = Figure((3.6 * columns, 3.0 * height + 0.7 + 0.24 * legend), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).ravel()
    counts = sorted({row["T"] for row in rows} | {t for t, _ in goals})
    for axes, panel in zip(grid, panels, strict=False):
        for (label, regime), style in zip(lines, _styles(len(lines)), strict=True):
            _line(axes, panel, lines[label, regime], _REGIMES[regime], *style)
        marked = _mark(axes, panel, goals)
        _frame(axes, panel, counts, rows, marked)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=_REGIMES[regime])
        for (_, regime), (colour, marker) in zip(lines, _styles(len(lines)), strict=True)
    ]
    labels = [f"{label} ({regime})" if regime not in label else label for label, regime in lines]
    for regime in dict.fromkeys(regime for _, regime in goals):
        handles.append(_goal_handle(regime))
        labels.append(f"goal ({regime})")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"{_TITLES[name]}\n{_where(rows)}", fontsize=11)
    return figure


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each name and regime, by T."""
    latest = {(row["name"], row["regime"], row["T"]): row for row in rows}
    found: dict[tuple[str, str], list[Row]] = {}
    for (name, regime, _), row in latest.items():
        found.setdefault((name, regime), []).append(row)
    return {key: sorted(line, key=lambda row: int(row["T"])) for key, line in found.items()}


def _styles(count: int) -> list[tuple[str, str]]:
    """Colour and marker of each line; where colours run out, other markers tell apart."""
    size = len(COLOURS)
    return [(COLOURS[i % size], MARKERS[(i + i // size) % size]) for i in range(count)]


def _line(
    axes: Axes, panel: Panel, rows: Sequence[Row], linestyle: str, colour: str, marker: str
) -> None:
    known = [(row["T"], value) for row in rows if (value := panel.value(row)) is not None]
    if known:
        at, values = zip(*known, strict=True)
        axes.plot(at, values, linestyle, color=colour, marker=marker, markersize=5, linewidth=1.4)
    if panel is PERPLEXITY:
        plain = [(row["T"], value) for row in rows if (value := _UNEDITED(row)) is not None]
        if plain:
            axes.plot(*zip(*plain, strict=True), ":", color=colour, linewidth=1.4)


def _mark(axes: Axes, panel: Panel, goals: dict[tuple[int, str], dict[str, float]]) -> list[float]:
    marked = []
    for (t, regime), values in goals.items():
        if panel.goal in values:
            marked.append(values[panel.goal])
            axes.plot(
                t,
                marked[-1],
                marker=_GOAL_MARKERS[regime],
                markersize=11,
                markerfacecolor="none",
                markeredgecolor="#444444",
                linestyle="none",
                zorder=1,
            )
    return marked


def _goal_handle(regime: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        marker=_GOAL_MARKERS[regime],
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="#444444",
        linestyle="none",
    )


def _frame(
    axes: Axes, panel: Panel, counts: Sequence[int], rows: Sequence[Row], marked: list[float]
) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xscale("log")
    axes.set_xticks(_spread(counts), [str(t) for t in _spread(counts)], fontsize=8)
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
    axes.set_xlabel("edits", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(which="major", linewidth=0.4)
    if panel is PERPLEXITY:
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        return
    values = [value for row in rows if (value := panel.value(row)) is not None] + marked
    low = min(values, default=0.0)
    # At least a tenth of the scale: smaller differences are not worth a steep line.
    axes.set_ylim(max(-0.02, min(low, 0.9) - 0.03), 1.015)


def _spread(counts: Sequence[int]) -> list[int]:
    """The counts whose labels do not run into each other on a log scale."""
    kept: list[int] = []
    for t in counts:
        if not kept or t >= 1.8 * kept[-1]:
            kept.append(t)
    return kept


def _where(rows: Sequence[Row]) -> str:
    models = ", ".join(sorted({str(row["model"]) for row in rows}))
    machines = [row["machine"] for row in rows]
    commits = ", ".join(dict.fromkeys(str(machine["commit"]) for machine in machines))
    return f"{models}, torch {machines[-1]['torch']}, commit {commits}"
