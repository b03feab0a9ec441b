"""A tiny model on disk, the command line, and memories of it that know some of the demo's facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.integrations.served import Served
from wise_ext.cli.app import app
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit, demo_edits
from wise_ext.editing.prompts import encode_prompt
from wise_ext.memory import LowRankShard, SideMemory
from wise_ext.models import fingerprint
from wise_ext.storage import ledger_entry, save_memory

FACTS = 4


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``run("export", ...)``: a command in this process, its output in plain wide text."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def facts() -> list[Edit]:
    """What the memories know, one a shard."""
    return demo_edits()[:FACTS]


@pytest.fixture
def memory(lab: Any, bare: Any, tokenizer: Any, facts: list[Edit]) -> SideMemory:
    """One masked shard a fact."""
    known = lab.key_memory(bare, [encode_prompt(tokenizer, fact.prompt) for fact in facts])
    return _renamed(known, facts)


@pytest.fixture
def low_rank(memory: SideMemory) -> SideMemory:
    """One low-rank shard a fact, of ranks 1, 2, …"""
    generator = torch.Generator().manual_seed(3)
    for place, shard in enumerate(memory.shards):
        left, right = (torch.randn(place + 1, size, generator=generator) for size in memory.shape)
        factors = LowRankShard.of(left, right, torch.bfloat16)
        factors.edit_ids = list(shard.edit_ids)
        memory.shards[place] = factors
    return memory


@pytest.fixture
def saved(bare: Any, model_dir: Path, facts: list[Edit]) -> Callable[[SideMemory, Path], Path]:
    """``saved(memory, folder)``: the memory as the editor would have saved it."""

    def save(memory: SideMemory, folder: Path) -> Path:
        ledger = [
            ledger_entry(
                {"id": f.id, "prompt": f.prompt, "target_new": f.target_new}
                | {"rephrase_prompt": f.rephrase_prompt, "locality_prompt": f.locality_prompt},
                locality_prompt=None,
                shard=memory.shard_of(f.id),
                step=0,
                iterations=1,
                losses={},
                indicator=None,
            )
            for f in facts
        ]
        base = {"name": str(model_dir), "fingerprint": fingerprint(bare)}
        save_memory(folder, memory, WiseConfig().to_dict(), ledger, base)
        return folder

    return save


def _renamed(memory: SideMemory, facts: list[Edit]) -> SideMemory:
    assert memory.key_index is not None
    for shard, fact in zip(memory.shards, facts, strict=True):
        shard.edit_ids[:] = [fact.id]
    memory.key_index.ids[:] = [fact.id for fact in facts]
    return memory


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))
