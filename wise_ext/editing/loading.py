"""Patching a model with a memory that was saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from wise_ext.memory import SideMemory
from wise_ext.models.installed import DEFAULT
from wise_ext.models.loading import fingerprint
from wise_ext.models.patch import patch
from wise_ext.storage import check_base, load_memory_dir


def load_memory(model: nn.Module, directory: str | Path, name: str = DEFAULT) -> SideMemory:
    """Patch a model with a saved memory; ``model.generate`` and all else just work.

    Args:
        model: the model it was made for.
        directory: where it is.
        name: what it is called, where a model carries several: see ``patch``.

    Raises:
        StorageError: the directory is unusable, or of another base model.
        ModelError: the model does not have the memory's layer.
    """
    stored = load_memory_dir(directory)
    base = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    check_base(stored.base, fingerprint(model), base or type(model).__name__)
    patch(model, stored.memory, name=name)
    return stored.memory
