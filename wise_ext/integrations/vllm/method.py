"""The side memory as one of vLLM's linear methods: what it calls to compute a projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from wise_ext.integrations.vllm.projection import SideProjection


class SideMethod(LinearMethodBase):  # type: ignore[misc]
    """A projection's own method, and the side memory beside it.

    The module stays what it was, so its weights keep their names and can be loaded anew.

    Args:
        base: the method there was.
        side: what to add.
    """

    def __init__(self, base: Any, side: SideProjection) -> None:
        self.base, self.side = base, side

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """See ``LinearMethodBase``."""
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See ``QuantizeMethodBase``."""
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``[N, d_in]`` to ``[N, d_out]``."""
        y: Tensor = self.base.apply(layer, x, bias)
        self.side.add_(y, x)
        return y
