"""Models that two processes share by transformers' tp_plan: the answers and routes of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from tests.integrations.shared_worker import walk
from wise_ext.errors import ModelError
from wise_ext.memory import ColumnBank, Columns, LowRankShard, PackedBank, SideMemory, column_bank
from wise_ext.models import fingerprint
from wise_ext.models.parallel import columns_of
from wise_ext.storage import save_memory

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)
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


@pytest.mark.engine("tensor parallelism (two processes, gloo)", "generate: {name}")
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


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def laid_out(mesh: Any, placement: Any) -> nn.Linear:
    from torch.distributed.tensor import distribute_tensor

    linear = nn.Linear(40, 6)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [placement]))
    return linear


def test_which_columns_a_process_holds(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    assert columns_of(nn.Linear(40, 6)) is None
    assert columns_of(laid_out(mesh, Replicate())) is None
    columns = columns_of(laid_out(mesh, Shard(1)))
    assert columns is not None and columns[1:] == (40, 0, 40)
    with pytest.raises(ModelError, match=r"is shared out as .*dim=0.*'rowwise'"):
        columns_of(laid_out(mesh, Shard(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_s_columns_are_the_bank(
    mesh: Any, dtype: torch.dtype, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_bank, "_AT_ONCE", 12)  # two products at a time
    shards = [lab.make_shard((6, 40), seed, 1.0) for seed in range(3)]
    bank = PackedBank.from_shards(shards, (6, 40), dtype)
    mine = ColumnBank(bank.part(0, 40), Columns(mesh, 40, 0, 40))
    x, y = torch.randn(5, 40).to(dtype), torch.randn(5, 6).to(dtype)
    route = torch.tensor([2, -1, 0, 1, -1], dtype=torch.int32)
    wanted, got = y.clone(), y.clone()
    bank.add_side_(wanted, x, route)
    mine.add_side_(got, x, route)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[route < 0], y[route < 0])
    rows, which = torch.tensor([0, 4, 4, 2, 1]).int(), torch.tensor([1, 0, 2, 2, 1]).int()
    wanted = bank.side_norm(x, rows, which)
    torch.testing.assert_close(mine.side_norm(x, rows, which), wanted)
    assert mine.side_norm(x, rows[:0], which[:0]).shape == (0,)
