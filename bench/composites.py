"""What a user would write in plain torch, without this package: the thing to beat.

A builder makes what such a user would have at hand (dense deltas, a bool mask, an optimizer) and
returns the call to time. `wrap` is the identity, or torch.compile. Nothing here waits for a GPU
unless its docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import SKETCH_ROWS
from bench.inputs import Inputs
from bench.parameters import ADAM, TIES_DENSITY

Call = Callable[[], tuple[Tensor, ...]]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Build = Callable[[Inputs, Wrap], Call]


def linear(inputs: Inputs, wrap: Wrap) -> Call:
    """The projection alone."""
    x, weight = inputs.get("x", "weight")
    run = wrap(F.linear)
    return lambda: (run(x, weight),)


def mv(inputs: Inputs, wrap: Wrap) -> Call:
    """The projection of one row, as a matrix-vector product."""
    vector, weight = inputs.get("vector", "weight")
    run = wrap(torch.mv)
    return lambda: (run(weight, vector),)


def _routed(y: Tensor, x: Tensor, route: Tensor, dense: list[Tensor]) -> Tensor:
    # Picking rows by a bool index would wait for the device: every shard sees every row.
    for shard, delta in enumerate(dense):
        y = torch.where((route == shard).unsqueeze(1), y + F.linear(x, delta), y)
    return y


def add_side(inputs: Inputs, wrap: Wrap) -> Call:
    """A dense side matmul a shard, taken where the route says."""
    y, x, route, dense = inputs.get("y", "x", "route", "dense")
    run = wrap(lambda y, x, route: y.copy_(_routed(y, x, route, dense)))
    return lambda: (run(y, x, route),)


def dual_linear(inputs: Inputs, wrap: Wrap) -> Call:
    """The projection, and a dense side matmul a shard, taken where the route says."""
    x, weight, route, dense = inputs.get("x", "weight", "route", "dense")
    run = wrap(lambda x, route: _routed(F.linear(x, weight), x, route, dense))
    return lambda: (run(x, route),)


def _norms(x: Tensor, dense: list[Tensor]) -> Tensor:
    norms = [F.linear(x, delta).norm(dim=1, dtype=torch.float32) for delta in dense]
    return torch.stack(norms, dim=1).flatten()


def side_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """A dense side matmul and a norm a shard."""
    x, dense = inputs.get("x", "dense")
    run = wrap(lambda x: _norms(x, dense))
    return lambda: (run(x),)


def linear_side_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """Two linears plus norm: the projection, and every shard's indicator."""
    x, weight, dense = inputs.get("x", "weight", "dense")
    run = wrap(lambda x: (F.linear(x, weight), _norms(x, dense)))
    return lambda: tuple(run(x))


def sketch_norm(inputs: Inputs, wrap: Wrap) -> Call:
    """One matmul with all sketches, norms over each one's rows."""
    x, sketch = inputs.get("x", "sketch")

    def norms(x: Tensor) -> Tensor:
        products = F.linear(x, sketch.flatten(0, 1))
        by_shard = products.view(x.shape[0], -1, SKETCH_ROWS)
        found: Tensor = by_shard.norm(dim=2, dtype=torch.float32)
        return found

    run = wrap(norms)
    return lambda: (run(x),)


def _train_forward(x: Tensor, base: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    side = F.linear(x.float(), delta)
    return (base.float() + side).to(base.dtype), side.norm(dim=1)


def dual_linear_train(inputs: Inputs, wrap: Wrap) -> Call:
    """Side output and its norm."""
    x, base, delta = inputs.get("x", "base", "delta")
    run = wrap(_train_forward)
    return lambda: tuple(run(x, base, delta))


def masked_update(inputs: Inputs, wrap: Wrap) -> Call:
    """The optimizer on entries gathered by a bool mask; waits for the device to count them."""
    delta, grad, chosen, m, v = inputs.get("delta", "grad", "bools", "m", "v")
    run = wrap(_update_gathered)

    def step() -> tuple[Tensor, ...]:
        run(delta, grad, chosen, m, v)
        return (delta,)

    return step


def _update_gathered(
    delta: Tensor, grad: Tensor, chosen: Tensor, m: Tensor | None, v: Tensor | None
) -> None:
    gradient = grad[chosen]
    if m is None or v is None:
        delta[chosen] -= ADAM.lr * gradient
        return
    m.lerp_(gradient, 1 - ADAM.beta1)
    v.mul_(ADAM.beta2).addcmul_(gradient, gradient, value=1 - ADAM.beta2)
    scale = (v / (1 - ADAM.beta2**ADAM.step)).sqrt_().add_(ADAM.eps)
    delta[chosen] -= ADAM.lr * (m / (1 - ADAM.beta1**ADAM.step)) / scale


def _dense_optimizer(inputs: Inputs) -> torch.optim.Optimizer:
    """torch's own, with dense states: a zero gradient and zero states leave an entry alone."""
    delta, chosen, m, v = inputs.get("delta", "bools", "m", "v")
    delta.requires_grad_()
    if m is None:
        return torch.optim.SGD([delta], ADAM.lr, fused=True)
    optimizer = torch.optim.Adam(
        [delta],
        ADAM.lr,
        (ADAM.beta1, ADAM.beta2),
        ADAM.eps,
        fused=True,
        capturable=delta.is_cuda,
    )
    dense = [torch.zeros_like(delta).masked_scatter_(chosen, packed) for packed in (m, v)]
    steps_taken = torch.tensor(float(ADAM.step - 1), device=delta.device)
    optimizer.state[delta] = {
        "step": steps_taken,
        "exp_avg": dense[0].detach(),
        "exp_avg_sq": dense[1].detach(),
    }
    return optimizer


def masked_update_dense(inputs: Inputs, wrap: Wrap) -> Call:
    """torch's fused optimizer with dense states on the masked gradient: more memory, no gather."""
    delta, grad, chosen = inputs.get("delta", "grad", "bools")
    optimizer = _dense_optimizer(inputs)

    def step() -> tuple[Tensor, ...]:
        delta.grad = grad * chosen
        optimizer.step()
        return (delta.detach(),)

    return step


def _gradient(inputs: Inputs, wrap: Wrap) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    x, base, delta = inputs.get("x", "base", "delta")
    grad_y, grad_indicator = inputs.get("grad_y", "grad_indicator")
    delta.requires_grad_()
    run = wrap(_train_forward)

    def gradient() -> tuple[Tensor, Tensor, Tensor]:
        y, indicator = run(x, base, delta)
        (grad,) = torch.autograd.grad((y, indicator), (delta,), (grad_y, grad_indicator))
        return y.detach(), indicator.detach(), grad

    return gradient


def train_step(inputs: Inputs, wrap: Wrap) -> Call:
    """Autograd, and the optimizer on gathered entries; waits for the device to count them."""
    gradient, update = _gradient(inputs, wrap), wrap(_update_gathered)
    delta, chosen, m, v = inputs.get("delta", "bools", "m", "v")

    def step() -> tuple[Tensor, ...]:
        y, indicator, grad = gradient()
        with torch.no_grad():
            update(delta, grad, chosen, m, v)
        return y, indicator, delta.detach()

    return step


def train_step_dense(inputs: Inputs, wrap: Wrap) -> Call:
    """Autograd, and torch's fused Adam with dense states on the masked gradient."""
    gradient, optimizer = _gradient(inputs, wrap), _dense_optimizer(inputs)
    delta, chosen = inputs.get("delta", "bools")

    def step() -> tuple[Tensor, ...]:
        y, indicator, grad = gradient()
        delta.grad = grad.mul_(chosen)
        optimizer.step()
        return y, indicator, delta.detach()

    return step


def pack(inputs: Inputs, wrap: Wrap) -> Call:
    """Indexing by a bool mask; waits for the device to count."""
    delta, chosen = inputs.get("packable", "bools")
    run = wrap(lambda delta, chosen: (delta[chosen], F.pad(chosen.sum(1).cumsum(0), (1, 0))))
    return lambda: tuple(run(delta, chosen))


def unpack(inputs: Inputs, wrap: Wrap) -> Call:
    """A masked scatter into zeros."""
    values, chosen = inputs.get("values", "bools")
    dtype = values.dtype

    def scatter(values: Tensor, chosen: Tensor) -> Tensor:
        return torch.zeros(chosen.shape, dtype=dtype, device=chosen.device).masked_scatter_(
            chosen, values
        )

    run = wrap(scatter)
    return lambda: (run(values, chosen),)


def ties_merge(inputs: Inputs, wrap: Wrap) -> Call:
    """topk for the thresholds, then stack, sign, where; waits for the device to count non-zeros."""
    deltas = inputs["deltas"]

    def trim(delta: Tensor) -> Tensor:
        keep = math.ceil(int(torch.count_nonzero(delta)) * TIES_DENSITY)
        magnitude = delta.abs()
        least = torch.topk(magnitude.flatten(), keep).values[-1]
        return torch.where(magnitude >= least, delta, 0.0)

    def merge(deltas: list[Tensor]) -> Tensor:
        stacked = torch.stack([trim(delta) for delta in deltas])
        elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        agrees = stacked.sign() == elected
        total = torch.where(agrees, stacked, 0.0).sum(0)
        return total / agrees.sum(0).clamp(min=1)

    run = wrap(merge)
    return lambda: (run(deltas),)
