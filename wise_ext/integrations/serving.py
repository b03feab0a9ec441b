"""An edited model behind the OpenAI-compatible server of transformers.

The server is transformers' own (``transformers serve``); this gives it one model that is there
already, whose memories clients choose by the name of the model they ask: ``NAME`` is the model with
its first memory, ``NAME:MEMORY`` with that one, ``NAME:unedited`` without any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    CBGenerateManager,
    GenerateManager,
    GenerationState,
)

from wise_ext.editing.loading import load_memory
from wise_ext.errors import ConfigError, ModelError, WiseError
from wise_ext.models.continuous import wrap_continuous_batching
from wise_ext.models.patch import is_patched, memories, unload
from wise_ext.models.scopes import choose

UNEDITED = "unedited"
# Tokens of a page, of a pass and of all requests.
_CPU_PAGE, _CPU_PASS, _CPU_CACHE = 32, 512, 16_384


def serve_app(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    continuous_batching: bool = True,
    batching: ContinuousBatchingConfig | None = None,
    manage: bool = False,
) -> FastAPI:
    """A FastAPI application that serves a model with its memories.

    Args:
        model: a patched model, or one that is yet to be; memories may change while it is served.
        tokenizer: its tokenizer.
        name: what clients call it.
        continuous_batching: serve many requests together; else one after another.
        batching: settings of that.
        manage: let clients add and remove memories (``POST /v1/load_memory`` and
            ``/v1/unload_memory``): they may then name any directory of this machine.

    Raises:
        ConfigError: a name with a colon, or a memory called "unedited".
    """
    check_names(name, memories(model))
    if not is_patched(model):
        # Memories may come later, and must find requests that can be routed.
        model.init_continuous_batching = wrap_continuous_batching(model)
    served = ServedModel(model, tokenizer, name)
    state = ServedState(served, continuous_batching, batching)
    app = build_server(
        served,
        _named(ChatCompletionHandler)(served, state),
        completion_handler=_named(CompletionHandler)(served, state),
        response_handler=_named(ResponseHandler)(served, state),
        transcription_handler=TranscriptionHandler(served, state),
        systemone_handler=_named(SystemOneHandler)(served, state),
        generation_state=state,
    )
    app.exception_handler(HTTPException)(_told)
    if manage:
        _add_management(app, served, state)
    return app


def run_server(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    host: str,
    port: int,
    manage: bool,
    continuous_batching: bool,
    cache_tokens: int | None = None,
    pass_tokens: int | None = None,
) -> None:
    """Serve until interrupted; see ``serve_app``.

    Args:
        model: a patched model.
        tokenizer: its tokenizer.
        name: what clients call it.
        host: address to listen at.
        port: port.
        manage: let clients add and remove memories.
        continuous_batching: serve many requests together.
        cache_tokens: how many tokens of all requests are kept; see ``batching_of``.
        pass_tokens: how many one pass takes at most.
    """
    app = serve_app(
        model,
        tokenizer,
        name,
        continuous_batching=continuous_batching,
        batching=batching_of(model, cache_tokens, pass_tokens),
        manage=manage,
    )
    # They say every request.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def batching_of(
    model: Any, cache_tokens: int | None = None, pass_tokens: int | None = None
) -> ContinuousBatchingConfig:
    """Settings of continuous batching. On a GPU what is not given follows from its free memory; the
    memory of a CPU machine is not the server's alone: 16,384 tokens are kept, 512 a pass."""
    config = ContinuousBatchingConfig(max_batch_tokens=pass_tokens)
    if model.device.type == "cpu":
        config.page_size = _CPU_PAGE
        config.max_batch_tokens = pass_tokens or _CPU_PASS
        cache_tokens = cache_tokens or _CPU_CACHE
    if cache_tokens is not None:
        config.num_blocks = -(-cache_tokens // config.page_size)
    return config


def check_names(name: str, memory_names: Mapping[str, Any] | set[str]) -> None:
    """Whether clients can tell a model and its memories apart by these names.

    Raises:
        ConfigError: they cannot.
    """
    if ":" in name or not name:
        raise ConfigError(f"a served model cannot be called {name!r}: give it a name without ':'")
    for memory in memory_names:
        if memory == UNEDITED or ":" in memory or not memory:
            raise ConfigError(
                f"a served memory cannot be called {memory!r}: give it another name, without ':'"
            )


class ServedModel(ModelManager):
    """transformers' keeper of models, with one that is loaded and stays.

    Args:
        model: the patched model.
        tokenizer: its tokenizer.
        name: what clients call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        # Memories change one after another.
        self.changing = threading.Lock()
        self.release: Callable[[], None] = lambda: None

    def choose(self, requested: str | None) -> str | None:
        """The memory that a request means by its model's name; None is no memory.

        Raises:
            HTTPException: 404, there is no such model or memory.
        """
        name, _, memory = (requested or self.name).partition(":")
        there = memories(self.model)
        if name == self.name and not memory:
            return next(iter(there), None)
        if name == self.name and memory == UNEDITED:
            return None
        if name != self.name or memory not in there:
            known = ", ".join(entry["id"] for entry in self.get_gen_models())
            raise HTTPException(404, f"no model {requested!r} is served here: there is {known}")
        return memory

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The one model and its tokenizer."""
        return self.model, self.tokenizer

    async def load_model_streaming(self, *args: Any, **kwargs: Any) -> Any:
        """It is loaded."""
        yield f'data: {{"status": "ready", "model": "{self.name}", "cached": true}}\n\n'

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What clients may ask for."""
        names = [self.name, *(f"{self.name}:{m}" for m in [*memories(self.model), UNEDITED])]
        return [{"id": n, "object": "model", "created": 0, "owned_by": "wise-ext"} for n in names]

    def shutdown(self) -> None:
        """The model is its owner's and stays; what generates with it ends."""
        self.release()


class ServedState(GenerationState):
    """transformers' keeper of what generates, for one model whose memories may change.

    Args:
        served: the model.
        continuous_batching: whether requests are served together.
        batching: settings of that.
    """

    def __init__(
        self,
        served: ServedModel,
        continuous_batching: bool,
        batching: ContinuousBatchingConfig | None,
    ) -> None:
        super().__init__(continuous_batching=continuous_batching, cb_config=batching)
        self._one_by_one: OneByOne = OneByOne()  # type: ignore[no-untyped-call]
        self._served = served
        served.release = self.shutdown

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """Whatever name the model is asked by, it is one."""
        return super().get_manager(self._served.name, True) if use_cb else self._one_by_one

    def change(self, action: Callable[[], None]) -> None:
        """Do something to the model between two of its forward passes."""
        manager = self._cb_manager
        batching = manager._cb if isinstance(manager, CBGenerateManager) else None
        with self._served.changing, ExitStack() as paused:
            if batching is not None and batching.is_running():
                paused.enter_context(batching.pause())
            self._one_by_one.submit(action).result()


class OneByOne(GenerateManager):
    """Generation on one thread, which takes over whatever memory a request has chosen."""

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """See transformers."""
        return super().submit(copy_context().run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        return super().async_submit(copy_context().run, fn, *args, **kwargs)


def _named(handler: type) -> type:
    """A handler whose requests choose a memory by the name of their model."""

    class Named(handler):  # type: ignore[misc]
        def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
            served: ServedModel = self.model_manager
            # For as long as this request's task lives.
            choose(served.model, served.choose(body.get("model")))
            body["model"] = body.get("model") or served.name
            return body["model"], served.model, served.tokenizer

    return Named


async def _told(request: Request, error: HTTPException) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    what = {"message": str(error.detail), "type": "invalid_request_error", "code": None}
    return JSONResponse({"error": what}, status_code=error.status_code)


def _add_management(app: FastAPI, served: ServedModel, state: ServedState) -> None:
    @app.post("/v1/load_memory")
    def load(body: dict[str, str]) -> dict[str, str]:
        name, path = body.get("name", ""), body.get("path", "")
        check = body.get("check", "weights")

        def put() -> None:
            load_memory(served.model, Path(path), name, check)

        try:
            check_names(served.name, {name})
            state.change(put)
        except WiseError as error:
            raise HTTPException(400, str(error)) from None
        return {"status": "ok", "model": f"{served.name}:{name}"}

    @app.post("/v1/unload_memory")
    def remove(body: dict[str, str]) -> dict[str, str]:
        try:
            state.change(lambda: unload(served.model, body.get("name", "")))
        except ModelError as error:
            raise HTTPException(404, str(error)) from None
        return {"status": "ok"}
