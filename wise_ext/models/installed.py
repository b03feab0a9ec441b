"""What a patched model carries: its memories by name, and what they replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from wise_ext.errors import ModelError
from wise_ext.memory import Bank, Router, SideMemory
from wise_ext.models.routing import Routing
from wise_ext.nn import DualLinear

ATTRIBUTE = "_wise_ext_patch"
#: The name of a memory that is not given one.
DEFAULT = "default"


@dataclass
class Patch:
    """What one memory put into a model, and what it takes to get it out again."""

    memory: SideMemory
    dual: DualLinear
    routing: Routing
    handles: list[RemovableHandle]

    def renew(self, memory: SideMemory, bank: Bank, router: Router) -> None:
        """Take another memory of the same layers and kind of router, its tensors in place of the
        ones there are; all else is as after a fresh patch.

        Args:
            memory: the new one.
            bank: of its shards.
            router: of its keys or thresholds.
        """
        self.dual.bank.become(bank)
        self.routing.renew(router)
        self.memory = memory


@dataclass
class Installed:
    """All memories of one model, in the order they came.

    Attributes:
        patches: by name; rows that name no memory use the first.
        own: what the instance itself had in the place of the methods that were wrapped.
    """

    patches: dict[str, Patch] = field(default_factory=dict)
    own: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, name: str, patch: Patch) -> None:
        """Take another memory, behind those there are."""
        self.patches[name] = patch
        self._admit()

    def remove(self, name: str) -> None:
        """Forget a memory; the first of the others is now used by rows that name none."""
        del self.patches[name]
        self._admit()

    def arrange(self, names: Sequence[str]) -> None:
        """Bring the memories into this order."""
        self.patches = {name: self.patches[name] for name in names}
        self._admit()

    def named(self, name: str) -> Patch:
        """A memory's patch.

        Raises:
            ModelError: there is none of that name.
        """
        if name not in self.patches:
            there = ", ".join(map(repr, self.patches))
            raise ModelError(f"no memory {name!r} is loaded: there is {there}")
        return self.patches[name]

    def _admit(self) -> None:
        for place, patch in enumerate(self.patches.values()):
            patch.routing.state.admitted = place == 0


def installed_in(model: nn.Module) -> Installed | None:
    """All memories of a model, or None."""
    installed: Installed | None = vars(model).get(ATTRIBUTE)
    return installed


def memories_of(model: nn.Module) -> Installed:
    """All memories of a patched model.

    Raises:
        ModelError: it has none.
    """
    installed = installed_in(model)
    if installed is None:
        raise ModelError(f"this {type(model).__name__} has no side memory: patch it first")
    return installed


def patch_of(model: nn.Module, name: str | None = None) -> Patch:
    """One memory's patch; by default the first one's.

    Raises:
        ModelError: the model has none, or none of that name.
    """
    installed = memories_of(model)
    return installed.named(next(iter(installed.patches)) if name is None else name)
