"""``wise-ext stats``: the file it writes, what it says, how it is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import wise_ext.editing.progress
from wise_ext.editing import statistics
from wise_ext.editing.statistics import KeyStatistics
from wise_ext.models import fingerprint, load_model

LAYERS = [f"model.layers.{n}.mlp.down_proj" for n in range(4)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"The river number {n} runs through Tarn." for n in range(90)))
    return path


def row_of(output: str, layer: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.strip().startswith(layer))
    return line.split()


def test_stats(run, tmp_path: Path, model_dir: Path) -> None:
    out = tmp_path / "keys.safetensors"
    args = ("stats", model_dir, "--out", out, "--tokens", 900)
    result = run(*args, "--layer", "0,2", "--layer", LAYERS[1])
    assert result.exit_code == 0, result.output
    assert "900 tokens of " in result.stdout and "(wise-ext), 3 layers, 1.5 MiB" in result.stdout
    assert result.stderr == ""
    model, _ = load_model(model_dir)
    found = KeyStatistics.load(out, fingerprint(model), LAYERS[:3])
    assert (found.tokens, list(found.moments)) == (900, LAYERS[:3])
    for layer in LAYERS[:3]:
        values = torch.linalg.eigvalsh(found.moments[layer].double())
        _, width, condition, rank = row_of(result.stdout, layer)
        assert width == "512"
        assert float(condition) == pytest.approx(float(values[-1] / values[0]), rel=0.05)
        shares = values / values.sum()
        assert float(rank) == pytest.approx(float((-shares * shares.log()).sum().exp()), abs=0.06)
    # Once more, over the file that is there; too few tokens for 512 directions.
    result = run(*args, "--tokens", 300)
    assert result.exit_code == 0, result.output
    assert list(KeyStatistics.load(out).moments) == [LAYERS[2]], "auto"
    assert row_of(result.stdout, LAYERS[2])[2] == "singular"


def test_a_corpus_that_is_too_small(run, tmp_path: Path, model_dir: Path, texts: Path) -> None:
    out = tmp_path / "keys.safetensors"
    result = run("stats", model_dir, "--corpus", texts, "--layer", 0, "--out", out)
    assert result.exit_code == 0, result.output
    found = KeyStatistics.load(out)
    assert found.corpus["name"] == "texts.txt" and found.corpus["texts"] == 90
    assert f"no more than {found.tokens} of the 100000 tokens asked for" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--corpus", "no-such.txt"), "no-such.txt: no such file or folder: check the path"),
        (("--layer", "9"), "layer 9 does not exist"),
        (("--layer", "0,,1"), "--layer 0,,1: a layer is missing between the commas"),
        (("--resume",), "keys.safetensors.part: start without --resume"),
        (("--out", "none/x"), "there is no folder none: create it first"),
    ],
)
def test_refusals(
    run, tmp_path: Path, model_dir: Path, more: tuple[str, ...], message: str
) -> None:
    result = run("stats", model_dir, "--out", tmp_path / "keys.safetensors", *more)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_interrupted_and_resumed(
    run, tmp_path: Path, model_dir: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    monkeypatch.setattr(statistics, "_CHECKPOINT", 200)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = ("stats", model_dir, "--corpus", texts, "--tokens", 800, "--out")
    assert run(*args, whole).exit_code == 0

    def stopping_at(tokens: int) -> Any:
        @contextmanager
        def bar(*args: Any) -> Iterator[Any]:
            def move(done: int, total: int) -> None:
                if done >= tokens:
                    raise KeyboardInterrupt

            yield move

        return bar

    for tokens, kept in ((20, False), (500, True)):
        with monkeypatch.context() as patch:
            patch.setattr(wise_ext.editing.progress, "progress_bar", stopping_at(tokens))
            result = run(*args, broken)
        assert result.exit_code == 130
        (line,) = result.stderr.splitlines()
        says = f"is kept in {broken}.part: run the same command with --resume to go on"
        assert (says if kept else "interrupted; nothing was kept yet") in line
        assert (tmp_path / "broken.part").exists() == kept and not broken.exists()

    result = run(*args, broken)
    assert result.exit_code == 2 and "go on with --resume, or remove it" in result.stderr
    result = run(*args, broken, "--resume")
    assert result.exit_code == 0, result.output
    assert broken.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "broken.part").exists()
