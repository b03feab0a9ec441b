"""Help, version and info: quick, and honest about what would run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from wise_ext import __version__, ops
from wise_ext.cli.console import metrics_table, number_of, route_name, size_name, table

LIGHT = """
import json, sys
from typer.testing import CliRunner
from wise_ext.cli.app import app
result = CliRunner().invoke(app, {args})
heavy = [m for m in ("torch", "transformers", "triton", "numpy") if m in sys.modules]
print(json.dumps([result.exit_code, heavy]))
"""


@pytest.mark.parametrize("args", [["--help"], ["edit", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = LIGHT.format(args=args)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, []]


def test_help_names_every_command_and_version_the_version(run) -> None:
    text = run("--help").stdout
    for name in ("edit", "eval", "generate", "show", "undo", "verify", "info", "demo"):
        assert f" {name} " in text
    assert run("--version").stdout == f"wise-ext {__version__}\n"


def test_every_option_is_there(run) -> None:
    text = run("edit", "--help").stdout
    names = "out limit offset preset variant batch-size layer device dtype seed resume json"
    for name in names.split():
        assert f"--{name} " in text


def test_info_names_every_op_and_its_backend(run) -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for op in ops.OPS:
        (line,) = (x for x in result.stdout.splitlines() if x.split()[:2] == [op, "cpu"])
        assert line.split()[2] == f"{ops.backend(op, 'cpu')}:"


def test_info_without_a_native_module(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from wise_ext.ops import backends

    monkeypatch.setattr(backends._state, "loaded", False)
    monkeypatch.setattr(backends._state, "failure", "ImportError: libfoo is gone")
    text = run("info").stdout
    assert "not loaded: ImportError: libfoo is gone" in text
    assert "the native module is not loaded" in text
    monkeypatch.setattr(backends._state, "choice", "native")
    result = run("info")
    assert result.exit_code == 0
    assert "set_backend('auto')" in result.stdout


def test_info_when_the_reference_is_chosen(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from wise_ext.ops import backends

    monkeypatch.setattr(backends._state, "choice", "reference")
    text = run("info").stdout
    assert text.count("the torch reference was chosen") == 2 * len(ops.OPS)


def test_values_are_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table("t", ("a", "b"), [("[red]x[/red]", None)])
    text = capsys.readouterr().out
    assert "[red]x[/red]" in text
    assert "-" in text


def test_a_long_row_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table("t", ("a",), [("x" * 300,)])
    assert "x" * 300 in capsys.readouterr().out


def test_metrics_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics_table("t", {"n": 3, "generation": {"contains": 0.5, "locality": None}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["n", "3"] in lines
    assert ["generation.contains", "0.500"] in lines
    assert ["generation.locality", "-"] in lines


def test_names_of_routes_counts_and_sizes() -> None:
    assert [number_of(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert [route_name(route) for route in (None, -1, 0, 7)] == [None, "main", "shard 0", "shard 7"]
    assert [size_name(n) for n in (10, 1536, 3 << 20, 5 << 30)] == [
        "10 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
