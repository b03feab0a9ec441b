"""Where a patched model's time goes: per block, for the routing and for the side memory."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..editing.anatomy import blocks_around
from ..errors import DataError
from ..memory import MAIN
from ..models import disabled, last_route
from ..models.installed import patch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTING, SIDE, EMBEDDING, OUTPUT, REST = (
    "routing",
    "side memory",
    "embedding",
    "output layer",
    "everything else",
)


@dataclass(frozen=True)
class Part:
    """One part of a model, its inner parts that are listed themselves left out.

    Attributes:
        name: ``block 7``, or what the part does.
        block: the block that it is, or runs in; None for what lies around the blocks.
        prefill: milliseconds of a prefill, the median over repetitions.
        decode: milliseconds of a decoded token, likewise.
    """

    name: str
    block: int | None
    prefill: float
    decode: float


@dataclass(frozen=True)
class Profile:
    """What a prompt costs a patched model.

    Attributes:
        parts: in the order in which they run; they add up to about ``prefill`` and ``decode``.
        tokens: of the prompt.
        route: where it went: a shard, or -1 for main memory.
        prefill, decode: milliseconds of the patched model, unobserved: a prefill, and a token
            behind it. Medians.
        prefill_ratio, decode_ratio: over the same model with its side memory disabled: the median
            of ratios of neighbouring passes.
    """

    parts: tuple[Part, ...]
    tokens: int
    route: int
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float


@torch.no_grad()
def profile(
    model: PreTrainedModel, ids: Tensor, *, repeats: int = 9, new_tokens: int = 8
) -> Profile:
    """Time a patched model on one prompt.

    On a GPU every part is waited for, so the parts show what they take one after another; the
    totals and ratios are of passes that were not watched.

    Args:
        model: patched, in evaluation mode.
        ids: the prompt's token ids, int64 ``[1, T]``, at least one.
        repeats: passes of each kind, after one that warms up.
        new_tokens: tokens decoded behind every prefill.

    Raises:
        ModelError: the model is not patched.
        DataError: the prompt has no tokens.
    """
    patch_of(model)
    if not ids.numel():
        raise DataError("the prompt has no tokens: write a prompt")
    device = next(model.parameters()).device
    ids = ids.to(device)

    def passes() -> tuple[float, float]:
        """Milliseconds of a prefill and of a token behind it."""
        began = _now(device)
        out = _prefill(model, ids)
        middle = _now(device)
        _decode(model, out, new_tokens)
        return middle - began, (_now(device) - middle) / new_tokens

    passes()
    route = last_route(model)
    timed: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(repeats):
        for edited in (True, False) if number % 2 else (False, True):
            with nullcontext() if edited else disabled(model):
                timed[edited].append(passes())
    watches = [_watched(model, ids, new_tokens, device) for _ in range(repeats)]
    prefill, decode = zip(*timed[True], strict=True)
    pairs = list(zip(timed[True], timed[False], strict=True))
    return Profile(
        _parts(watches),
        ids.shape[1],
        MAIN if route is None else int(route[0]),
        median(prefill),
        median(decode),
        median(one[0] / other[0] for one, other in pairs),
        median(one[1] / other[1] for one, other in pairs),
    )


def _prefill(model: PreTrainedModel, ids: Tensor) -> Any:
    """As `generate` does it: the last token's logits alone, where the model knows how."""
    known = inspect.signature(model.forward).parameters
    alone = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return model(input_ids=ids, use_cache=True, **alone)


def _decode(model: PreTrainedModel, out: Any, count: int) -> None:
    for _ in range(count):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


class _Watch:
    """Adds up what parts take; what a part calls is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[tuple[str, int | None], float] = {}
        self._open: list[list[Any]] = []

    def enter(self, part: tuple[str, int | None]) -> None:
        self._open.append([part, _now(self.device), 0.0])

    def leave(self) -> None:
        part, began, inner = self._open.pop()
        took = _now(self.device) - began
        self.spent[part] = self.spent.get(part, 0.0) + took - inner
        if self._open:
            self._open[-1][2] += took


def _watched(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, device: torch.device
) -> tuple[dict[Any, float], dict[Any, float]]:
    """Milliseconds by part, of a prefill and of a token."""
    watch = _Watch(device)
    with _watching(model, watch):
        out = _prefill(model, ids)
        prefill, watch.spent = watch.spent, {}
        _decode(model, out, new_tokens)
    return prefill, {part: spent / new_tokens for part, spent in watch.spent.items()}


@contextmanager
def _watching(model: PreTrainedModel, watch: _Watch) -> Iterator[None]:
    installed = patch_of(model)
    blocks, edited = blocks_around(model, installed.memory.layer)
    modules: list[tuple[nn.Module | None, tuple[str, int | None]]] = [
        (model, (REST, None)),
        (model.get_input_embeddings(), (EMBEDDING, None)),
        (model.get_output_embeddings(), (OUTPUT, None)),  # type: ignore[no-untyped-call]
        *((block, (f"block {n}", n)) for n, block in enumerate(blocks)),
    ]
    with ExitStack() as stack:
        for module, part in modules:
            if module is not None:
                stack.enter_context(_module_watched(module, part, watch))
        router, bank = installed.routing.router, installed.dual.bank
        if router is not None:
            _, key = blocks_around(model, router.layer)
            stack.enter_context(_method_watched(router, "decide", (ROUTING, key), watch))
        stack.enter_context(_method_watched(bank, "add_side_", (SIDE, edited), watch))
        yield


@contextmanager
def _module_watched(
    module: nn.Module, part: tuple[str, int | None], watch: _Watch
) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda *_: watch.enter(part), prepend=True),
        module.register_forward_hook(lambda *_: watch.leave(), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _method_watched(
    owner: Any, name: str, part: tuple[str, int | None], watch: _Watch
) -> Iterator[None]:
    method: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.enter(part)
        try:
            return method(*args, **kwargs)
        finally:
            watch.leave()

    vars(owner)[name] = watched
    try:
        yield
    finally:
        del vars(owner)[name]


def _parts(watches: list[tuple[dict[Any, float], dict[Any, float]]]) -> tuple[Part, ...]:
    """Medians over repetitions: what comes before the blocks, block by block, what comes behind."""
    found = {part for pair in watches for spent in pair for part in spent}
    order = (EMBEDDING, "", ROUTING, SIDE, OUTPUT, REST)

    def place(part: tuple[str, int | None]) -> tuple[bool, int, int]:
        name, block = part
        kind = order.index(name) if name in order else 1
        return name in (OUTPUT, REST), -1 if block is None else block, kind

    medians = (
        Part(*part, *(median(pair[phase].get(part, 0.0) for pair in watches) for phase in (0, 1)))
        for part in sorted(found, key=place)
    )
    return tuple(medians)


def _now(device: torch.device) -> float:
    """Milliseconds, all work queued on the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
