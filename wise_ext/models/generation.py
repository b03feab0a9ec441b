"""What `model.generate` needs beyond the hooks of a patched model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.memory import MAIN, Decision, uncued
from wise_ext.models.routing import RouteKnown, Routing


def wrap_generate(model: Any, routing: Routing) -> Callable[..., Any]:
    """A `generate` that routes by the whole prompt and holds the route to the end.

    Most of that is the hooks' work. This adds what they cannot see: a generation without a cache,
    where every step looks like a new prompt; an assistant's candidates that come with the prompt;
    a prompt that is fed in chunks; a later turn of a dialogue, which goes on with a used cache and
    is routed by itself.
    """
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        routing.release(cache)
        state = routing.state
        outer = state.forced
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompt = kwargs.get("inputs_embeds") if ids is None else ids
        width = int(prompt.shape[1]) if isinstance(prompt, Tensor) else None
        with routing.generation(width, cache):
            try:
                decided = state.forced is not None or routing.holds(cache)
                if ids is not None and not decided and _chunked(model, kwargs):
                    mask = kwargs.get("attention_mask")
                    state.forced = routing.course(decision_of(model, routing, ids, mask))
                return original(*args, **kwargs)
            finally:
                state.forced = outer

    return generate


@torch.no_grad()
def decision_of(
    model: nn.Module, routing: Routing, input_ids: Tensor, attention_mask: Tensor | None
) -> Decision:
    """Run the model as far as its router's layer; what that decides."""
    main = torch.full((input_ids.shape[0],), MAIN, dtype=torch.int32, device=input_ids.device)
    if routing.router is None or not routing.state.enabled:
        return uncued(main)
    positions = {}
    if attention_mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
        # Some models count pads as positions unless told, as generate tells them.
        positions["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    routing.only_routes = True
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
    except RouteKnown:
        pass
    finally:
        routing.only_routes = False
    return routing.state.decision or uncued(main)


def _chunked(model: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("prefill_chunk_size") is not None:
        return True
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return getattr(config, "prefill_chunk_size", None) is not None
