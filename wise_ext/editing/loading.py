"""Patching a model with a memory that was saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from wise_ext.errors import ConfigError, StorageError
from wise_ext.memory import SideMemory
from wise_ext.models.installed import DEFAULT
from wise_ext.models.loading import fingerprint
from wise_ext.models.patch import patch
from wise_ext.storage import check_base, load_memory_dir

CHECKS = ("weights", "name", "shape")


def load_memory(
    model: nn.Module, directory: str | Path, name: str = DEFAULT, check: str = "weights"
) -> SideMemory:
    """Patch a model with a saved memory; ``model.generate`` and all else just work.

    Args:
        model: the memory's base model, or another form of it.
        directory: the saved memory.
        name: what it is called, where a model carries several: see ``patch``.
        check: what the model has to share with the memory's base: its ``"weights"``; its ``"name"``
            alone, for the same checkpoint quantised, whose weights are no longer the same; or the
            ``"shape"`` of the edited projection, where it goes by another name as well.

    Raises:
        ConfigError: no such check.
        StorageError: the directory is unusable, or of another base model.
        ModelError: the model does not have the memory's layer.
    """
    if check not in CHECKS:
        raise ConfigError(f"unknown check {check!r}: choose one of {CHECKS}")
    stored = load_memory_dir(directory)
    base = str(getattr(getattr(model, "config", None), "name_or_path", "")) or type(model).__name__
    if check == "weights":
        try:
            check_base(stored.base, fingerprint(model), base)
        except StorageError as error:
            raise StorageError(
                f"{error} (if this is another form of it, as quantised: check='name', --check name)"
            ) from None
    elif check == "name" and stored.base.get("name") != base:
        raise StorageError(
            f"the memory was made for {stored.base.get('name')!r}, this model is {base!r}: if that "
            "is another form of it: check='shape', --check shape"
        )
    patch(model, stored.memory, name=name)
    return stored.memory
