"""Schemas, shape functions ("fakes") and the reference registration of every op.

Namespaces share each schema, one for each way to run an op, so that the choice stays one opaque
node under torch.compile. `torch.ops.wise_ext` has the reference for every device
(CompositeExplicitAutograd) until the native module registers a kernel for its device's own key,
which the dispatcher prefers. `torch.ops.wise_ext_reference` always runs the reference,
`torch.ops.wise_ext_triton` the Triton kernels (ops/triton_binding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wise_ext.ops import checks, reference, train_checks, triton_binding

NAMESPACE = "wise_ext"
REFERENCE_NAMESPACE = "wise_ext_reference"
TRITON_NAMESPACE = "wise_ext_triton"

_BANK = "Tensor mask_bits, Tensor values, Tensor row_ptr"

SCHEMAS: dict[str, str] = {
    "add_side_": f"(Tensor(a!) y, Tensor x, {_BANK}, Tensor route) -> ()",
    "add_side_backward": f"(Tensor grad, {_BANK}, Tensor route, SymInt d_in) -> Tensor",
    "add_low_rank_": (
        "(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor rank_ptr, Tensor route) -> ()"
    ),
    "dual_linear": (f"(Tensor x, Tensor weight, Tensor? bias, {_BANK}, Tensor route) -> Tensor"),
    "side_norm": f"(Tensor x, {_BANK}, Tensor rows, Tensor shards) -> Tensor",
    "sketch_norm": "(Tensor x, Tensor sketch) -> Tensor",
    "max_sim": (
        "(Tensor query, Tensor keys, Tensor scales, Tensor places, Tensor weights, float floor)"
        " -> Tensor"
    ),
    "dual_linear_train": (
        "(Tensor x, Tensor base, Tensor delta, Tensor mask_bits)"
        " -> (Tensor y, Tensor side, Tensor indicator)"
    ),
    "dual_linear_train_backward": (
        "(Tensor grad_y, Tensor grad_indicator, Tensor x, Tensor delta, Tensor mask_bits,"
        " Tensor side, Tensor indicator, bool need_x, bool need_delta)"
        " -> (Tensor grad_x, Tensor grad_delta)"
    ),
    "masked_update_": (
        "(Tensor(a!) delta, Tensor grad, Tensor mask_bits, Tensor row_ptr, Tensor(b!)? m,"
        " Tensor(c!)? v, float lr, float beta1, float beta2, float eps, int step, float clamp)"
        " -> ()"
    ),
    "pack": "(Tensor delta, Tensor mask_bits) -> (Tensor values, Tensor row_ptr)",
    "unpack": f"({_BANK}, SymInt d_in) -> Tensor",
    "ties_merge": "(Tensor[] deltas, float[] weights, float density) -> Tensor",
}


def _add_side(
    y: Tensor, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor
) -> None:
    checks.side("add_side_", y, x, mask_bits, values, row_ptr, route)


def _add_side_backward(
    grad: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, route: Tensor, d_in: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], d_in, dtype=_wide(grad, values))


def _add_low_rank(
    y: Tensor, x: Tensor, left: Tensor, right: Tensor, rank_ptr: Tensor, route: Tensor
) -> None:
    checks.low_rank("add_low_rank_", y, x, left, right, rank_ptr, route)


def _dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    route: Tensor,
) -> Tensor:
    checks.linear("dual_linear", x, weight, bias)
    checks.bank("dual_linear", x, mask_bits, values, row_ptr, weight.shape[0])
    checks.route("dual_linear", route, x.shape[0], x.device)
    return x.new_empty(x.shape[0], weight.shape[0])


def _side_norm(
    x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, rows: Tensor, shards: Tensor
) -> Tensor:
    checks.pairs("side_norm", x, mask_bits, values, row_ptr, rows, shards)
    return x.new_empty(rows.shape[0], dtype=_wide(x, values))


def _sketch_norm(x: Tensor, sketch: Tensor) -> Tensor:
    checks.sketch("sketch_norm", x, sketch)
    return x.new_empty(x.shape[0], sketch.shape[0], dtype=_wide(x, sketch))


def _max_sim(
    query: Tensor, keys: Tensor, scales: Tensor, places: Tensor, weights: Tensor, floor: float
) -> Tensor:
    checks.entries("max_sim", query, keys, scales, places, weights)
    return query.new_empty(query.shape[0], places.shape[0])


def _dual_linear_train(
    x: Tensor, base: Tensor, delta: Tensor, mask_bits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    train_checks.train("dual_linear_train", x, delta, mask_bits)
    train_checks.activations("dual_linear_train", "base", base, x.shape[0], delta.shape[0])
    wide = _wide(x, base, delta)
    shape = (x.shape[0], delta.shape[0])
    return (
        base.new_empty(shape),
        base.new_empty(shape, dtype=wide),
        base.new_empty(x.shape[0], dtype=wide),
    )


def _dual_linear_train_backward(
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
    train_checks.train_backward(
        "dual_linear_train_backward", grad_y, grad_indicator, x, delta, mask_bits, side, indicator
    )
    return (
        x.new_empty(x.shape if need_x else (0,)),
        delta.new_empty(delta.shape if need_delta else (0,)),
    )


def _masked_update(
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
    train_checks.update("masked_update_", delta, grad, mask_bits, row_ptr, m, v, step)


def _pack(delta: Tensor, mask_bits: Tensor) -> tuple[Tensor, Tensor]:
    checks.packable("pack", delta, mask_bits)
    nnz = torch.library.get_ctx().new_dynamic_size()
    return delta.new_empty(nnz), delta.new_empty(delta.shape[0] + 1, dtype=torch.int64)


def _unpack(mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> Tensor:
    checks.unpackable("unpack", mask_bits, values, row_ptr, d_in)
    return values.new_empty(mask_bits.shape[0], d_in)


def _ties_merge(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    checks.ties("ties_merge", deltas, weights, density)
    return torch.empty(deltas[0].shape, dtype=deltas[0].dtype, device=deltas[0].device)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


FAKES: dict[str, Callable[..., Any]] = {
    "add_side_": _add_side,
    "add_side_backward": _add_side_backward,
    "add_low_rank_": _add_low_rank,
    "dual_linear": _dual_linear,
    "side_norm": _side_norm,
    "sketch_norm": _sketch_norm,
    "max_sim": _max_sim,
    "dual_linear_train": _dual_linear_train,
    "dual_linear_train_backward": _dual_linear_train_backward,
    "masked_update_": _masked_update,
    "pack": _pack,
    "unpack": _unpack,
    "ties_merge": _ties_merge,
}


def register(
    namespace: str, implementations: Mapping[str, Callable[..., Any]]
) -> torch.library.Library:
    """Define every op in a namespace, with its fake; register what is there for all devices.

    Returns the library, which must be kept: it unregisters its ops when it is collected.
    """
    library = torch.library.Library(namespace, "DEF")
    # Flat, row-major inputs are what every kernel wants: let inductor keep eager's strides.
    tags = (torch.Tag.needs_exact_strides,)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=tags)
        if name in implementations:
            # Autograd lives outside the ops (ops/autograd.py): nothing inside may be recorded.
            function = torch.no_grad()(implementations[name])
            library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", FAKES[name], lib=library)
    return library


_REFERENCES = {name: getattr(reference, name) for name in SCHEMAS}
LIBRARIES = (
    register(NAMESPACE, _REFERENCES),
    register(REFERENCE_NAMESPACE, _REFERENCES),
    register(TRITON_NAMESPACE, triton_binding.OPS),
)
# Implemented by the native module alone: the instruction set its CPU kernels use (see backends).
LIBRARIES[0].define("cpu_isa(int force) -> int")
