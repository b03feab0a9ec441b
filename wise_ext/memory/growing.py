"""Tensors that a memory's growth replaces, held so that compiled code does not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class Growing(nn.Module):
    """A module that holds tensors whose first dimension changes as edits are added.

    They move with the module and are not saved with it, like buffers that do not persist. But
    ``torch.compile`` builds the shapes of buffers into its graphs; of these it leaves the first
    dimension open (but where it is 0 or 1), so that a grown memory runs a smaller one's graph.
    """

    #: held tensors that keep their shapes
    fixed: frozenset[str] = frozenset()
    _names: tuple[str, ...] = ()

    def hold(self, **tensors: Tensor) -> None:
        """Hold these tensors, each as an attribute of its name, in place of any before."""
        # Imported here: a model brings it along, and nothing else needs it.
        from torch._dynamo import maybe_mark_dynamic

        self._names = (*dict.fromkeys((*self._names, *tensors)),)
        for name, tensor in tensors.items():
            if name not in self.fixed:
                maybe_mark_dynamic(tensor, 0)
            setattr(self, name, tensor)

    def held(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {name: getattr(self, name) for name in self._names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.hold(**{name: fn(tensor) for name, tensor in self.held().items()})
        return self

    def become(self, other: Any) -> None:
        """Hold what another one of the same kind holds.

        Args:
            other: of the same class, with tensors of the same names.
        """
        self.hold(**other.held())
