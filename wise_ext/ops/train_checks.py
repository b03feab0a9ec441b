"""What the ops of training accept, for references and fakes: `checks` has what they share.

Every failure is a `RuntimeError`, as from torch's own ops, and starts with the op's name.
"""

from __future__ import annotations

from torch import Tensor

from wise_ext.ops.checks import (
    dims,
    floating,
    full_precision,
    mask,
    pointers,
    require,
    same_device,
)


def train(op: str, x: Tensor, delta: Tensor, mask_bits: Tensor) -> None:
    """x [N, d_in], delta fp32 [d_out, d_in] and its mask."""
    floating(op, x=x)
    full_precision(op, delta=delta)
    dims(op, 2, x=x, delta=delta)
    same_device(op, x=x, delta=delta, mask_bits=mask_bits)
    require(
        x.shape[1] == delta.shape[1],
        f"{op}: x has d_in = {x.shape[1]}, delta has {delta.shape[1]}",
    )
    mask(op, mask_bits, delta.shape[0], delta.shape[1])


def activations(op: str, name: str, tensor: Tensor, rows: int, columns: int) -> None:
    """`tensor` must be floating point of shape [rows, columns]."""
    floating(op, **{name: tensor})
    require(
        tuple(tensor.shape) == (rows, columns),
        f"{op}: {name} must have shape [{rows}, {columns}], got {list(tensor.shape)}",
    )


def update(
    op: str,
    delta: Tensor,
    grad: Tensor,
    mask_bits: Tensor,
    row_ptr: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    step: int,
) -> None:
    """`masked_update_` takes float32 [d_out, d_in] tensors, both packed states or neither."""
    full_precision(op, delta=delta, grad=grad)
    dims(op, 2, delta=delta)
    require(delta.is_contiguous(), f"{op}: delta is changed in place, so it must be contiguous")
    require(
        grad.shape == delta.shape,
        f"{op}: grad has shape {list(grad.shape)}, delta has {list(delta.shape)}",
    )
    mask(op, mask_bits, delta.shape[0], delta.shape[1])
    pointers(op, row_ptr, delta.shape[0])
    same_device(op, delta=delta, grad=grad, mask_bits=mask_bits, row_ptr=row_ptr)
    require((m is None) == (v is None), f"{op}: give both m and v (Adam) or neither (SGD)")
    if m is None or v is None:
        return
    full_precision(op, m=m, v=v)
    same_device(op, delta=delta, m=m, v=v)
    dims(op, 1, m=m, v=v)
    require(m.is_contiguous() and v.is_contiguous(), f"{op}: m and v must be contiguous")
    require(
        m.shape == v.shape,
        f"{op}: m has {m.shape[0]} entries, v has {v.shape[0]}",
    )
    require(step >= 1, f"{op}: step counts from 1, got {step}")


def packed_states(op: str, row_ptr: Tensor, counts: Tensor, m: Tensor | None) -> None:
    """row_ptr must index the packed optimizer states exactly (reads the data)."""
    total = int(counts.sum()) if m is None else m.shape[0]
    require(int(row_ptr[0]) == 0, f"{op}: row_ptr must start at 0, one shard at a time")
    require(
        int(row_ptr[-1]) == total and bool((row_ptr.diff() == counts).all()),
        f"{op}: row_ptr does not match the bits set in mask_bits and the {total} values",
    )


def train_backward(
    op: str,
    grad_y: Tensor,
    grad_indicator: Tensor,
    x: Tensor,
    delta: Tensor,
    mask_bits: Tensor,
    side_output: Tensor,
    indicator: Tensor,
) -> None:
    """The forward's tensors with gradients of their shapes."""
    train(op, x, delta, mask_bits)
    rows, d_out = x.shape[0], delta.shape[0]
    activations(op, "grad_y", grad_y, rows, d_out)
    activations(op, "side", side_output, rows, d_out)
    full_precision(op, side=side_output, indicator=indicator, grad_indicator=grad_indicator)
    same_device(
        op,
        x=x,
        grad_y=grad_y,
        grad_indicator=grad_indicator,
        side=side_output,
        indicator=indicator,
    )
    for name, tensor in (("indicator", indicator), ("grad_indicator", grad_indicator)):
        require(
            tuple(tensor.shape) == (rows,),
            f"{op}: {name} must have shape [{rows}], got {list(tensor.shape)}",
        )
