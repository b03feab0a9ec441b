"""One of the processes that share a model: `python -m tests.integrations.shared_worker FOLDER`.

Loads FOLDER/model by its tp_plan, each memory in FOLDER/memories in turn, and leaves what it saw in
FOLDER/seen-RANK.pt. RANK and WORLD_SIZE come from the environment, as torchrun sets them.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import wise_ext
from wise_ext.errors import WiseError
from wise_ext.models import fingerprint, last_route
from wise_ext.models.patch import patch_of

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@torch.no_grad()
def look(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a model makes of a batch."""
    seen = {"tokens": model.generate(**batch, **GREEDY), "logits": model(**batch).logits}
    if wise_ext.is_patched(model):
        bank = patch_of(model).dual.bank
        seen |= {"route": last_route(model), "shape": bank.shape, "nbytes": bank.nbytes}
        seen["columns"] = None if bank.columns is None else tuple(bank.columns)[1:]
    return seen


def walk(model: Any, folder: Path) -> dict[str, Any]:
    """Each memory in turn, the model bare before and after them."""
    batch = torch.load(folder / "batch.pt")
    seen: dict[str, Any] = {"fingerprint": fingerprint(model), "before": look(model, batch)}
    modules = list(model.modules())
    for memory in sorted((folder / "memories").iterdir()):
        wise_ext.load_memory(model, memory)
        seen[memory.name] = look(model, batch)
        with wise_ext.disabled(model):
            seen[f"{memory.name}, disabled"] = look(model, batch)
    wise_ext.unload(model)
    seen["after"] = look(model, batch)
    seen["same modules"] = all(a is b for a, b in zip(model.modules(), modules, strict=True))
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", timeout, world_size=size, rank=rank
    )
    plan = DistributedConfig(tp_size=size, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=plan).eval()
    seen = walk(model, folder)
    try:
        wise_ext.Editor(model, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    except WiseError as error:
        seen["editing"] = str(error)
    torch.save(seen, folder / f"seen-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
