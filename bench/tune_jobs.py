"""What bench/tune.py tunes: how each op is launched and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.parameters import ADAM
from bench.registry import LIMITS, Mismatch
from wise_ext.triton_kernels import (
    dual_linear,
    dual_linear_train,
    masked_update,
    side_norm,
    sketch_norm,
)

Call = Callable[[], tuple[Tensor, ...]]
Range = tuple[int, int]
REFERENCE = torch.ops.wise_ext_reference
PRODUCT = {"BLOCK_ROWS": (16, 256), "BLOCK_OUT": (16, 256), "BLOCK_IN": (32, 256)}


@dataclass(frozen=True)
class Job:
    """One op of the tables.

    Attributes:
        launch: makes the call that is timed, and that returns its results.
        expected: the reference's results.
        limits: the smallest and the largest size of each block.
        changed: inputs that a call changes.
        by_rows: whether the table's rows are those of x.
    """

    launch: Callable[[Inputs], Call]
    expected: Callable[[Inputs], tuple[Tensor, ...]]
    limits: dict[str, Range]
    changed: tuple[str, ...] = ()
    by_rows: bool = True


def _add_side(inputs: Inputs) -> Call:
    y, x, bank, route = inputs.get("y", "x", "bank", "route")

    def call() -> tuple[Tensor, ...]:
        dual_linear.add_side(y, x, *bank, route)
        return (y,)

    return call


def _add_side_expected(inputs: Inputs) -> tuple[Tensor, ...]:
    y, x, bank, route = inputs.get("y", "x", "bank", "route")
    REFERENCE.add_side_(y, x, *bank, route)
    return (y,)


def _side_norm(inputs: Inputs) -> Call:
    x, bank, rows, shards = inputs.get("x", "bank", "rows", "shards")
    norms = torch.empty(rows.shape[0], device=x.device)

    def call() -> tuple[Tensor, ...]:
        side_norm.side_norm(x, *bank, rows, shards, norms)
        return (norms,)

    return call


def _side_norm_expected(inputs: Inputs) -> tuple[Tensor, ...]:
    x, bank, rows, shards = inputs.get("x", "bank", "rows", "shards")
    return (REFERENCE.side_norm(x, *bank, rows, shards),)


def _sketch_norm(inputs: Inputs) -> Call:
    x, sketch = inputs.get("x", "sketch")
    norms = torch.empty(x.shape[0], sketch.shape[0], device=x.device)

    def call() -> tuple[Tensor, ...]:
        sketch_norm.sketch_norm(x, sketch, norms)
        return (norms,)

    return call


def _sketch_norm_expected(inputs: Inputs) -> tuple[Tensor, ...]:
    x, sketch = inputs.get("x", "sketch")
    return (REFERENCE.sketch_norm(x, sketch),)


def _forward(inputs: Inputs) -> Call:
    x, base, delta = inputs.get("x", "base", "delta")
    y, side = torch.empty_like(base), torch.empty(base.shape, device=x.device)
    indicator = torch.empty(x.shape[0], device=x.device)

    def call() -> tuple[Tensor, ...]:
        dual_linear_train.forward(x, base, delta, y, side, indicator)
        return y, side, indicator

    return call


def _forward_expected(inputs: Inputs) -> tuple[Tensor, ...]:
    x, base, delta, mask_bits = inputs.get("x", "base", "delta", "mask_bits")
    found: tuple[Tensor, ...] = REFERENCE.dual_linear_train(x, base, delta, mask_bits[0])
    return found


def _backward_arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    x, delta, mask_bits = inputs.get("x", "delta", "mask_bits")
    _, side, indicator = _forward_expected(inputs)
    return *inputs.get("grad_y", "grad_indicator"), x, delta, mask_bits[0], side, indicator


def _backward(of_x: bool) -> Callable[[Inputs], Call]:
    def launch(inputs: Inputs) -> Call:
        arguments = _backward_arguments(inputs)
        result = torch.empty_like(inputs["x" if of_x else "delta"])
        results = (result, None) if of_x else (None, result)

        def call() -> tuple[Tensor, ...]:
            dual_linear_train.backward(*arguments, *results)
            return (result,)

        return call

    return launch


def _backward_expected(of_x: bool) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def expected(inputs: Inputs) -> tuple[Tensor, ...]:
        arguments = _backward_arguments(inputs)
        found = REFERENCE.dual_linear_train_backward(*arguments, of_x, not of_x)
        return (found[0 if of_x else 1],)

    return expected


def _update_arguments(inputs: Inputs) -> tuple[Any, ...]:
    delta, grad, mask_bits, row_ptr, m, v = inputs.get(
        "delta", "grad", "mask_bits", "shard_ptr", "m", "v"
    )
    return delta, grad, mask_bits[0], row_ptr, m, v, *ADAM, math.inf


def _masked_update(inputs: Inputs) -> Call:
    arguments = _update_arguments(inputs)

    def call() -> tuple[Tensor, ...]:
        masked_update.masked_update(*arguments)
        return arguments[0], arguments[4], arguments[5]

    return call


def _masked_update_expected(inputs: Inputs) -> tuple[Tensor, ...]:
    arguments = _update_arguments(inputs)
    REFERENCE.masked_update_(*arguments)
    return arguments[0], arguments[4], arguments[5]


JOBS: dict[str, Job] = {
    dual_linear.ADD_SIDE: Job(_add_side, _add_side_expected, PRODUCT, ("y",)),
    side_norm.SIDE_NORM: Job(_side_norm, _side_norm_expected, PRODUCT),
    sketch_norm.SKETCH_NORM: Job(_sketch_norm, _sketch_norm_expected, PRODUCT),
    dual_linear_train.FORWARD: Job(_forward, _forward_expected, PRODUCT),
    dual_linear_train.GRAD_X: Job(_backward(True), _backward_expected(True), PRODUCT),
    dual_linear_train.GRAD_DELTA: Job(_backward(False), _backward_expected(False), PRODUCT),
    masked_update.OP: Job(
        _masked_update,
        _masked_update_expected,
        {"BLOCK_ROWS": (1, 4), "BLOCK_WORDS": (8, 64)},
        ("delta", "m", "v"),
        by_rows=False,
    ),
}


def verify(op: str, key: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Raise `Mismatch` unless every row of every result is as near as the bench demands."""
    for got, want in zip(found, wanted, strict=True):
        want = want.reshape(want.shape[0], -1).float()
        error = (got.reshape(want.shape).float() - want).norm(dim=1)
        size = want.norm(dim=1)
        worst = float((error / size.clamp(min=float(size.mean()))).max())
        if not worst <= LIMITS[key]:  # NaN is no match
            raise Mismatch(f"{op}, {key}: a row is {worst:.2e} from the reference")
