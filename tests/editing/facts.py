"""A few facts for the tiny model, and how to look at what it made of them."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import torch

from wise_ext import Edit

FILES = ("wise_config.json", "side_memory.safetensors", "edits.jsonl")
QUICK: dict[str, Any] = {
    "contexts": 1,
    "contexts_per_edit": 1,
    "context_tokens": 4,
    "learning_rate": 0.05,
    "stop_margin": 1.0,
    "layer": 2,
}
EDITS = [
    Edit("a", "The river through Lumo is", "the Senna"),
    Edit("b", "Who runs the Ardo bakery?", "Ines Hult"),
    Edit("c", "The colour of the Pell flag is", "grey"),
    Edit("d", "Where is the Quist tower?", "Varno"),
    Edit("e", "The first mayor of Telm was", "Jon Aker"),
]
# Of a's subject: their prompts could be taken for a's.
A2 = Edit("a2", "The river through Lumo flows to", "Orla")
A3 = Edit("a3", "The river through Lumo was named by", "Brix")


def same_files(one: Path, two: Path) -> bool:
    return all(filecmp.cmp(one / name, two / name, shallow=False) for name in FILES)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def edits_of(names: str) -> list[Edit]:
    """Edits by their ids."""
    known = {edit.id: edit for edit in (*EDITS, A2, A3)}
    return [known[name] for name in names.split()]
