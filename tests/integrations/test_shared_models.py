"""Models that two processes share by transformers' tp_plan: the answers and routes of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.integrations.shared_worker import walk
from wise_ext.memory import LowRankShard, SideMemory
from wise_ext.models import fingerprint
from wise_ext.storage import save_memory

KINDS = ("key", "indicator", "mixed")
# 49 columns are 25 and 24; Phi-3 hands its projection all of them, and it takes its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "uneven": ("llama", {"intermediate_size": 49}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
}


def memories(model: Any, known: list[list[int]], lab: SimpleNamespace) -> dict[str, SideMemory]:
    """One for each router, and one with a low-rank shard among its others."""
    mixed = lab.key_memory(model, known)
    factors = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(7))
    left, right = factors[0, :, : mixed.shape[0]], factors[1, :, : mixed.shape[1]]
    mixed.shards[1] = LowRankShard(left.clone(), right.clone(), ["edit-2"])
    return {
        "key": lab.key_memory(model, known),
        "indicator": lab.indicator_memory(model, known),
        "mixed": mixed,
    }


def run_processes(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each of the processes saw."""
    command = [sys.executable, "-m", "tests.integrations.shared_worker", str(folder)]
    base = os.environ | {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            command,
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        logs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(logs)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(count)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_two_processes_answer_as_one(
    name: str, lab: SimpleNamespace, model_dir: Path, tmp_path: Path
) -> None:
    kind, settings = MODELS[name]
    model, known = lab.make_model(kind, **settings), lab.prompts(5, 9)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "tokenizer")
    base = {"name": "tiny", "fingerprint": fingerprint(model)}
    for router, memory in memories(model, known, lab).items():
        save_memory(tmp_path / "memories" / router, memory, {}, [], base)
    torch.save(lab.padded([*known, *lab.prompts(7, seed=3)]), tmp_path / "batch.pt")

    alone, shared = walk(model, tmp_path), run_processes(tmp_path, 2)
    width = settings.get("intermediate_size", 48)
    first = -(-width // 2)
    for rank, seen in enumerate(shared):
        assert seen["fingerprint"] == alone["fingerprint"]
        for router in KINDS:
            got, wanted = seen[router], alone[router]
            assert got["route"].tolist() == wanted["route"].tolist()
            main = got["route"] < 0
            assert main.tolist()[:2] == [False, False]
            assert main[2] or router == "indicator"  # which takes Phi-3's third prompt for one
            assert torch.equal(got["tokens"], wanted["tokens"])
            torch.testing.assert_close(got["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
            # Rows on main memory, and all rows of the bare model, are what they would be anyway.
            plain = seen["before"]
            assert torch.equal(got["logits"][main], plain["logits"][main])
            assert not torch.equal(got["tokens"][:2], plain["tokens"][:2])
            for bare in (seen[f"{router}, disabled"], seen["after"]):
                assert torch.equal(bare["logits"], plain["logits"])
            assert got["shape"] == wanted["shape"] == (32, width)
            assert got["columns"] == ((width, 0, first), (width, first, width))[rank]
            assert got["nbytes"] < wanted["nbytes"]
        assert seen["same modules"]
        assert "edit it whole, in one process" in seen["editing"]
    for router in KINDS:
        assert torch.equal(shared[0][router]["logits"], shared[1][router]["logits"])
