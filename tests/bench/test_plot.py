"""Figures from rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("matplotlib")

from bench import lifelong_plot, plot, rows
from bench.cases import Case
from bench.work import WORK

MACHINE = {
    "device": "cpu",
    "processor": "a processor",
    "threads": 1,
    "torch": "2.13.0",
    "commit": "0123456789ab",
}


def row(case: Case, provider: str, microseconds: float, roofline: bool = True) -> dict[str, Any]:
    work = WORK[case.op](case)
    seconds = microseconds * 1e-6
    return {
        **case.to_json(),
        "provider": provider,
        "p20_us": 0.9 * microseconds,
        "p50_us": microseconds,
        "p80_us": 1.2 * microseconds,
        "bytes": work.bytes,
        "flops": work.flops,
        "tflops": work.flops / seconds / 1e12,
        "copy_gbps": 10.0 if roofline else None,
        "matmul_tflops": 0.1 if roofline else None,
        "machine": MACHINE,
    }


def test_every_op_and_dtype_gets_its_figure(tmp_path: Path) -> None:
    cases = [Case("add_side_", "smollm2-135m", n, variant="all") for n in (1, 8, 128)]
    found = [row(case, "torch", 300.0 * case.rows) for case in cases]
    found += [row(case, "cpp", 150.0 * case.rows) for case in cases]
    tiny = Case("linear", "tiny", 2)
    found += [row(tiny, "torch", 6.0, roofline=False)]
    file = tmp_path / "rows.jsonl"
    rows.append(file, found)
    written = plot.draw(rows.read(file), tmp_path / "figures")
    # The linear is compared with nothing, and tiny tensors have no roofline.
    assert [path.name for path in written] == ["ratio-add_side-cpu.png", "roofline-fp32-cpu.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_ratios_are_times_of_the_composite_over_ours() -> None:
    case = Case("pack", "smollm2-135m")
    figure = plot.ratios("pack", [row(case, "torch", 300.0), row(case, "cpp", 100.0)])
    assert figure is not None
    (bars,) = figure.axes[0].containers
    assert bars.lines[0].get_xdata() == pytest.approx([3.0])


def test_many_cases_go_into_columns() -> None:
    cases = [
        Case("dual_linear", shape, n, k, dtype, "all")
        for shape in ("smollm2-135m", "llama-3-8b")
        for n in (1, 8, 128)
        for k in (1, 6, 24)
        for dtype in ("fp32", "bf16", "fp16")
    ]
    found = [row(case, name, 100.0) for case in cases for name in ("torch", "cuda")]
    figure = plot.ratios("dual_linear", found)
    assert figure is not None
    assert [len(axes.get_yticks()) for axes in figure.axes] == [27, 27]


def lifelong_row(t: int, name: str, regime: str, dataset: str, **more: Any) -> dict[str, Any]:
    worse = 0.02 * math.log10(t) + (0.03 if regime == "stream" else 0.0)
    return {
        "T": t,
        "name": name,
        "regime": regime,
        "dataset": dataset,
        "model": "smollm2",
        "rel": 1 - worse / 4,
        "gen": 0.96 - worse,
        "loc": 0.99,
        "generation": {"reliability": 1 - worse / 2, "generalization": 0.9 - 2 * worse},
        "routing": {
            "right_shard": 1 - worse / 8,
            "right_shard_rephrase": 0.98 - worse,
            "rephrase_to_side": 0.97 - worse,
            "locality_to_main": 0.995 - worse / 3,
        },
        "unedited": None,
        "target_perplexity": None,
        "machine": MACHINE,
        **more,
    }


def lifelong_rows() -> list[dict[str, Any]]:
    counts = (10, 100, 300, 1000, 1301)
    found = [
        lifelong_row(t, f"zsre-{regime}", regime, "zsre")
        for regime in ("batch", "stream")
        for t in counts
    ]
    found += [
        lifelong_row(t, "zsre+counterfact-batch", "batch", "zsre+counterfact")
        for t in (*counts[:4], 3000)
    ]
    found += [lifelong_row(t, "hard", "batch", "counterfact") for t in (100, 300)]
    plain = {"target_perplexity": {"median": 30.0}}
    found += [
        lifelong_row(
            t,
            "temporal-batch",
            "batch",
            "temporal",
            gen=None,
            generation={},
            unedited=plain,
            target_perplexity={"median": 1.5 + t / 100},
        )
        for t in (10, 79)
    ]
    return found


def test_a_lifelong_run_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "lifelong.jsonl"
    rows.append(file, lifelong_rows())
    written = plot.draw(rows.read(file), tmp_path / "figures", svg=True)
    assert [path.name for path in written] == [
        f"lifelong-{name}.{suffix}"
        for name in ("zsre", "counterfact", "temporal")
        for suffix in ("png", "svg")
    ]
    for path in written:
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_lines_and_goals_are_where_the_rows_say() -> None:
    found = [row for row in lifelong_rows() if row["dataset"].startswith("zsre")]
    again = lifelong_row(100, "zsre-batch", "batch", "zsre", rel=0.5)
    figure = lifelong_plot.draw("zsre", [*found, again])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert len(panels) == 8
    rel = panels["Rel: target tokens, edit"]
    first, second, third, *goals = rel.get_lines()
    assert list(first.get_xdata()) == [10, 100, 300, 1000, 1301]
    assert first.get_ydata()[1] == 0.5  # the later row of one T counts
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert len({line.get_color() for line in (first, second, third)}) == 3
    assert [(*line.get_xdata(), *line.get_ydata()) for line in goals] == [
        (100, 1.0),
        (1000, 0.98),
        (1000, 0.99),
        (3000, 0.97),
    ]
    assert rel.get_xscale() == "log" and rel.get_ylim()[0] < 0.5


def test_panels_without_figures_are_left_out() -> None:
    found = [row for row in lifelong_rows() if row["dataset"] == "temporal"]
    figure = lifelong_plot.draw("temporal", found)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert not any("Gen" in title or "generated" in title for title in titles)
    edited, plain = figure.axes[titles.index(lifelong_plot.PERPLEXITY.title)].get_lines()
    assert list(edited.get_ydata()) == [1.6, 2.29] and list(plain.get_ydata()) == [30.0, 30.0]


def test_names_choose_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lifelong.jsonl"
    rows.append(file, lifelong_rows())
    seen: list[set[str]] = []
    monkeypatch.setattr(plot, "draw", lambda rows, *_: seen.append({r["name"] for r in rows}) or [])
    plot.main([file], tmp_path, ["zsre-*", "hard"])
    assert seen == [{"zsre-batch", "zsre-stream", "hard"}]
    with pytest.raises(typer.Exit):
        plot.main([file], tmp_path, ["nothing"])


def test_nothing_to_draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "RECORDED", (tmp_path / "none.jsonl",))
    with pytest.raises(typer.Exit):
        plot.main(None, tmp_path)
