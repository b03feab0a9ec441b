"""Patching a Hugging Face model in place, and taking the patch off again."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from wise_ext import ops
from wise_ext.errors import ModelError
from wise_ext.memory import Bank, MixedBank, Router, SideMemory
from wise_ext.models.generation import wrap_generate
from wise_ext.models.installed import ATTRIBUTE, Patch, installed_patch, patch_of
from wise_ext.models.parallel import bank_beside, with_whole_keys
from wise_ext.models.routing import Routing
from wise_ext.models.scopes import disabled, force_route, last_route, prompt_lengths
from wise_ext.models.table import get_module, projection_shape
from wise_ext.models.weights import device_of
from wise_ext.nn import DualLinear, RouteState

__all__ = [
    "current_memory",
    "disabled",
    "force_route",
    "is_patched",
    "last_route",
    "patch",
    "prompt_lengths",
    "unload",
]

_INFERENCE_OPS = ("add_side_", "side_norm", "max_sim")
_BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def patch(model: nn.Module, memory: SideMemory, dtype: torch.dtype | None = None) -> None:
    """Give a model a side memory; it stays the same model object, `generate` included.

    The projection at `memory.layer` is wrapped, its weight neither copied nor written. Hooks
    decide each row's route from its real prompt tokens and hold it while the row generates. A
    model that is patched already gets this memory in place of the other; where that has the same
    layers and a router of the same kind, compiled code goes on to be used.

    Args:
        model: a causal language model.
        memory: what to install; it is packed now, so later changes need another `patch`.
        dtype: of the packed values: fp32, bf16 or fp16; by default the projection's own, or the
            model's where the projection is quantised.

    Raises:
        ModelError: the model has no such layer, it is no linear projection or one of another
            shape, the key layer lies above it, or the dtype is none of the three. The model is
            then as it was.
        NativeError: a backend was chosen by name that has no kernel for the model's device.
    """
    current = installed_patch(model)
    layer, base = memory.layer, get_module(model, memory.layer)
    if isinstance(base, DualLinear):
        base = base.base
    shape = projection_shape(base)
    if shape != tuple(memory.shape):
        raise ModelError(
            f"the memory edits a projection of shape {tuple(memory.shape)}, but '{layer}' of this "
            f"{type(model).__name__} is {shape}: it was made for another model"
        )
    if dtype is not None and dtype not in _BANK_DTYPES:
        raise ModelError(f"a side memory is kept in fp32, bf16 or fp16, not in {dtype}")
    chosen, device = _values_of(model, base)
    # Implementations are picked now and not in a forward pass: one that was asked for and cannot
    # be had is refused while the model is as it was.
    bank = bank_beside(base, memory, dtype or chosen, device)
    for op in (*_INFERENCE_OPS, *(["add_low_rank_"] if isinstance(bank, MixedBank) else [])):
        ops.backend(op, device)
    router = with_whole_keys(model, memory.router(bank))
    if router is not None:
        _check_order(model, router.layer, layer)
    if current is not None and router is not None and _fits(current, model, memory, bank, router):
        current.renew(memory, bank, router)
        return
    if current is not None:
        unload(model)
    _install(model, memory, base, bank, router)


def unload(model: nn.Module) -> None:
    """Take the side memory off: the very same module objects are back, every hook is gone.

    Raises:
        ModelError: the model is not patched, or something else has since taken the place of the
            patched layer (unload that first).
    """
    installed = installed_patch(model)
    if installed is None:
        raise ModelError(f"this {type(model).__name__} has no side memory to unload")
    parent, name = _parent_of(model, installed.memory.layer)
    if parent._modules.get(name) is not installed.dual:
        raise ModelError(
            f"'{installed.memory.layer}' was replaced after the side memory was loaded: undo that "
            "change first, then unload"
        )
    parent._modules[name] = installed.dual.base
    for handle in installed.handles:
        handle.remove()
    vars(model).pop("generate", None)
    if installed.own_generate is not None:
        vars(model)["generate"] = installed.own_generate
    del vars(model)[ATTRIBUTE]


def is_patched(model: nn.Module) -> bool:
    """Whether the model has a side memory."""
    return installed_patch(model) is not None


def current_memory(model: nn.Module) -> SideMemory:
    """The side memory of a patched model.

    Raises:
        ModelError: it has none.
    """
    return patch_of(model).memory


def _install(
    model: nn.Module,
    memory: SideMemory,
    base: nn.Module,
    bank: Bank,
    router: Router | None,
) -> None:
    state = RouteState()
    dual = DualLinear(base, bank, state)
    body = _body_of(model, memory.layer)
    routing = Routing(model, body, router, state)
    parent, name = _parent_of(model, memory.layer)
    parent._modules[name] = dual
    handles = [
        body.register_forward_pre_hook(routing.begin, with_kwargs=True, prepend=True),
        body.register_forward_hook(routing.end, with_kwargs=True, always_call=True),
    ]
    if router is not None:
        decider = get_module(model, router.layer)
        handles.append(decider.register_forward_pre_hook(routing.decide, with_kwargs=True))
    own = vars(model).get("generate")
    if callable(getattr(model, "generate", None)):
        vars(model)["generate"] = wrap_generate(model, routing)
    vars(model)[ATTRIBUTE] = Patch(memory, dual, routing, handles, own)


def _fits(
    current: Patch,
    model: nn.Module,
    memory: SideMemory,
    bank: Bank,
    router: Router,
) -> bool:
    """Whether what is installed can take this memory as it stands: then nothing that was compiled
    has to be compiled anew."""
    there, parent = current.routing.router, _parent_of(model, current.memory.layer)
    return (
        current.memory.layer == memory.layer
        and parent[0]._modules.get(parent[1]) is current.dual
        and type(bank) is type(current.dual.bank)
        and type(router) is type(there)
        and router.layer == there.layer
    )


def _body_of(model: nn.Module, path: str) -> nn.Module:
    """The module that runs the blocks: it sees every forward pass, from whichever head it comes.

    That is the nearest one around the list of blocks that is given tokens or their embeddings.
    """
    parts = path.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    for end in range(numbered[0] - 1 if numbered else 0, 0, -1):
        module = get_module(model, ".".join(parts[:end]))
        if {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters):
            return module
    return model


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return (get_module(model, parent) if parent else model), name


def _values_of(model: nn.Module, base: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device for the bank: the projection's own, as far as it has one."""
    device = device_of(base, model)
    everything = [*base.parameters(), *base.buffers(), *model.parameters()]
    dtypes = [tensor.dtype for tensor in everything if tensor.dtype in _BANK_DTYPES]
    return (dtypes[0] if dtypes else torch.float32), device


def _check_order(model: nn.Module, key_layer: str, layer: str) -> None:
    get_module(model, key_layer)
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    if order[key_layer] > order[layer]:
        raise ModelError(
            f"the key layer '{key_layer}' lies above the edited layer '{layer}': the route must be "
            "known before the edited layer runs"
        )
