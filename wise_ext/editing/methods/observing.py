"""Where the edited block is, and what a model shows of one text up to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from wise_ext.editing.anatomy import run_until_stopped, watch
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.models.table import get_module


@torch.no_grad()
def observe(engine: SuffixEngine, layer: str, text: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a text's tokens put into the projection ``layer`` fp32 [t, d_in], and what the engine's
    layer puts out, fp32 [t, d_model]; nothing above that runs."""
    seen: dict[str, Tensor] = {}
    last = engine.blocks[engine.index] if engine.additive else engine.projection
    with ExitStack() as stack:
        module = get_module(engine.model, layer)
        stack.enter_context(watch(module, "key", seen, entering=True))
        stack.enter_context(watch(last, "state", seen, entering=False, stop=True))
        run_until_stopped(engine.model, torch.tensor([list(text)], device=engine.device))
    key, state = (seen[name].reshape(len(text), -1).float() for name in ("key", "state"))
    return key, state


def around_block(layer: str) -> tuple[str, int, str]:
    """The path of the list of blocks that ``layer`` passes through, its block's number in it, and
    the path of the projection in that block."""
    parts = layer.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])
