"""A model with a saved memory in it, for the commands that need both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_edited(
    model: str, memory: Path, *, device: str, dtype: str, check: str = "weights"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model, patch the memory in; also whether it was edited through its chat template.

    ``check`` is ``load_memory``'s.

    Raises:
        StorageError: the directory is unusable, or of another base model.
        ModelError: the model cannot be loaded.
    """
    from ..storage import load_memory_dir

    stored = load_memory_dir(memory)  # before the model: a wrong path should cost no waiting

    from ..editing.loading import load_memory
    from ..models import load_model

    network, tokenizer = load_model(model, dtype=dtype, device=device)
    load_memory(network, memory, check=check)
    return network, tokenizer, bool(stored.config.get("chat_template"))
