"""Patching a model with a memory that was saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from wise_ext.memory import SideMemory
from wise_ext.models.loading import fingerprint
from wise_ext.models.patch import patch
from wise_ext.storage import check_base, load_memory_dir


def load_memory(model: nn.Module, directory: str | Path) -> SideMemory:
    """Patch a model with a saved memory; ``model.generate`` and all else just work.

    Raises:
        StorageError: the directory is unusable, or of another base model.
        ModelError: the model does not have the memory's layer.
    """
    stored = load_memory_dir(directory)
    name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    check_base(stored.base, fingerprint(model), name or type(model).__name__)
    patch(model, stored.memory)
    return stored.memory
