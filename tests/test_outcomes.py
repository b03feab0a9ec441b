"""The table of engines: outcomes become words, and a page keeps all but its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.outcomes import BEGIN, END, summed_up, with_table


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["works", "works"], "works"),
        (["works", "skipped"], "works"),
        (["not possible"], "not possible"),
        (["works", "failed", "skipped"], "failed"),
        (["skipped", "skipped"], "not run here"),
    ],
)
def test_outcomes_of_one_feature(words: list[str], expected: str) -> None:
    entry = summed_up([(word, "no card" if word == "skipped" else "") for word in words])
    assert entry["outcome"] == expected
    assert entry.get("reason") == ("no card" if expected == "not run here" else None)
    assert entry.get("tests", 0) == words.count(expected)


def test_a_page_keeps_all_but_its_table() -> None:
    record: dict[str, Any] = {
        "b": {"x": {"outcome": "works", "tests": 2}},
        "A": {"y": {"outcome": "not run here", "reason": "no card"}},
    }
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", record)
    assert page.startswith(f"before\n{BEGIN}\n| engine") and page.endswith(f"{END}\nafter\n")
    assert "old" not in page
    assert page.index("| A | y | not run here: no card |") < page.index(
        "| b | x | works (2 tests) |"
    )


_TESTS = """
import pytest

@pytest.mark.engine("one", "size {size}")
@pytest.mark.parametrize("size", [1, 2])
def test_runs(size):
    assert size == 1

@pytest.mark.engine("two", "a", "b", possible=False)
def test_refused():
    pass

@pytest.mark.engine("two", "c")
def test_skipped():
    pytest.skip("needs a card")

@pytest.mark.engine("two", "d")
@pytest.mark.skipif(True, reason="needs a friend")
def test_not_set_up():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two"])
def test_a_run_is_recorded(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = engine(name): what is shown\n")
    file = tmp_path / "engines.json"
    file.write_text(json.dumps({"two": {"c": {"outcome": "works", "tests": 1}}}))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.outcomes",
        "-p",
        "no:cacheprovider",
    ]
    root = Path(__file__).parents[1]
    env = {"PYTHONPATH": str(root), "PATH": "", "WISE_ENGINES_PAGE": str(tmp_path / "page.md")}
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    run = subprocess.run(
        [*command, *workers, "--engines", str(file), str(tmp_path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    record = json.loads(file.read_text())
    words = {(e, f): entry["outcome"] for e, some in record.items() for f, entry in some.items()}
    assert words == {
        ("one", "size 1"): "works",
        ("one", "size 2"): "failed",
        ("two", "a"): "not possible",
        ("two", "b"): "not possible",
        ("two", "c"): "works",  # found elsewhere, and not contradicted
        ("two", "d"): "not run here",
    }
    assert record["two"]["d"]["reason"] == "needs a friend"
    assert "| one | size 2 | failed |" in (tmp_path / "page.md").read_text()
