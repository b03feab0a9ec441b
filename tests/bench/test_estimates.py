"""Routing many prompts with and without estimates: what is counted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import estimates
from bench.made_memory import Maker
from wise_ext.memory import SideMemory
from wise_ext.models import load_model


@pytest.fixture
def tiny(model_dir: Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(str(model_dir))
    return model, tokenizer


@pytest.fixture
def memory(tiny: tuple[Any, Any]) -> SideMemory:
    """Made-up shards with thresholds that some prompts pass."""
    made = Maker(*tiny, router="indicator", shard_size=3).make(3).memory
    texts = [[5, 6, 7], [8], [9, 10]]
    found = list(estimates.activations(tiny[0], made.layer, texts))
    router = made.router()
    assert router is not None
    typical = torch.cat([router.indicators(*each) for each in found]).median(0).values
    for shard, level in zip(made.shards, typical.tolist(), strict=True):
        shard.threshold = level
    return made


def test_a_run_counts_routes_and_norms(
    tiny: tuple[Any, Any],
    memory: SideMemory,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimates, "load_memory_dir", lambda _: SimpleNamespace(memory=memory))
    texts = [f"What is the name of thing number {n}?" for n in range(40)]
    monkeypatch.setattr(estimates, "asked_by", lambda *_: texts)
    out = tmp_path / "rows.jsonl"
    code, text = command("--memory", tmp_path, "--model", model_dir, "--prompts", 50, "--json", out)
    assert code == 0, text
    row = json.loads(out.read_text("utf-8"))
    assert row["prompts"] == row["same"] == 50 and row["written"] == 10
    assert 0 < row["to_side"] < 1 and 0 < row["exact_share"] <= 1
    assert row["shards"] == 3 and row["edits"] == 9


def test_a_difference_fails(tiny: tuple[Any, Any], memory: SideMemory) -> None:
    class Wrong:
        pairs, exact = 4, 1

        def decide(self, a: torch.Tensor, real: torch.Tensor) -> Any:
            return SimpleNamespace(route=torch.full((len(a),), -7))

    off = memory.router()
    row = estimates.compared(tiny[0], memory.layer, {"off": off, "on": Wrong()}, [[5, 6], [7]])
    assert row["same"] == 0 and row["exact_share"] == 0.25


def test_pads_do_not_change_what_a_prompt_is(tiny: tuple[Any, Any], memory: SideMemory) -> None:
    texts = [[5, 6, 7, 8], [9], [10, 11]]
    [(a, real)] = list(estimates.activations(tiny[0], memory.layer, texts))
    assert real.sum(1).tolist() == [1, 2, 4]  # by length
    [(alone, _)] = list(estimates.activations(tiny[0], memory.layer, texts[1:2]))
    torch.testing.assert_close(a[0, :1], alone[0])


def test_a_memory_of_another_router_is_refused(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = SimpleNamespace(memory=SimpleNamespace(routing="key"))
    monkeypatch.setattr(estimates, "load_memory_dir", lambda _: keyed)
    code, text = command("--memory", tmp_path)
    assert code == 1 and "routes by key: give one of --router indicator" in text


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(estimates.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output
