"""Gradients through frozen quantised layers.

Their kernels are made for inference: of some no gradient comes back, of others none after the first
pass. Such a layer goes on to compute as it does, and its gradient is that of the matrix it stands
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as something else than one matrix of floats."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    weight = getattr(module, "weight", None)
    return type(weight) not in (nn.Parameter, Tensor)


@contextmanager
def gradients_through(model: nn.Module) -> Iterator[None]:
    """Quantised linear layers of a model, on whose inputs alone gradients are wanted, pass them on
    meanwhile."""
    layers = [Quantised(module) for module in model.modules() if is_quantised(module)]
    for layer in layers:
        layer.module.forward = layer
    try:
        yield
    finally:
        for layer in layers:
            layer.restore()


class Quantised:
    """A quantised linear layer that computes as it does, with the gradient of its matrix."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compute: Callable[..., Tensor] = module.forward
        self._replaced = vars(module).get("forward")
        self._matrix: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., d_in] to [..., d_out]; differentiable in x."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.compute(x)
        y: Tensor = _Through.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def matrix(self, like: Tensor) -> Tensor:
        """The matrix [d_out, d_in] it stands for, found by what it makes of unit vectors."""
        if self._matrix is None:
            width = int(self.module.in_features)  # type: ignore[arg-type]
            unit = torch.eye(width, dtype=like.dtype, device=like.device)
            with torch.no_grad():
                self._matrix = (self.compute(unit) - self.compute(torch.zeros_like(unit[:1]))).t()
        return self._matrix

    def restore(self) -> None:
        """Its own ``forward`` again, or the one it had been given."""
        if self._replaced is None:
            del self.module.forward
        else:
            self.module.forward = self._replaced


class _Through(torch.autograd.Function):
    """A quantised layer on inputs that a gradient is wanted for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return layer.compute(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.matrix(grad), None
