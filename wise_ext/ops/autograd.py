"""Gradients, outside the ops: a forward that needs none pays nothing for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wise_ext.ops.backends import resolve


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


class SideProduct(torch.autograd.Function):
    """`D_route[n] x[n]` for every row: differentiable in x; the packed values are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_bits: Tensor,
        values: Tensor,
        row_ptr: Tensor,
        route: Tensor,
    ) -> Tensor:
        """x [N, d_in] to fp32 (fp64 for fp64) [N, d_out]; rows on the main memory give zeros."""
        ctx.save_for_backward(mask_bits, values, row_ptr, route)
        ctx.x_dtype, ctx.d_in = x.dtype, x.shape[1]
        wide = torch.float64 if torch.float64 in (x.dtype, values.dtype) else torch.float32
        side = torch.zeros(x.shape[0], mask_bits.shape[1], dtype=wide, device=x.device)
        resolve("add_side_", side, side.shape[0])(side, x, mask_bits, values, row_ptr, route)
        return side

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient in x only."""
        mask_bits, values, row_ptr, route = ctx.saved_tensors
        op = resolve("add_side_backward", grad)
        grad_x = op(grad, mask_bits, values, row_ptr, route, ctx.d_in)
        return grad_x.to(ctx.x_dtype), None, None, None, None


class LowRankProduct(torch.autograd.Function):
    """`left_e^T right_e x[n]`, e = route[n]: differentiable in x; left and right are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
    ) -> Tensor:
        """x [N, d_in] to fp32 (fp64 for fp64) [N, d_out]; rows on the main memory give zeros."""
        ctx.save_for_backward(left, right, rank_ptr, route)
        ctx.x_dtype = x.dtype
        return _low_rank(x, left, right, rank_ptr, route)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient in x only: the transpose has left and right exchanged."""
        left, right, rank_ptr, route = ctx.saved_tensors
        grad_x = _low_rank(grad, right, left, rank_ptr, route)
        return grad_x.to(ctx.x_dtype), None, None, None, None


def _low_rank(x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (x.dtype, left.dtype) else torch.float32
    side = torch.zeros(x.shape[0], left.shape[1], dtype=wide, device=x.device)
    resolve("add_low_rank_", side)(side, x, left, right, rank_ptr, route)
    return side


class DualLinearTrain(torch.autograd.Function):
    """Side output and indicator of the shard being trained (Eq. 3), with masked gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, delta: Tensor, mask_bits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `wise_ext.ops.dual_linear_train`."""
        y, side, indicator = resolve("dual_linear_train", delta)(x, base, delta, mask_bits)
        ctx.save_for_backward(x, delta, mask_bits, side, indicator)
        return y, indicator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_indicator: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients in x, base and delta, those that are wanted."""
        x, delta, mask_bits, side, indicator = ctx.saved_tensors
        need_x, need_base, need_delta, _ = ctx.needs_input_grad
        grad_x, grad_delta = None, None
        if need_x or need_delta:
            op = resolve("dual_linear_train_backward", delta)
            grad_x, grad_delta = op(
                grad_y, grad_indicator, x, delta, mask_bits, side, indicator, need_x, need_delta
            )
        return (
            grad_x if need_x else None,
            grad_y if need_base else None,
            grad_delta if need_delta else None,
            None,
        )
