"""The Triton kernels as ops: check the arguments, allocate the results, launch.

What `csrc/` is to the C++ kernels. Triton itself is imported by the first call. Nothing here looks
at a tensor's values or waits for the device: what the CPU reports as an error (a route out of
range, offsets that disagree with the mask) shows as NaN in the results that depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.ops import checks, train_checks


def _launch(module: str, function: str, *arguments: Any) -> None:
    """Call a launch function with the device of its first tensor current: Triton asks for that."""
    launch = getattr(import_module(f"wise_ext.triton_kernels.{module}"), function)
    if not arguments[0].is_cuda:
        launch(*arguments)
        return
    with torch.cuda.device(arguments[0].device):
        launch(*arguments)


def _narrow(op: str, **tensors: Tensor) -> None:
    """The kernels compute in fp32; float64 is the reference's."""
    for name, tensor in tensors.items():
        checks.require(
            tensor.dtype != torch.float64,
            f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}",
        )


def add_side_(
    y: Tensor, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor
) -> None:
    """`wise_ext.ops.add_side_`."""
    op = "add_side_"
    checks.side(op, y, x, mask_bits, values, row_ptr, route)
    _narrow(op, y=y, x=x, values=values)
    bank = mask_bits.contiguous(), values.contiguous(), row_ptr.contiguous()
    _launch("dual_linear", "add_side", y, x, *bank, route.contiguous())


def add_low_rank_(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
) -> None:
    """`wise_ext.ops.add_low_rank_`."""
    op = "add_low_rank_"
    checks.low_rank(op, y, x, left, right, rank_ptr, route)
    _narrow(op, y=y, x=x, left=left)
    factors = left.contiguous(), right.contiguous(), rank_ptr.contiguous()
    _launch("low_rank", "add_low_rank", y, x, *factors, route.contiguous())


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    route: Tensor,
) -> Tensor:
    """`wise_ext.ops.dual_linear`: the base matmul stays the vendor's."""
    checks.linear("dual_linear", x, weight, bias)
    _narrow("dual_linear", x=x)
    y = F.linear(x, weight, bias)
    add_side_(y, x, mask_bits, values, row_ptr, route)
    return y


def side_norm(
    x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, rows: Tensor, shards: Tensor
) -> Tensor:
    """`wise_ext.ops.side_norm`."""
    op = "side_norm"
    checks.pairs(op, x, mask_bits, values, row_ptr, rows, shards)
    _narrow(op, x=x, values=values)
    norms = x.new_empty(rows.shape[0], dtype=torch.float32)
    bank = mask_bits.contiguous(), values.contiguous(), row_ptr.contiguous()
    _launch("side_norm", "side_norm", x, *bank, rows.contiguous(), shards.contiguous(), norms)
    return norms


def sketch_norm(x: Tensor, sketch: Tensor) -> Tensor:
    """`wise_ext.ops.sketch_norm`."""
    checks.sketch("sketch_norm", x, sketch)
    _narrow("sketch_norm", x=x, sketch=sketch)
    norms = x.new_empty(x.shape[0], sketch.shape[0], dtype=torch.float32)
    _launch("sketch_norm", "sketch_norm", x, sketch.contiguous(), norms)
    return norms


def dual_linear_train(
    x: Tensor, base: Tensor, delta: Tensor, mask_bits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`wise_ext.ops.dual_linear_train`; also returns s, which the backward needs."""
    op = "dual_linear_train"
    train_checks.train(op, x, delta, mask_bits)
    train_checks.activations(op, "base", base, x.shape[0], delta.shape[0])
    _narrow(op, x=x, base=base, delta=delta)
    shape = (x.shape[0], delta.shape[0])
    y = base.new_empty(shape)
    side = base.new_empty(shape, dtype=torch.float32)
    indicator = base.new_empty(x.shape[0], dtype=torch.float32)
    _launch(op, "forward", x, base, delta.contiguous(), y, side, indicator)
    return y, side, indicator


def dual_linear_train_backward(
    grad_y: Tensor,
    grad_indicator: Tensor,
    x: Tensor,
    delta: Tensor,
    mask_bits: Tensor,
    side: Tensor,
    indicator: Tensor,
    need_x: bool,
    need_delta: bool,
) -> tuple[Tensor, Tensor]:
    """`dual_linear_train`'s gradients in x and delta (masked); empty where not asked for."""
    op = "dual_linear_train_backward"
    train_checks.train_backward(op, grad_y, grad_indicator, x, delta, mask_bits, side, indicator)
    _narrow(op, grad_y=grad_y, x=x, delta=delta, side=side)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_delta = delta.new_empty(delta.shape if need_delta else (0,))
    _launch(
        "dual_linear_train",
        "backward",
        grad_y,
        grad_indicator.contiguous(),
        x,
        delta.contiguous(),
        mask_bits.contiguous(),
        side.contiguous(),
        indicator.contiguous(),
        grad_x if need_x else None,
        grad_delta if need_delta else None,
    )
    return grad_x, grad_delta


def masked_update_(
    delta: Tensor,
    grad: Tensor,
    mask_bits: Tensor,
    row_ptr: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    clamp: float,
) -> None:
    """`wise_ext.ops.masked_update_`."""
    op = "masked_update_"
    train_checks.update(op, delta, grad, mask_bits, row_ptr, m, v, step)
    _narrow(op, delta=delta, grad=grad)
    _launch(
        "masked_update",
        "masked_update",
        delta,
        grad.contiguous(),
        mask_bits.contiguous(),
        row_ptr.contiguous(),
        m,
        v,
        lr,
        beta1,
        beta2,
        eps,
        step,
        clamp,
    )


OPS: dict[str, Callable[..., Any]] = {
    "add_side_": add_side_,
    "add_low_rank_": add_low_rank_,
    "dual_linear": dual_linear,
    "side_norm": side_norm,
    "sketch_norm": sketch_norm,
    "dual_linear_train": dual_linear_train,
    "dual_linear_train_backward": dual_linear_train_backward,
    "masked_update_": masked_update_,
}
