"""Figures from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import plot, rows
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
