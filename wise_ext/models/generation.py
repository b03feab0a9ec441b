"""What `model.generate` needs beyond the hooks of a patched model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from wise_ext.models.installed import installed_in
from wise_ext.models.routing import Routing
from wise_ext.models.scopes import UNSAID, chosen, use_memory


def wrap_generate(model: Any) -> Callable[..., Any]:
    """A `generate` that routes by the whole prompt and holds the route to the end.

    Most of that is the hooks' work. This adds what they cannot see: which memory a row is to use;
    a generation without a cache, where every step looks like a new prompt; an assistant's
    candidates that come with the prompt; a prompt that is fed in chunks; a later turn of a
    dialogue, which goes on with a used cache and is routed by itself.
    """
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, memory: Any = UNSAID, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompt = kwargs.get("inputs_embeds") if ids is None else ids
        width = int(prompt.shape[1]) if isinstance(prompt, Tensor) else None
        with ExitStack() as stack:
            if memory is UNSAID:
                memory = chosen(model)
            # A call that waited for its turn may find the memories gone.
            installed = installed_in(model)
            if memory is not UNSAID and not (memory is None and installed is None):
                stack.enter_context(use_memory(model, memory))
            for patch in installed.patches.values() if installed is not None else ():
                routing = patch.routing
                routing.release(cache)
                stack.enter_context(routing.generation(width, cache))
                decided = routing.state.forced is not None or routing.holds(cache)
                if ids is not None and not decided and _chunked(model, kwargs):
                    mask = kwargs.get("attention_mask")
                    stack.enter_context(_decided(model, routing, ids, mask))
            return original(*args, **kwargs)

    return generate


@contextmanager
def _decided(model: Any, routing: Routing, ids: Tensor, mask: Tensor | None) -> Iterator[None]:
    """Within the block the rows go where their whole prompts send them."""
    state = routing.state
    outer, state.forced = state.forced, routing.course(routing.decision_for(model, ids, mask))
    try:
        yield
    finally:
        state.forced = outer


def _chunked(model: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("prefill_chunk_size") is not None:
        return True
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return getattr(config, "prefill_chunk_size", None) is not None
