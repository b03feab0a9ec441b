"""The command line, and a file of edits for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from wise_ext.cli.app import app
from wise_ext.editing.edits import demo_edits

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("edit", ...)``: a command in this process, its output in plain wide text."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="session")
def edits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four facts; the last one with nothing but its prompt and target."""
    path = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    lines = [
        {
            "id": edit.id,
            "subject": edit.subject,
            "prompt": edit.prompt,
            "target_new": edit.target_new,
            "rephrase_prompt": edit.rephrase_prompt,
            "locality_prompt": edit.locality_prompt,
            "locality_ground_truth": edit.locality_ground_truth,
        }
        for edit in demo_edits()[:3]
    ]
    lines.append({"id": "bare", "prompt": "The colour of Ardo is", "target_new": "grey"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def rounded(model_dir: Path, tmp_path: Path) -> Path:
    """Another form of the model: its weights rounded, and a name of its own."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "rounded"))
    weights = load_file(folder / "model.safetensors")
    rough = {name: (value * 64).round() / 64 for name, value in weights.items()}
    save_file(rough, folder / "model.safetensors", {"format": "pt"})
    return folder
