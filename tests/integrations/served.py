"""A tiny model with a memory, as an engine is given them: two directories."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import activation, key_memory, make_model, prompts
from wise_ext.memory import TokenKeys
from wise_ext.models import current_memory, fingerprint, patch, unload
from wise_ext.storage import save_memory

# What vLLM's attention on a CPU takes.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
PREFIX = prompts(70, seed=7)[0]
# Two edits that begin alike, as after one system prompt, and two others, of which one has no cue.
KNOWN = [PREFIX + tail for tail in prompts(8, 11)] + prompts(9, 40, seed=21)
UNKNOWN = [PREFIX + prompts(9, seed=3)[0], *prompts(33, 6, seed=4)]


class Served:
    """A model and its memory on disk, and what transformers' ``generate`` writes with them.

    Attributes:
        model: the directory of the model.
        memory: the directory of the memory.
        patched: the model with the memory in it.
    """

    def __init__(self, folder: Path) -> None:
        self.model, self.memory = folder / "model", folder / "memory"
        self.patched: Any = make_model("llama", max_position_embeddings=512, **SIZES)
        self.patched.save_pretrained(self.model)
        self.base = {"name": "tiny", "fingerprint": fingerprint(self.patched)}
        memory = key_memory(self.patched, KNOWN)
        index = memory.key_index
        assert index is not None
        for name in set(index.ids):
            index.remove(name)
        index.add(
            [self._tokens(row, str(memory.key_layer)) for row in KNOWN],
            list(range(len(KNOWN))),
            [f"edit-{i}" for i in range(len(KNOWN))],
        )
        index.place(list(range(len(KNOWN))), [1000, 1001, 0, 1003])
        memory.lead = 3.0
        save_memory(self.memory, memory, {}, [], self.base)
        patch(self.patched, memory)

    def written(self, rows: Iterable[list[int]], tokens: int) -> list[list[int]]:
        """What the patched model writes for each row alone."""
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "eos_token_id": []}
        return [
            self.patched.generate(torch.tensor([row]), do_sample=False, **length)[
                0, len(row) :
            ].tolist()
            for row in rows
        ]

    def unedited(self, rows: Iterable[list[int]], tokens: int) -> list[list[int]]:
        """What the model writes without the memory."""
        memory = current_memory(self.patched)
        unload(self.patched)
        written = self.written(rows, tokens)
        patch(self.patched, memory)
        return written

    def _tokens(self, row: list[int], layer: str) -> TokenKeys:
        """The keys of a prompt whose last six tokens name its subject."""
        named = torch.arange(len(row)) >= len(row) - 6
        return TokenKeys(torch.tensor(row), activation(self.patched, layer, row), named)
