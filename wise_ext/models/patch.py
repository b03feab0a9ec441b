"""Patching a Hugging Face model in place, and taking the patch off again."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from wise_ext import ops
from wise_ext.errors import ModelError
from wise_ext.memory import Bank, MixedBank, Router, SideMemory
from wise_ext.models.continuous import wrap_continuous_batching
from wise_ext.models.generation import wrap_generate
from wise_ext.models.installed import (
    ATTRIBUTE,
    DEFAULT,
    Installed,
    Patch,
    installed_in,
    memories_of,
    patch_of,
)
from wise_ext.models.parallel import bank_beside, with_whole_keys
from wise_ext.models.routing import Routing
from wise_ext.models.scopes import disabled, force_route, last_route, prompt_lengths, use_memory
from wise_ext.models.table import get_module, projection_shape
from wise_ext.models.weights import device_of
from wise_ext.nn import DualLinear, RouteState

__all__ = [
    "current_memory",
    "disabled",
    "force_route",
    "is_patched",
    "last_route",
    "memories",
    "patch",
    "prompt_lengths",
    "unload",
    "use_memory",
]

_INFERENCE_OPS = ("add_side_", "side_norm", "max_sim")
_BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Methods of a model that learn about routes.
_WRAPPED = {
    "generate": wrap_generate,
    "init_continuous_batching": wrap_continuous_batching,
}


def patch(
    model: nn.Module,
    memory: SideMemory,
    dtype: torch.dtype | None = None,
    name: str = DEFAULT,
) -> None:
    """Give a model a side memory; it stays the same model object, `generate` included.

    The projection at `memory.layer` is wrapped, its weight neither copied nor written. Hooks
    decide each row's route from its real prompt tokens and hold it while the row generates.

    A model may carry several memories, each under a name: a row uses the one that is named for it
    (`use_memory`, `generate(memory=...)`), the first where none is, and never two. A memory of a
    name that is there already takes the other's place; where that has the same layers and a router
    of the same kind, compiled code goes on to be used.

    Args:
        model: a causal language model.
        memory: what to install; it is packed now, so later changes need another `patch`.
        dtype: of the packed values: fp32, bf16 or fp16; by default the projection's own, or the
            model's where the projection is quantised.
        name: what the memory is called.

    Raises:
        ModelError: the model has no such layer, it is no linear projection or one of another
            shape, the key layer lies above it, or the dtype is none of the three. The model is
            then as it was.
        NativeError: a backend was chosen by name that has no kernel for the model's device.
    """
    installed = installed_in(model)
    current = installed.patches.get(name) if installed is not None else None
    layer = memory.layer
    base = _bare(get_module(model, layer))
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
    order = [*installed.patches] if installed is not None else []
    if current is not None:
        unload(model, name)
    _install(model, memory, bank, router, name)
    if current is not None:
        # It keeps its place: which memory is the first must not depend on how it was replaced.
        memories_of(model).arrange(order)


def unload(model: nn.Module, name: str | None = None) -> None:
    """Take side memories off; with the last one the very same module objects are back, every hook
    is gone.

    Args:
        model: a patched model.
        name: of one memory; None takes all off.

    Raises:
        ModelError: the model is not patched, it has no memory of that name, or something else has
            since taken the place of a patched layer (unload that first).
    """
    installed = installed_in(model)
    if installed is None:
        raise ModelError(f"this {type(model).__name__} has no side memory to unload")
    names = [*installed.patches] if name is None else [name]
    taken = [installed.named(each) for each in names]
    for one in taken:
        _holder_of(model, one)  # raises while the model is as it was
    for each, one in zip(names, taken, strict=True):
        holder, attribute = _holder_of(model, one)
        holder._modules[attribute] = one.dual.base
        for handle in one.handles:
            handle.remove()
        one.routing.close()
        installed.remove(each)
    if not installed.patches:
        for method in _WRAPPED:
            vars(model).pop(method, None)
        vars(model).update(installed.own)
        del vars(model)[ATTRIBUTE]


def is_patched(model: nn.Module) -> bool:
    """Whether the model has a side memory."""
    return installed_in(model) is not None


def memories(model: nn.Module) -> dict[str, SideMemory]:
    """The side memories of a model by name, the first being used where none is named."""
    installed = installed_in(model)
    return {} if installed is None else {n: p.memory for n, p in installed.patches.items()}


def current_memory(model: nn.Module, name: str | None = None) -> SideMemory:
    """The side memory of a patched model: the first, or the one of this name.

    Raises:
        ModelError: it has none.
    """
    return patch_of(model, name).memory


def _install(
    model: nn.Module,
    memory: SideMemory,
    bank: Bank,
    router: Router | None,
    name: str,
) -> None:
    state = RouteState()
    parent, attribute = _parent_of(model, memory.layer)
    there = parent._modules[attribute]
    assert there is not None
    dual = DualLinear(there, bank, state)
    body = _body_of(model, memory.layer)
    routing = Routing(model, body, router, state, name)
    # Behind this line nothing fails.
    parent._modules[attribute] = dual
    handles = [
        body.register_forward_pre_hook(routing.begin, with_kwargs=True, prepend=True),
        body.register_forward_hook(routing.end, with_kwargs=True, always_call=True),
    ]
    if router is not None:
        # On the model's own module, which stays when another memory of this layer goes.
        decider = _bare(get_module(model, router.layer))
        handles.append(decider.register_forward_pre_hook(routing.decide, with_kwargs=True))
    installed = installed_in(model)
    if installed is None:
        installed = Installed()
        for method, wrap in _WRAPPED.items():
            if callable(getattr(model, method, None)):
                if method in vars(model):
                    installed.own[method] = vars(model)[method]
                vars(model)[method] = wrap(model)
        vars(model)[ATTRIBUTE] = installed
    installed.add(name, Patch(memory, dual, routing, handles))


def _fits(
    current: Patch,
    model: nn.Module,
    memory: SideMemory,
    bank: Bank,
    router: Router,
) -> bool:
    """Whether what is installed can take this memory as it stands: then nothing that was compiled
    has to be compiled anew."""
    there = current.routing.router
    return (
        current.memory.layer == memory.layer
        and current.dual in _duals(get_module(model, memory.layer))
        and type(bank) is type(current.dual.bank)
        and type(router) is type(there)
        and router.layer == there.layer
    )


def _duals(module: nn.Module) -> list[DualLinear]:
    """The side memories around a projection, outermost first."""
    found = []
    while isinstance(module, DualLinear):
        found.append(module)
        module = module.base
    return found


def _bare(module: nn.Module) -> nn.Module:
    """A projection without the side memories around it."""
    duals = _duals(module)
    return duals[-1].base if duals else module


def _holder_of(model: nn.Module, installed: Patch) -> tuple[nn.Module, str]:
    """The module that a memory's projection hangs on, and by what name."""
    layer = installed.memory.layer
    duals = _duals(get_module(model, layer))
    if installed.dual not in duals:
        raise ModelError(
            f"'{layer}' was replaced after the side memory was loaded: undo that change first, "
            "then unload"
        )
    place = duals.index(installed.dual)
    return (duals[place - 1], "base") if place else _parent_of(model, layer)


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
