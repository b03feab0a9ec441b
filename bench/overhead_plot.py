"""Figures of `bench.overhead`'s rows: cost over the bare model against the number of shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.lifelong_plot import COLOURS, MARKERS
from bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: what rows of EasyEdit's adapter have for a router
PEER = "easyedit"
_LINES = {"none": "-", "half": "--", "all": ":"}
_TITLES = {"prefill": "prefill", "decode": "decoding, a token", "layer": "the edited layer alone"}
_LAYER = ("layer", "layer and routing")


def is_overhead(row: Row) -> bool:
    """Whether a row is one of `bench.overhead`."""
    return "phase" in row and "ratio" in row


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """One figure a router, of the latest row of each case."""
    latest = {_case(row): row for row in rows if is_overhead(row)}
    routers = sorted({row["router"] for row in latest.values()})
    return {
        f"overhead-{router}": _figure(
            router, [row for row in latest.values() if row["router"] == router]
        )
        for router in routers
    }


def _case(row: Row) -> tuple[Any, ...]:
    names = ("router", "model", "phase", "tokens", "batch", "routed", "shards")
    return tuple(row[name] for name in names)


def _figure(router: str, rows: list[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    phases = [phase for phase in _TITLES if any(row["phase"] == phase for row in rows)]
    figure = Figure((5.2 * len(phases), 4.4), layout="constrained")
    counts = sorted({row["shards"] for row in rows})
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        own = [row for row in rows if row["phase"] == phase or (phase, row["phase"]) == _LAYER]
        sizes = sorted({(row["model"], row["tokens"], row["batch"], row["phase"]) for row in own})
        for number, size in enumerate(sizes):
            for routed, line in _LINES.items():
                chosen = [
                    row
                    for row in own
                    if (row["model"], row["tokens"], row["batch"], row["phase"]) == size
                    and row["routed"] == routed
                ]
                _line(axes, sorted(chosen, key=lambda row: row["shards"]), number, line)
        axes.axhline(1, color="#7F7F7F", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(_TITLES[phase], fontsize=10)
        unit = "memories" if router == PEER else "shards"
        axes.set_xlabel("shards of 100 edits" if router == "key" and phase != "layer" else unit)
        axes.set_ylabel("patched over bare")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    title = "EasyEdit's adapter" if router == PEER else f"a patched model, {router} router"
    figure.suptitle(f"Cost of {title}", fontsize=11)
    return figure


def _line(axes: Any, rows: list[Row], number: int, line: str) -> None:
    if not rows:
        return
    first = rows[0]
    axes.errorbar(
        [row["shards"] for row in rows],
        [row["ratio"] for row in rows],
        yerr=[
            [row["ratio"] - row["ratio_low"] for row in rows],
            [row["ratio_high"] - row["ratio"] for row in rows],
        ],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=line,
        linewidth=1.4,
        elinewidth=0.6,
        capsize=2,
        label=f"{_size(first)}, {first['routed']} routed",
    )


def _size(row: Row) -> str:
    tokens = f"{row['tokens']} token{'s' * (row['tokens'] > 1)}"
    if row["phase"] in _LAYER:
        tokens += ", routing" * (row["phase"] != "layer")
        return f"{row['model']}, {tokens}"
    return f"batch {row['batch']}" if row["phase"] == "decode" else tokens
