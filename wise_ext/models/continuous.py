"""Continuous batching: requests that come and go, their tokens packed into one row, each with the
route of its own prompt.

A request is routed when it is first scheduled, by a pass over its whole prompt that ends at the
router's layer; so it does not matter how its prompt is cut into chunks, how much of it lies in
shared blocks, or how often the request is put aside. Its route is kept on the request itself and
laid out over the tokens of every packed pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from wise_ext.errors import ModelError
from wise_ext.memory import MAIN, NO_CUE, Decision, uncued
from wise_ext.models.installed import Installed, Patch, installed_in, memories_of
from wise_ext.models.routing import Epoch
from wise_ext.models.scopes import UNSAID, choose, chosen, unchoose, use_memory

# What a request carries: the name of its memory, its place in that, and whether any of it was ever
# computed beside main memory.
_MEMORY = "_wise_ext_memory"
_PLACE = "_wise_ext_place"
_APART = "_wise_ext_apart"
_EQUIPPED = "_wise_ext_equipped"
# Prompts are routed together up to this many tokens, pads included.
_TOKENS_AT_ONCE = 8192


class Place(NamedTuple):
    """Where one request goes: a shard of the memory of this epoch, and its cue's number."""

    epoch: Epoch
    shard: int
    cue: int


def wrap_continuous_batching(model: Any) -> Callable[..., Any]:
    """An `init_continuous_batching` whose managers route each request by its prompt."""
    original = model.init_continuous_batching

    @functools.wraps(original)
    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        manager = original(*args, **kwargs)
        if not hasattr(manager, _EQUIPPED):
            try:
                _equip(manager, model)
            except AttributeError as error:
                raise ModelError(
                    f"this transformers batches continuously in a way wise-ext does not know "
                    f"({error}): use another version, or unload the side memory"
                ) from None
        return manager

    return init_continuous_batching


def _equip(manager: Any, model: Any) -> None:
    add_request, add_requests = manager.add_request, manager.add_requests
    create, waiting = manager._create_batch_processor, manager.input_queue

    @functools.wraps(add_request)
    def add_one(input_ids: Sequence[int], *args: Any, memory: Any = UNSAID, **kwargs: Any) -> Any:
        if memory is UNSAID:
            memory = chosen(model)
        if isinstance(memory, list | tuple):
            raise ModelError(f"{len(memory)} names of memories for one request")
        with _choosing(model, memory):
            return add_request(input_ids, *args, **kwargs)

    @functools.wraps(add_requests)
    def add_many(inputs: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        memory = kwargs.pop("memory", chosen(model))
        if memory is UNSAID or memory is None or isinstance(memory, str):
            with _choosing(model, memory):
                return add_requests(inputs, *args, **kwargs)
        if len(memory) != len(inputs):
            raise ModelError(f"{len(memory)} names of memories for {len(inputs)} prompts")
        # They are added in another order, but as the very objects that are given here.
        lists = [list(ids) for ids in inputs]
        name_of = {id(ids): name for ids, name in zip(lists, memory, strict=True)}
        try:
            manager.add_request = lambda input_ids, **more: add_one(
                input_ids, memory=name_of[id(input_ids)], **more
            )
            return add_requests(lists, *args, **kwargs)
        finally:
            manager.add_request = add_one

    def create_processor() -> Any:
        processor = create()
        if not hasattr(processor, _EQUIPPED):
            Requests(processor, model)
        return processor

    if waiting is not None:
        put = waiting.put

        @functools.wraps(put)
        def put_named(state: Any, *args: Any, **kwargs: Any) -> None:
            memory = chosen(model)
            setattr(state, _MEMORY, _first(model) if memory is UNSAID else memory)
            put(state, *args, **kwargs)

        waiting.put = put_named
    manager.add_request, manager.add_requests = add_one, add_many
    manager._create_batch_processor = create_processor
    setattr(manager, _EQUIPPED, True)


class Requests:
    """The routes of the requests that one batch processor serves.

    Args:
        processor: transformers' batch processor; its scheduler, cache and inputs are wrapped.
        model: which it runs. Its memories may change between any two passes.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self._model = model
        self._io = processor.inputs_and_outputs
        self._scheduler = scheduler = processor.scheduler
        self._known: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._epochs: list[Epoch] = []
        self._buffers: dict[tuple[str, int], Decision] = {}
        cache = processor.cache
        schedule, inputs = scheduler.schedule_batch, self._io.get_model_kwargs
        add = scheduler.add_waiting_request
        match, register = cache.search_prefix_match, cache.mark_complete_blocks

        @functools.wraps(add)
        def add_waiting_request(state: Any) -> None:
            self._inherit(state)
            add(state)

        @functools.wraps(schedule)
        def schedule_batch(*args: Any, **kwargs: Any) -> Any:
            self.route([*scheduler.waiting_requests.values(), *scheduler.active_requests.values()])
            return schedule(*args, **kwargs)

        @functools.wraps(inputs)
        def get_model_kwargs(*args: Any, **kwargs: Any) -> Any:
            found = inputs(*args, **kwargs)
            self.lay_out(self._batch(), found["input_ids"].shape[1])
            return found

        # Blocks are shared by their tokens alone. What a shard has had a part in is not shared.
        @functools.wraps(match)
        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> Any:
            if getattr(self._known.get(request_id), _APART, True):
                return 0
            return match(request_id, prompt_ids)

        @functools.wraps(register)
        def mark_complete_blocks(state: Any, *args: Any, **kwargs: Any) -> Any:
            return None if getattr(state, _APART, True) else register(state, *args, **kwargs)

        scheduler.add_waiting_request = add_waiting_request
        scheduler.schedule_batch = schedule_batch
        self._io.get_model_kwargs = get_model_kwargs
        cache.search_prefix_match = search_prefix_match
        cache.mark_complete_blocks = mark_complete_blocks
        setattr(processor, _EQUIPPED, self)

    def _inherit(self, state: Any) -> None:
        """A request that begins anew, for want of room, or a child that does, is made afresh."""
        if not hasattr(state, _MEMORY):
            parent = state.request_id.rpartition("__child#")[0]
            old = self._known.get(state.request_id) or self._known.get(parent)
            for name in (_MEMORY, _PLACE, _APART):
                if hasattr(old, name):
                    setattr(state, name, getattr(old, name))

    def route(self, states: Sequence[Any]) -> None:
        """Find out where requests go that have no place yet, or one in a memory that has since
        been replaced. One whose memory was taken off goes on with the unedited model."""
        patches = self._patches()
        by_memory: dict[str, list[Any]] = {}
        for state in states:
            self._known[state.request_id] = state
            patch = patches.get(getattr(state, _MEMORY, None) or "")
            place: Place | None = getattr(state, _PLACE, None)
            if patch is None:
                setattr(state, _PLACE, None)
                setattr(state, _APART, getattr(state, _APART, False))
            elif place is None or place.epoch is not patch.routing.epoch:
                by_memory.setdefault(getattr(state, _MEMORY), []).append(state)
        for name, some in by_memory.items():
            some.sort(key=lambda state: len(_prompt(state)))
            while some:
                width = len(_prompt(some[-1]))
                count = min(len(some), max(1, _TOKENS_AT_ONCE // max(1, width)))
                self._route_together(name, patches[name], some[-count:])
                del some[-count:]

    def lay_out(self, states: Sequence[tuple[Any, int]], width: int) -> None:
        """Leave the routes of the next packed pass for the model.

        Args:
            states: the requests in their order, and how many tokens of each the pass holds.
            width: tokens of the pass, padding at its end included.
        """
        patches = self._patches()
        epochs = [patch.routing.epoch for patch in patches.values()]
        if epochs != self._epochs:
            # What was captured reads the shards and buffers of memories that are gone.
            self._epochs = epochs
            self._buffers.clear()
            _forget_graphs(self._io)
        for name, patch in patches.items():
            routes, cues = [MAIN] * width, [NO_CUE] * width
            at = 0
            for state, tokens in states:
                place: Place | None = getattr(state, _PLACE, None)
                on = patch.routing.state.enabled
                if on and place is not None and place.epoch is patch.routing.epoch:
                    routes[at : at + tokens] = [place.shard] * tokens
                    cues[at : at + tokens] = [place.cue] * tokens
                at += tokens
            patch.routing.state.packed = self._decision(name, patch, routes, cues)

    def _route_together(self, name: str, patch: Patch, states: Sequence[Any]) -> None:
        prompts = [_prompt(state) for state in states]
        width = max(map(len, prompts))
        device = self._model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with use_memory(self._model, name), _unpaged(self._model.config):
            found = patch.routing.decision_for(self._model, ids.to(device), mask.to(device))
        for state, shard, cue in zip(states, found.route.tolist(), found.cue.tolist(), strict=True):
            setattr(state, _PLACE, Place(patch.routing.epoch, shard, cue))
            setattr(state, _APART, shard != MAIN or getattr(state, _APART, False))

    def _decision(self, name: str, patch: Patch, routes: list[int], cues: list[int]) -> Decision:
        """These values where the model's tensors are, at places that captured graphs may read."""
        found = Decision(torch.tensor(routes, dtype=torch.int32), torch.tensor(cues))
        device = patch.dual.bank.values.device
        if device.type == "cpu":
            return found
        # One pair of in- and outputs is filled while the other is in use.
        key = name, int(getattr(self._io, "current_pair", 0))
        if key not in self._buffers or len(self._buffers[key].route) < len(routes):
            length = max(len(routes), int(self._io.cache.max_batch_tokens))
            self._buffers[key] = uncued(torch.full((length,), MAIN, device=device).int())
        kept = Decision(*(values[: len(routes)] for values in self._buffers[key]))
        stream = self._io.compute_stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for there, values in zip(kept, found, strict=True):
                there.copy_(values.pin_memory(), non_blocking=True)
        return kept

    def _batch(self) -> list[tuple[Any, int]]:
        pairs = getattr(self._io, "io_pairs", None)
        host = self._io if pairs is None else pairs[self._io.current_pair].host_io
        return [(future.state, future.query_length) for future in host.requests_in_batch]

    def _patches(self) -> dict[str, Patch]:
        installed: Installed | None = installed_in(self._model)
        return {} if installed is None else dict(installed.patches)


@contextmanager
def _choosing(model: Any, memory: Any) -> Iterator[None]:
    """Within the block added requests use this memory."""
    if memory is UNSAID:
        yield
        return
    if memory is not None:
        memories_of(model).named(memory)
    token = choose(model, memory)
    try:
        yield
    finally:
        unchoose(token)


@contextmanager
def _unpaged(config: Any) -> Iterator[None]:
    """Within the block attention does without the paged cache, where it would insist on it."""
    paged = config._attn_implementation
    config._attn_implementation = str(paged).removeprefix("paged|")
    try:
        yield
    finally:
        config._attn_implementation = paged


def _first(model: Any) -> str | None:
    installed = installed_in(model)
    return None if installed is None else next(iter(installed.patches))


def _prompt(state: Any) -> list[int]:
    """A request's own prompt: one that was put aside counts what it wrote among its tokens."""
    tokens: list[int] = state.initial_tokens
    return tokens[: state._true_initial_tokens] if state._true_initial_tokens else tokens


def _forget_graphs(io: Any) -> None:
    for one in [pair.device_io for pair in getattr(io, "io_pairs", [])] or [io]:
        one.graphs = type(one.graphs)()
