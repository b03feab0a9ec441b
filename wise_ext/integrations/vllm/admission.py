"""The engine's door: every request leaves it with its route."""

from __future__ import annotations

import copy
import logging
from typing import Any

from wise_ext.errors import ConfigError
from wise_ext.integrations.vllm.prompts import PromptRouter
from wise_ext.integrations.vllm.requests import MAIN_ROUTE, marked, salted
from wise_ext.storage import StoredMemory

#: Under which attribute an executor keeps its own.
ADMISSION = "_wise_ext_admission"

logger = logging.getLogger("vllm.plugins.wise_ext")


class Admission:
    """Routes requests as they come in.

    Args:
        stored: the memory that is served.
        config: vLLM's ``ModelConfig``.

    Raises:
        ModelError: see ``PromptRouter``.
        StorageError: see ``PromptRouter``.
    """

    def __init__(self, stored: StoredMemory, config: Any) -> None:
        self._router = PromptRouter(stored, config)
        self._checksum = stored.checksum
        self._told = False

    def forget(self) -> None:
        """Decide anew about prompts that were seen before."""
        self._router.forget()

    def admit(self, request: Any) -> Any:
        """A copy of an ``EngineCoreRequest`` with its route, and with a salt of its own for the
        prefix cache where it goes to a shard.

        Raises:
            ConfigError: the request's prompt is still being streamed in.
        """
        if request.resumable:
            raise ConfigError(
                f"request {request.request_id} streams its prompt in, and a memory is routed by "
                "whole prompts: send it at once"
            )
        if request.sampling_params is None:
            return request
        route = MAIN_ROUTE
        if request.mm_features or request.prompt_embeds is not None:
            if not self._told:
                logger.warning("wise-ext routes text alone: images and embeddings use main memory")
            self._told = True
        else:
            route = self._router.route(request.prompt_token_ids or ())
        # Samples of one prompt share their parameters.
        request, params = copy.copy(request), copy.copy(request.sampling_params)
        params.extra_args = marked(params.extra_args, route)
        request.sampling_params = params
        request.cache_salt = salted(request.cache_salt, route, self._checksum)
        return request
