"""The calls into wise_ext.ops; which implementation answers is set around them."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.composites import Call, Wrap
from bench.inputs import Inputs
from bench.parameters import ADAM, TIES_DENSITY
from wise_ext import ops


def add_side(inputs: Inputs, wrap: Wrap) -> Call:
    """In place on y."""
    y, x, route = inputs.get("y", "x", "route")
    mask_bits, values, row_ptr = inputs["bank"]

    def call() -> tuple[Tensor, ...]:
        ops.add_side_(y, x, mask_bits, values, row_ptr, route)
        return (y,)

    return call


def dual_linear(inputs: Inputs, wrap: Wrap) -> Call:
    """The projection with its side."""
    x, weight, route = inputs.get("x", "weight", "route")
    mask_bits, values, row_ptr = inputs["bank"]
    return lambda: (ops.dual_linear(x, weight, None, mask_bits, values, row_ptr, route),)


def side_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """All rows with all shards."""
    x, rows, shards = inputs.get("x", "rows", "shards")
    mask_bits, values, row_ptr = inputs["bank"]
    return lambda: (ops.side_norm(x, mask_bits, values, row_ptr, rows, shards),)


def linear_side_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """The projection, then all rows with all shards."""
    x, weight, rows, shards = inputs.get("x", "weight", "rows", "shards")
    mask_bits, values, row_ptr = inputs["bank"]
    return lambda: (
        torch.nn.functional.linear(x, weight),
        ops.side_norm(x, mask_bits, values, row_ptr, rows, shards),
    )


def sketch_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """All rows with all sketches."""
    x, sketch = inputs.get("x", "sketch")
    return lambda: (ops.sketch_norm(x, sketch),)


def dual_linear_train(inputs: Inputs, wrap: Wrap) -> Call:
    """Forward alone."""
    x, base, delta, mask_bits = inputs.get("x", "base", "delta", "mask_bits")
    return lambda: tuple(ops.dual_linear_train(x, base, delta, mask_bits[0]))


def masked_update(inputs: Inputs, wrap: Wrap) -> Call:
    """In place on delta and the states."""
    delta, grad, mask_bits, row_ptr = inputs.get("delta", "grad", "mask_bits", "shard_ptr")
    m, v = inputs.get("m", "v")

    def call() -> tuple[Tensor, ...]:
        ops.masked_update_(delta, grad, mask_bits[0], row_ptr, m, v, *ADAM)
        return (delta,)

    return call


def train_step(inputs: Inputs, wrap: Wrap) -> Call:
    """Forward, backward to the delta's gradient, masked Adam."""
    x, base, delta, mask_bits = inputs.get("x", "base", "delta", "mask_bits")
    grad_y, grad_indicator = inputs.get("grad_y", "grad_indicator")
    row_ptr, m, v = inputs.get("shard_ptr", "m", "v")
    delta.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y, indicator = ops.dual_linear_train(x, base, delta, mask_bits[0])
        (grad,) = torch.autograd.grad((y, indicator), (delta,), (grad_y, grad_indicator))
        ops.masked_update_(delta, grad, mask_bits[0], row_ptr, m, v, *ADAM)
        return y.detach(), indicator.detach(), delta.detach()

    return call


def pack(inputs: Inputs, wrap: Wrap) -> Call:
    """A dense delta to a shard."""
    delta, mask_bits = inputs.get("packable", "mask_bits")
    return lambda: tuple(ops.pack(delta, mask_bits[0]))


def unpack(inputs: Inputs, wrap: Wrap) -> Call:
    """A shard to a dense delta."""
    mask_bits, values, row_ptr = inputs["bank"]
    return lambda: (ops.unpack(mask_bits[0], values, row_ptr, inputs.case.d_in),)


def ties_merge(inputs: Inputs, wrap: Wrap) -> Call:
    """Equal weights."""
    deltas = inputs["deltas"]
    return lambda: (ops.ties_merge(deltas, [1.0] * len(deltas), TIES_DENSITY),)
