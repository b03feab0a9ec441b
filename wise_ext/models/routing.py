"""Routes through a model's forward passes: decided at prefill, held while decoding.

The route of a generation travels on its cache object, so that generations which take turns on one
model keep theirs, and a copy of a cache keeps its route. Everything here consists of tensor
operations without a look at their values where torch.compile traces it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.errors import ModelError
from wise_ext.memory import MAIN, NO_CUE, Decision, Router, uncued
from wise_ext.models.real_tokens import first_tokens, real_tokens
from wise_ext.nn import Course, Glance, RouteState

# Attributes of a cache begin like this.
_HELD = "_wise_ext_route"
_CACHED = "routes on the cache"
_patches = itertools.count(1)


class RouteKnown(Exception):
    """Raised inside a forward pass that was run for its routes alone."""


class Epoch:
    """The time for which one memory of a patch is there: routes name its shards until it is over.
    A copy of a cache is of the same epoch, not of a copy of it."""

    def __init__(self, patch: int) -> None:
        self.patch = patch
        self.over = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Epoch:
        return self

    def next(self) -> Epoch:
        """End this one, and begin another of the same patch."""
        self.over = True
        return Epoch(self.patch)


class Held:
    """A course some generation keeps, a look at its route, and the epoch it belongs to."""

    def __init__(self, epoch: Epoch, course: Course, glance: Glance | None) -> None:
        self.epoch = epoch
        self.course = course
        self.glance = glance


class Routing:
    """The hooks of one patched model.

    Args:
        model: the patched model; only its configuration is read.
        body: the module that holds the blocks; its forward pass is what a route belongs to.
        router: None without shards: every row uses main memory.
        state: where the routes of the running forward pass are left for the DualLinear.
        name: of the memory; each keeps its routes on a cache under its own.
    """

    def __init__(
        self,
        model: nn.Module,
        body: nn.Module,
        router: Router | None,
        state: RouteState,
        name: str,
    ) -> None:
        self.state = state
        self.router = router
        self.only_routes = False
        # A route names shards of this memory; a later one must not take it for its own.
        self.epoch = Epoch(next(_patches))
        self._mark = f"{_HELD}_{name}"
        self._names = tuple(inspect.signature(body.forward).parameters)
        self._caches_by_default = bool(getattr(getattr(model, "config", None), "use_cache", True))
        self._held: Held | None = None
        self._fresh: Tensor | None = None
        self._generation: _Generation | None = None
        self._keeper: Any = None

    def renew(self, router: Router) -> None:
        """Route by what this router knows, one of the kind there is; routes that were held name
        shards that are gone."""
        assert self.router is not None
        self.router.become(router)
        self.epoch = self.epoch.next()
        self.state.reset()
        self._forget()

    def close(self) -> None:
        """The memory is gone, and with it the shards that held routes name."""
        self.epoch = self.epoch.next()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the body: hold, force, or make ready to decide."""
        self._forget()
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given = inputs.get("input_ids")
        if given is None:
            given = inputs.get("inputs_embeds")
        if given is None:
            return
        batch, tokens = given.shape[0], given.shape[1]
        state = self.state
        if "cu_seq_lens_q" in inputs and "cache" in inputs:
            self._take_packed(tokens)
            return
        if not state.enabled or self.router is None or state.admitted is False:
            main = torch.full((batch,), MAIN, dtype=torch.int32, device=given.device)
            state.decision = uncued(main)
            return
        cache = inputs.get("past_key_values")
        self._keeper = cache
        past: int | Tensor = 0
        if cache is not None:
            past = cache.get_seq_length()
        elif self._generation is not None and not self._uses_cache(inputs):
            self._keeper = self._generation
        if state.forced is not None:
            self._settle(_course_of(state.forced, batch, given.device, "forced routes"))
            return
        held = self._held_by(self._keeper)
        start = 0 if self._generation is None else self._generation.start
        if held is not None:
            due = False if cache is None else _begins(past, start, tokens)
            if due is False:
                # No copy to another device: what is held lies where the cache was filled.
                device = held.course.decision.route.device
                state.settle(_course_of(held.course, batch, device, _CACHED), held.glance)
                if not torch.compiler.is_compiling():
                    held.glance = state.glance
                return
            if due is None and isinstance(past, Tensor):
                # A used static cache that may have been reset: chosen without waiting for it.
                self._held, self._fresh = held, past == start
        real = real_tokens(inputs.get("attention_mask"), batch, tokens, given.device, past)
        if self._generation is not None and isinstance(past, int) and past == start:
            # An assistant's candidates come along with the prompt, but are no part of it.
            width = self._generation.prompt_tokens
            if width is not None and 0 < width - past < tokens:
                real = real & (torch.arange(tokens, device=real.device) < width - past)
        if state.limits is not None:
            limits = rows_of(state.limits.to(given.device), batch, "prompt lengths")
            real = first_tokens(real, limits)
        state.await_decision(real)

    def decide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the router's layer: its input decides, where a decision is due."""
        real = self.state.real
        if not self.state.decide or real is None or self.router is None:
            return
        a: Tensor = args[0] if args else next(iter(kwargs.values()))
        batch, tokens = real.shape
        decision = self.router.decide(a.detach().reshape(batch, tokens, -1), real.to(a.device))
        if isinstance(self.state.admitted, Tensor):
            admitted = rows_of(self.state.admitted.to(a.device), batch, "names of memories")
            decision = Decision(
                torch.where(admitted, decision.route, MAIN),
                torch.where(admitted, decision.cue, NO_CUE),
            )
        if self._fresh is not None and self._held is not None:
            device = decision.route.device
            fresh = self._fresh.to(device)
            kept = _course_of(self._held.course, batch, device, _CACHED).decision
            pairs = zip(decision, kept, strict=True)
            decision = Decision(*(torch.where(fresh, new, old) for new, old in pairs))
        self._settle(self.course(decision))
        if self.only_routes:
            raise RouteKnown

    def end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook behind the body, also after an error: the route stays on a cache the model made."""
        course = self.state.course
        if course is not None and self._keeper is None:
            cache = _cache_in(output)
            if cache is not None:
                self._hold(cache, course)
        self._forget()

    def course(self, decision: Decision) -> Course:
        """A decision with the cues that its numbers stand for."""
        cues = None if self.router is None else self.router.cues
        return Course(decision, None if cues is None else cues.vectors(decision.cue))

    @torch.no_grad()
    def decision_for(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Decision:
        """Run the model as far as the router's layer; what that decides about these prompts,
        `[B, T]`."""
        main = torch.full((input_ids.shape[0],), MAIN, dtype=torch.int32, device=input_ids.device)
        if self.router is None or not self.state.enabled or self.state.admitted is False:
            return uncued(main)
        positions = {}
        takes = inspect.signature(model.forward).parameters
        if attention_mask is not None and "position_ids" in takes:
            # Some models count pads as positions unless told, as generate tells them.
            positions["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        self.only_routes = True
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        except RouteKnown:
            pass
        finally:
            self.only_routes = False
        return self.state.decision or uncued(main)

    def release(self, cache: Any) -> None:
        """Forget the route on a cache that is empty again: what comes next is a new prompt."""
        if getattr(cache, self._mark, None) is not None and int(cache.get_seq_length()) == 0:
            setattr(cache, self._mark, None)

    def holds(self, cache: Any) -> bool:
        """Whether a cache carries a route of this patch."""
        return self._held_by(cache) is not None

    @contextmanager
    def generation(self, prompt_tokens: int | None, cache: Any = None) -> Iterator[None]:
        """One call of generate.

        Args:
            prompt_tokens: the width of its prompts (with pads), if that is known.
            cache: what it goes on from. Tokens beyond it are a new turn, which decides for itself;
                a single one goes on with the turn there is.
        """
        start = 0 if cache is None else int(cache.get_seq_length())
        outer, self._generation = self._generation, _Generation(prompt_tokens, start)
        try:
            yield
        finally:
            self._generation = outer

    def _take_packed(self, tokens: int) -> None:
        """The tokens of many requests in one row: where each goes was found out beforehand."""
        packed = self.state.packed
        if packed is None or packed.route.shape[0] != tokens:
            raise ModelError(
                "continuous batching was set up before the side memory was loaded: make another "
                "manager (model.destroy_cached_continuous_batching_manager() ends a kept one)"
            )
        if torch.compiler.is_compiling():
            self.state.settle(self.course(packed))
            return
        # One look, before the cues of all tokens are made for nothing.
        glance = Glance(packed.route)
        course = self.course(packed) if glance.routed() else Course(packed, None)
        self.state.settle(course, glance)

    def _uses_cache(self, inputs: dict[str, Any]) -> bool:
        wanted = inputs.get("use_cache")
        return self._caches_by_default if wanted is None else bool(wanted)

    def _held_by(self, keeper: Any) -> Held | None:
        held: Held | None = getattr(keeper, self._mark, None)
        # In words that stay true when an epoch follows another: compiled code relies on them.
        if held is None or held.epoch.patch != self.epoch.patch or held.epoch.over:
            return None
        return held

    def _settle(self, course: Course) -> None:
        self.state.settle(course)
        self.state.decision = course.decision
        if self._keeper is not None:
            self._hold(self._keeper, course)

    def _hold(self, keeper: Any, course: Course) -> None:
        glance = None if torch.compiler.is_compiling() else self.state.glance
        setattr(keeper, self._mark, Held(self.epoch, course, glance))

    def _forget(self) -> None:
        self.state.clear()
        self._keeper = None
        self._held = None
        self._fresh = None


class _Generation:
    """One call of generate; without a cache object it keeps the route as that would."""

    def __init__(self, prompt_tokens: int | None, start: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.start = start


def rows_of(values: Tensor, batch: int, what: str) -> Tensor:
    """Bring one value a row, `[n, ...]`, to `[batch, ...]`: rows multiply when beams or samples do.

    Raises:
        ModelError: `batch` is not a multiple of n.
    """
    count = values.shape[0]
    if count == batch:
        return values
    if count == 0 or batch % count != 0:
        raise ModelError(f"there are {count} {what} for a batch of {batch} rows: give one a row")
    rest = values.shape[1:]
    return values.unsqueeze(1).expand(count, batch // count, *rest).reshape(batch, *rest)


def _course_of(course: Course, batch: int, device: torch.device, what: str) -> Course:
    """A course for every row of a batch, on this device; see `rows_of`."""
    decision, cue = course
    rows = Decision(*(rows_of(values.to(device), batch, what) for values in decision))
    return Course(rows, None if cue is None else rows_of(cue.to(device), batch, what))


def _begins(past: int | Tensor, start: int, tokens: int) -> bool | None:
    """Whether tokens behind a cache of this length begin a prompt or a turn, which a single one
    behind others does not; None where looking would cost or break a graph."""
    if not isinstance(past, Tensor):
        # Spelled out, so that torch.compile makes it a guard and not a symbol.
        return True if past == start and (start == 0 or tokens > 1) else False  # noqa: SIM210
    if torch.compiler.is_compiling() or past.device.type != "cpu":
        return False if tokens == 1 else None
    return int(past) == start and (start == 0 or tokens > 1)


def _cache_in(output: Any) -> Any:
    """The cache a model returns, if it returns one: by name, or somewhere in a tuple."""
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache if hasattr(cache, "get_seq_length") else None
