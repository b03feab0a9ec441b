"""A model's weights as they are, wherever and however they are kept.

Accelerate keeps offloaded ones elsewhere and leaves placeholders without data (meta tensors) in the
modules; tensor parallelism leaves each process a part; quantised layers hold packed numbers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from wise_ext.nn import DualLinear


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names as in ``state_dict``, in order, with the numbers behind them, one weight at a time.

    Parts that other processes hold are fetched, so all of them have to ask. torch's and torchao's
    quantised weights come dequantised, those of bitsandbytes as their codes; entries that only say
    how such codes are scaled are left out (bitsandbytes works them out anew now and then).
    """
    with _unpacked(model):
        state = model.state_dict()
    for name, value in sorted(state.items()):
        # Quantised linears keep packed parameters and dtypes beside tensors: only data counts.
        if not isinstance(value, Tensor) or value.numel() == 0 or _describes(name, state):
            continue
        value = _fetched(model, name, value.detach())
        if not value.is_meta:
            yield name, _plain(value)


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these that has tensors computes (an offloaded one's lie elsewhere)."""
    for module in modules:
        hook = _offloading(module)
        if hook is not None:
            where = hook.execution_device
            return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def _describes(name: str, state: dict[str, Any]) -> bool:
    """Whether an entry belongs to another one: `….weight.absmax` to `….weight`."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in state for end in range(1, len(parts)))


def _plain(value: Tensor) -> Tensor:
    if hasattr(value, "full_tensor"):
        value = cast(Tensor, cast(Any, value).full_tensor())
    packed = value.is_quantized or hasattr(value, "__tensor_flatten__")
    return value.dequantize() if packed else value


def _fetched(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The weight that a placeholder stands for, where Accelerate knows it."""
    if not value.is_meta:
        return value
    path, _, attribute = name.rpartition(".")
    hook = _offloading(model.get_submodule(path))
    return value if hook is None else cast(Tensor, hook.weights_map[attribute])


def _offloading(module: nn.Module) -> Any:
    """The hook of Accelerate that brings a module's weights when it runs, if it has one."""
    if isinstance(module, DualLinear):
        module = module.base
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((each for each in hooks if getattr(each, "offload", False)), None)


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """bitsandbytes repacks 4-bit weights for the CPU at their first use, and when asked for its
    state a layer packs them back, with scales that are no longer the same to the bit. Meanwhile
    copies do that in their place."""
    held = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            held.append((module, weight))
            module._parameters["weight"] = copy.deepcopy(weight)
    try:
        yield
    finally:
        for module, weight in held:
            module._parameters["weight"] = weight
