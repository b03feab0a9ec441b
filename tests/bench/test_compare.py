"""Ratios of two revisions: the arithmetic, the worker, and where its package comes from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare
from bench.cases import Case
from bench.compare_worker import Tree
from bench.rows import ROOT

CASE = Case("unpack", "tiny")


def test_a_ratio_is_taken_round_by_round() -> None:
    # Both sides slow down together in the second round: the ratio does not move.
    found = compare.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert found.verdict == "faster"


def test_a_spread_around_one_is_no_verdict() -> None:
    found = compare.ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert found.median == 1.0
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(1.3)
    assert not found.verdict
    assert compare.ratio([1.0, 1.0], [2.0, 2.0]).verdict == "slower"


def test_two_sides_of_the_same_tree_are_compared() -> None:
    with compare.Worker(ROOT, "cpu", 1) as base, compare.Worker(ROOT, "cpu", 1) as here:
        row = compare.compare(base, here, CASE, "reference", rounds=3)
        absent = compare.compare(base, here, CASE, "triton", rounds=3)
    assert row["low"] <= row["ratio"] <= row["high"]
    assert row["base_us"] > 0
    assert absent["absent"].startswith("base: ")


def test_a_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with (
        compare.Worker(ROOT, "cpu", 1) as worker,
        pytest.raises(RuntimeError, match="a worker ended with status 1"),
    ):
        worker.ask(sample=True)


def test_the_package_comes_from_the_tree(tmp_path: Path) -> None:
    package = tmp_path / "wise_ext"
    package.mkdir()
    (package / "__init__.py").write_text("WHERE = 'the other tree'\n")
    (package / "part.py").write_text("from wise_ext import WHERE\n")
    program = (
        "import sys, pathlib; from bench.compare_worker import Tree;"
        f"sys.meta_path.insert(0, Tree(pathlib.Path({str(tmp_path)!r})));"
        "from wise_ext.part import WHERE; print(WHERE)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "the other tree"
    assert Tree(tmp_path).find_spec("wise_ext.triton_kernels") is None


def test_an_unknown_revision_is_one_line() -> None:
    with (
        pytest.raises(RuntimeError, match="cannot check out no-such-revision"),
        compare.worktree("no-such-revision", "cpu"),
    ):
        pass
