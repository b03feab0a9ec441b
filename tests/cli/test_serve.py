"""wise-ext serve: what is asked of it before a model is loaded, and what it hands on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from wise_ext.cli.app import app
from wise_ext.models import fingerprint, memories
from wise_ext.storage import save_memory

serving = pytest.importorskip("wise_ext.integrations.serving", reason="needs the extra 'serve'")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server was started with, instead of being started."""
    seen: list[Any] = []
    monkeypatch.setattr(serving, "run_server", lambda *args, **more: seen.append((args, more)))
    return seen


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.fixture
def folders(lab: SimpleNamespace, model_dir: Path, tmp_path: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    base = {"name": "tiny", "fingerprint": fingerprint(model)}
    memory = lab.key_memory(model, lab.prompts(5, 9))
    for name in ("one", "two"):
        save_memory(tmp_path / name, memory, {}, [], base)
    return [tmp_path / "one", tmp_path / "two"]


def test_memories_by_name(started: list[Any], model_dir: Path, folders: list[Path]) -> None:
    first, second = folders
    result = run(str(model_dir), "--memory", str(first), "--memory", f"b={second}", "--name", "m")
    assert result.exit_code == 0, result.output
    ((model, _, name), options) = started[0]
    assert name == "m" and list(memories(model)) == ["one", "b"]
    assert options["continuous_batching"] and not options["manage"]


def test_what_is_checked(started: list[Any], rounded: Path, folders: list[Path]) -> None:
    arguments = (str(rounded), "--memory", str(folders[0]))
    for check in ("weights", "name"):
        assert run(*arguments, "--check", check).exit_code == 2 and not started
    result = run(*arguments, "--check", "shape")
    assert result.exit_code == 0, result.output
    ((model, _, _), _) = started[0]
    assert list(memories(model)) == ["one"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "--memory", "a=x", "--memory", "a=y"], "two memories of one name"),
        (["m", "--memory", "unedited=x"], "cannot be called 'unedited'"),
        (["m", "--name", "a:b"], "cannot be called 'a:b'"),
        (["m", "--memory", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_refused_before_a_model_is_loaded(
    arguments: list[str], said: str, started: list[Any]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.output.replace("\n", "")
    assert not started


def test_what_is_kept_on_a_cpu_and_on_a_card() -> None:
    cpu = SimpleNamespace(device=torch.device("cpu"))
    card = SimpleNamespace(device=torch.device("cuda"))
    config = serving.batching_of(cpu)
    assert config.num_blocks * config.page_size == 16_384 and config.max_batch_tokens == 512
    config = serving.batching_of(cpu, 1000, 64)
    assert config.num_blocks * config.page_size == 1024 and config.max_batch_tokens == 64
    config = serving.batching_of(card)
    assert config.num_blocks is None and config.max_batch_tokens is None
    config = serving.batching_of(card, 1000)
    assert config.num_blocks == 4 and config.page_size == 256
