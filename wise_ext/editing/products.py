"""Frozen products in bfloat16, where the machine has units for them.

Training an edit multiplies by the same frozen fp32 matrices some hundred times, forwards and
backwards, which is most of what it costs. Matrix units (AMX, tensor cores) do that several times
faster on bf16 copies. Everything between the products stays in fp32: sums, norms, attention and the
side memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


class HalfProducts:
    """bf16 copies of the matrices of some frozen linear layers.

    Args:
        modules: searched for plain fp32 ``nn.Linear`` layers; others are left as they are.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._copies: dict[nn.Linear, Tensor] = {}
        for module in (m for top in modules for m in top.modules()):
            if is_plain(module) and module.weight.dtype == torch.float32:
                self._copies[module] = module.weight.detach().to(torch.bfloat16)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._copies

    def linear(self, module: nn.Linear, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the layer gives for ``x`` [..., d_in] fp32: [..., d_out] fp32; with ``rows``
        (int64 [k]), those outputs alone. Differentiable in ``x``."""
        weight = self._copies[module]
        bias: Tensor | None = module.bias
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias

    @contextmanager
    def used(self) -> Iterator[None]:
        """The layers themselves compute this way meanwhile."""
        for module in self._copies:
            module.forward = _forward(self, module)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in self._copies:
                del module.forward


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is an ``nn.Linear`` whose weight is a matrix that lies there (a quantised one is
    none), and whose ``forward`` nobody has replaced (Accelerate does)."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return type(module.weight) is nn.Parameter and not module.weight.is_meta


def half_is_fast(device: torch.device) -> bool:
    """Whether bf16 products have units of their own here."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


def _forward(half: HalfProducts, module: nn.Linear) -> Any:
    return lambda x: half.linear(module, x)


class _Product(torch.autograd.Function):
    """x W^T with both rounded to bf16. The gradient of a frozen W is nobody's concern."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return (x.to(torch.bfloat16) @ weight.t()).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.to(torch.bfloat16) @ ctx.weight).float(), None
