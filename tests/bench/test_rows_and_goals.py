"""Rows from a run of the command, and the table of goals over rows."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import goals, registry, rows, run
from bench.cases import Case
from bench.registry import Mismatch

KEYS = {
    *Case.__dataclass_fields__,
    *rows.Roofline.FIGURES,
    *("provider", "p20_us", "p50_us", "p80_us", "gbps", "tflops", "clock", "samples", "machine"),
}


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(run.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture
def light_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roofline of made-up rates: the real one copies a quarter of a gibibyte."""

    def made_up(self: rows.Roofline, device: str, dtypes: Any) -> None:
        self.copy = 1e9
        self.matmul = dict.fromkeys(dtypes, 1e10)

    monkeypatch.setattr(rows.Roofline, "__init__", made_up)


def test_the_roofline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_REPEATS", 1)
    roof = rows.Roofline("cpu", ["fp32", "bf16"])
    assert roof.copy > 1e8
    assert min(roof.matmul.values()) > 1e8
    assert roof.matmul.keys() == {"fp32", "bf16"}


def test_a_run_writes_whole_rows(tmp_path: Path, light_roofline: None) -> None:
    file = tmp_path / "rows.jsonl"
    chosen = ["--op", "mv", "--shape", "smollm2-135m", "--dtype", "fp32"]
    status, output = command(*chosen, "--seconds", 0, "--commit", "abc", "--json", file)
    assert status == 0, output
    (row,) = rows.read(file)
    assert row.keys() >= KEYS
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    # Six digits are written.
    assert row["gbps"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3, rel=1e-4)
    share = row["roofline_us"] / row["p50_us"]
    assert row["roofline_share"] == pytest.approx(share, rel=1e-4)
    bound_by_memory = row["bytes"] / 1e9 * 1e6
    assert row["roofline_us"] == pytest.approx(bound_by_memory, rel=1e-4)
    assert row["machine"]["torch"] == torch.__version__
    assert row["machine"]["commit"] == "abc"
    # A second run adds.
    command(*chosen, "--seconds", 0, "--json", file)
    assert len(rows.read(file)) == 2


def test_dispatch_has_no_roofline(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    status, output = command(
        *("--suite", "dispatch", "--op", "dual_linear", "--op", "linear"),
        *("--provider", "torch", "--provider", "reference", "--seconds", 0, "--json", file),
    )
    assert status == 0, output
    found = rows.read(file)
    assert {(row["op"], row["grad"]) for row in found} == {
        ("dual_linear", False),
        ("dual_linear", True),
        ("linear", False),
    }
    assert all(row["roofline_share"] is None for row in found)


def test_a_mismatch_is_loud_and_leaves_no_row(
    tmp_path: Path, light_roofline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry.check

    def check(case: Case, *arguments: Any) -> dict[str, float]:
        if case.dtype == "bf16":
            raise Mismatch("torch is far from the reference")
        return real(case, *arguments)

    monkeypatch.setattr(registry, "check", check)
    file = tmp_path / "rows.jsonl"
    status, output = command(
        *("--op", "mv", "--shape", "tiny", "--suite", "full", "--shape", "smollm2-135m"),
        *("--dtype", "bf16", "--dtype", "fp32", "--seconds", 0, "--json", file),
    )
    assert status == 1
    assert "was not measured: torch is far from the reference" in " ".join(output.split())
    assert [row["dtype"] for row in rows.read(file)] == ["fp32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_cuda_is_one_line() -> None:
    status, output = command("--device", "cuda")
    assert status == 1
    assert output.strip() == "error: there is no CUDA device here: measure with --device cpu"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "nonsense"], "unknown op 'nonsense'"),
        (["--provider", "nonsense"], "unknown provider 'nonsense'"),
        (["--op", "mv", "--provider", "cuda"], "no case has everything"),
        (["--suite", "dispatch", "--op", "pack"], "no case has everything"),
    ],
)
def test_wrong_words_are_one_line(arguments: list[str], complaint: str) -> None:
    status, output = command(*arguments)
    assert status == 1
    assert complaint in output


def row(op: str, provider: str, microseconds: float, device: str = "cuda", **fields: Any) -> Any:
    case = Case(op, fields.pop("shape", "llama-3-8b"), **fields)
    return {
        **case.to_json(),
        "provider": provider,
        "p50_us": microseconds,
        "copy_gbps": 4000.0,
        "extra_bytes": 4096 * 14336 * 4,
        "machine": {"device": device},
    }


def judged(*found: Any) -> dict[str, goals.Verdict]:
    return {v.goal: v for v in goals.judge(found) if v.measured is not None}


def test_decode_is_judged_by_the_faster_of_ours() -> None:
    routed = {"rows": 8, "dtype": "bf16", "variant": "all"}
    verdicts = judged(
        row("linear", "torch", 27.0, rows=8, dtype="bf16"),
        row("dual_linear", "cuda", 30.0, **routed),
        row("dual_linear", "triton", 40.0, **routed),
        row("dual_linear", "torch", 10.0, **routed),
    )
    (verdict,) = verdicts.values()
    assert verdict.measured == pytest.approx(30 / 27)
    assert verdict.provider == "cuda"
    assert verdict.met


def test_many_shards_are_no_decode_goal() -> None:
    routed = {"rows": 8, "shards": 24, "dtype": "bf16", "variant": "all"}
    linear = row("linear", "torch", 27.0, rows=8, dtype="bf16")
    assert not judged(linear, row("dual_linear", "cuda", 300.0, **routed))


def test_unrouted_rows_have_tighter_goals() -> None:
    def ratio(rows: int, ours: float) -> goals.Verdict:
        found = judged(
            row("linear", "torch", 100.0, rows=rows, dtype="bf16"),
            row("dual_linear", "cuda", ours, rows=rows, dtype="bf16", variant="none"),
        )
        return next(iter(found.values()))

    assert ratio(1, 102.0).met
    assert not ratio(1, 103.0).met
    assert ratio(2048, 104.0).met
    assert not ratio(2048, 106.0).met


def test_training_is_judged_by_the_best_composite() -> None:
    (verdict,) = judged(
        row("train_step", "triton", 100.0, rows=128),
        row("train_step", "torch", 400.0, rows=128),
        row("train_step", "torch-dense", 140.0, rows=128),
    ).values()
    assert verdict.measured == pytest.approx(1.4)
    assert not verdict.met
    assert verdict.provider == "triton against torch-dense"


def test_ties_bandwidth_counts_every_pass() -> None:
    moved = 21 * 4096 * 14336 * 4
    at_copy_speed = moved / 4000e9 * 1e6
    (verdict,) = judged(row("ties_merge", "cuda", at_copy_speed / 0.9, shards=5)).values()
    assert verdict.measured == pytest.approx(0.9)
    assert verdict.met


def test_the_cpu_is_judged_against_the_better_dense_product() -> None:
    verdicts = judged(
        row("linear", "torch", 16000.0, "cpu", dtype="bf16"),
        row("mv", "torch", 9000.0, "cpu", dtype="bf16"),
        row("add_side_", "cpp", 3300.0, "cpu", dtype="bf16", variant="all"),
        row("ties_merge", "cpp", 7e5, "cpu", shards=5),
        row("ties_merge", "torch", 31e6, "cpu", shards=5),
    )
    figures = [verdict.measured for verdict in verdicts.values()]
    assert figures == pytest.approx([3300 / 9000, 31e6 / 7e5, 1.0])
    assert [verdict.met for verdict in verdicts.values()] == [False, True, True]


def test_goals_without_rows_are_said_to_be_unmeasured(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, [row("linear", "torch", 27.0)])
    app = typer.Typer()
    app.command()(goals.main)
    result = CliRunner().invoke(app, [str(file)])
    assert result.exit_code == 0
    assert result.output.count("not measured") == 5


def test_the_last_row_of_a_case_counts() -> None:
    found = judged(
        row("linear", "torch", 100.0, dtype="bf16"),
        row("dual_linear", "cuda", 200.0, dtype="bf16", variant="none"),
        row("dual_linear", "cuda", 101.0, dtype="bf16", variant="none"),
    )
    assert next(iter(found.values())).measured == pytest.approx(1.01)


def test_rows_name_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True)

    assert rows.commit_of(tmp_path) == "unknown"
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for file in (results / "rows.jsonl", tmp_path / "code.py"):
        file.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = rows.commit_of(tmp_path)
    assert len(commit) == 12
    (results / "rows.jsonl").write_text("1\n2\n", encoding="utf-8")
    assert rows.commit_of(tmp_path) == commit
    (tmp_path / "code.py").write_text("2\n", encoding="utf-8")
    assert rows.commit_of(tmp_path) == f"{commit}+changes"
