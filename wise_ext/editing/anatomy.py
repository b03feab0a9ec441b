"""How a causal LM is cut at one projection: its blocks, what follows them, what a block adds.

Asked of the model itself by watching one short pass, so no architecture needs an entry for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.editing.quantised import gradients_through, is_quantised
from wise_ext.errors import ModelError
from wise_ext.models.weights import device_of


class _Stop(Exception):
    """Ends a forward pass once everything wanted has been seen."""


def blocks_around(model: nn.Module, layer: str) -> tuple[list[nn.Module], int]:
    """The list of decoder blocks that ``layer`` passes through, and its block's index there.

    Raises:
        ModelError: the path leads through no list of blocks.
    """
    parts = layer.split(".")
    for i, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:i])) if i else model
        if part.isdigit() and isinstance(parent, nn.ModuleList):
            return list(parent), int(part)
    raise ModelError(
        f"layer {layer!r} is not inside a list of decoder blocks; "
        "name one such as 'model.layers.24.mlp.down_proj'"
    )


def modules_after(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[nn.Module]:
    """The modules between the last block and the logits, in the order the model calls them."""
    inside = {m for b in blocks for m in b.modules()}
    tail: list[nn.Module] = []
    started = False

    def start(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal started
        started = True

    def note(module: nn.Module, args: Any) -> None:
        if started:
            tail.append(module)

    hooks = [blocks[-1].register_forward_hook(start)]
    for module in model.modules():
        leaf = is_quantised(module) or not any(True for _ in module.children())
        if leaf and module not in inside:
            hooks.append(module.register_forward_pre_hook(note))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tail


def is_additive(model: nn.Module, block: nn.Module, projection: nn.Module, ids: Tensor) -> bool:
    """Whether a block adds its projection's output to its own as it is.

    Plain residual blocks do. A norm behind the FFN (Gemma 2) or a scaled residual says no. Probed
    by shifting the projection's output and looking at what comes out of the block.
    """
    seen: dict[str, Tensor] = {}
    shift: Tensor | None = None

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal shift
        if shift is None:
            ramp = torch.linspace(-1, 1, output.shape[-1], device=output.device)
            shift = (ramp * output.float().abs().mean()).to(output.dtype)
            return output
        return output + shift

    hook = projection.register_forward_hook(add)
    try:
        with watch(block, "out", seen, entering=False, stop=True):
            run_until_stopped(model, ids)
            plain = seen["out"].float()
            run_until_stopped(model, ids)
            moved = seen["out"].float() - plain
    finally:
        hook.remove()
    assert shift is not None
    tolerance = 1e-3 if seen["out"].dtype == torch.float32 else 5e-2
    error = (moved - shift.float()).abs().max()
    return bool(error <= tolerance * (shift.float().abs().max() + 1e-2 * plain.abs().max()))


def feed_forwards(layer: str, blocks: Sequence[nn.Module]) -> list[nn.Module | None]:
    """The feed-forward module of each block, where the projection ``layer`` names its path.

    None where a block has no such module of its own (OPT's is part of the block itself).
    """
    parts = layer.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    inside = parts[place + 1 : -1]
    found: list[nn.Module | None] = []
    for block in blocks:
        module: nn.Module | None = block
        for part in inside:
            module = getattr(module, part, None)
        found.append(module if inside and isinstance(module, nn.Module) else None)
    return found


@contextmanager
def only_at(module: nn.Module | None, places: Tensor) -> Iterator[None]:
    """A module that treats every token alone sees some tokens of a [rows, width, d] grid only.

    Args:
        module: its output is zero elsewhere; None changes nothing.
        places: flat positions in the grid, int64 [n].
    """
    if module is None:
        yield
        return
    shape: list[torch.Size] = []

    def take(m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            raise ModelError(f"{type(m).__name__} is not called with [rows, width, d]")
        shape[:] = [args[0].shape]
        return args[0].reshape(-1, args[0].shape[-1])[None, places], *args[1:]

    def put(m: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ModelError(f"{type(m).__name__} returns more than a hidden state")
        grid = output.new_zeros(shape[0][:-1].numel(), output.shape[-1])
        return grid.index_copy(0, places, output[0]).view(*shape[0][:-1], -1)

    hooks = [module.register_forward_pre_hook(take), module.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch(
    module: nn.Module, name: str, seen: dict[str, Tensor], entering: bool, stop: bool = False
) -> Iterator[None]:
    """Keep what enters or leaves a module under ``name``; with ``stop``, end the pass there."""

    def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()
        if stop:
            raise _Stop

    def leave(m: nn.Module, args: Any, output: Any) -> None:
        seen[name] = first(output).detach()
        if stop:
            raise _Stop

    if entering:
        hook = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        hook = module.register_forward_hook(leave)
    try:
        yield
    finally:
        hook.remove()


def run_until_stopped(model: nn.Module, ids: Tensor) -> None:
    """A forward pass over ids [rows, width], right-padded, up to where a ``watch`` stops it."""
    with suppress(_Stop):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter takes a gradient meanwhile; those of quantised layers pass
    one on."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    for module in training:
        module.training = False
    for p in trainable:
        p.requires_grad_(False)
    try:
        with gradients_through(model):
            yield
    finally:
        for module in training:
            module.training = True
        for p in trainable:
            p.requires_grad_(True)


def returns_tuples(model: nn.Module, block: nn.Module) -> bool:
    """Whether a block hands its hidden state on in a tuple."""
    kinds: list[bool] = []
    hook = block.register_forward_hook(lambda m, args, out: kinds.append(isinstance(out, tuple)))
    try:
        with torch.no_grad():
            ids = torch.ones(1, 1, dtype=torch.long, device=device_of(model))
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return kinds[0]


def first(output: Any) -> Tensor:
    """A block's hidden state, which some architectures return in a tuple."""
    return output if isinstance(output, Tensor) else output[0]
