"""What a patched model carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from wise_ext.errors import ModelError
from wise_ext.memory import Bank, Router, SideMemory
from wise_ext.models.routing import Routing
from wise_ext.nn import DualLinear

ATTRIBUTE = "_wise_ext_patch"


@dataclass
class Patch:
    """What was put into a model, and what it takes to get it out again."""

    memory: SideMemory
    dual: DualLinear
    routing: Routing
    handles: list[RemovableHandle]
    own_generate: Callable[..., Any] | None

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


def patch_of(model: nn.Module) -> Patch:
    """What is installed in a patched model.

    Raises:
        ModelError: nothing is.
    """
    installed = installed_patch(model)
    if installed is None:
        raise ModelError(f"this {type(model).__name__} has no side memory: patch it first")
    return installed


def installed_patch(model: nn.Module) -> Patch | None:
    """What is installed in a model, or None."""
    installed: Patch | None = vars(model).get(ATTRIBUTE)
    return installed
