"""Routes of prompts, decided before the engine schedules them.

The whole prompt decides, and vLLM may never compute it in one pass: it comes in chunks, and its
beginning may be taken from the prefix cache, whose blocks must not be shared between routes. So the
router has a small model of its own: transformers' embeddings and first block, read from the same
checkpoint, on the CPU. It decides as ``generate`` does, by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

from wise_ext.errors import ModelError
from wise_ext.integrations.vllm.requests import MAIN_ROUTE, RequestRoute
from wise_ext.memory import SideMemory
from wise_ext.models import decide_routes, fingerprint, patch
from wise_ext.storage import StoredMemory, check_base

# Samples of one prompt are requests of their own.
_REMEMBERED = 64


class PromptRouter:
    """Routes prompts of a served model.

    Weights are mapped, not read: of a large checkpoint only the pages that the fingerprint samples
    and the blocks up to the router's come into memory.

    Args:
        stored: the memory that is served.
        config: vLLM's ``ModelConfig``: model, revision, dtype.

    Raises:
        ModelError: transformers cannot load the model, or it has no such layer.
        StorageError: the memory was made for another model.
    """

    def __init__(self, stored: StoredMemory, config: Any) -> None:
        name = str(config.model)
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype="auto",
            )
        except Exception as error:  # transformers raises whatever the file's own parser raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"prompts are routed by transformers' form of '{name}', which cannot be loaded: "
                f"{reason}"
            ) from error
        check_base(stored.base, fingerprint(model), name)
        _compute_in(model.eval(), stored.memory, config.dtype)
        patch(model, stored.memory)
        self._model = model
        self._found = lru_cache(_REMEMBERED)(self._decide)

    def route(self, prompt: Sequence[int]) -> RequestRoute:
        """The route of a prompt, given as token ids."""
        return self._found(tuple(prompt)) if prompt else MAIN_ROUTE

    def forget(self) -> None:
        """Decide anew about prompts that were seen before."""
        self._found.cache_clear()

    def _decide(self, prompt: tuple[int, ...]) -> RequestRoute:
        decision = decide_routes(self._model, torch.tensor([prompt]))
        return RequestRoute(int(decision.route), int(decision.cue))


def _compute_in(model: nn.Module, memory: SideMemory, dtype: torch.dtype) -> None:
    """Bring the embeddings and blocks up to the router's to the dtype that is served."""
    decider = memory.key_layer if memory.routing == "key" else memory.layer
    path, number = _block_of(str(decider))
    body = path.rpartition(".")[0] + "."
    for name, parameter in model.named_parameters():
        block = name.removeprefix(path + ".").partition(".")[0] if name.startswith(path) else "0"
        if name.startswith(body) and int(block) <= number:
            parameter.data = parameter.data.to(dtype)


def _block_of(layer: str) -> tuple[str, int]:
    """The path of the list of blocks that a layer is in, and the number of its block."""
    parts = layer.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        raise ModelError(f"cannot tell which block '{layer}' is in: its path has no number")
    return ".".join(parts[:place]), int(parts[place])
