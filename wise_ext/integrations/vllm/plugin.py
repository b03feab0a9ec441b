"""Where vLLM 0.32 and 0.33 are taken hold of.

Three methods of theirs are wrapped, in whichever process calls them: the executor's making (a
memory is read and checked before a model is loaded), the engine's first look at a request (it is
routed) and the making of a worker (its model runner tells who is in a batch). Without a memory each
does what it did.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from wise_ext.integrations.vllm.admission import ADMISSION, Admission
from wise_ext.integrations.vllm.settings import serve, served_here
from wise_ext.integrations.vllm.worker import attach

# Below vLLM's own logger, so that lines come out where its lines do.
logger = logging.getLogger("vllm.plugins.wise_ext")

_INSTALLED = "_wise_ext_installed"


def install() -> None:
    """Wrap the three methods, once a process."""
    if getattr(Executor, _INSTALLED, False):
        return
    setattr(Executor, _INSTALLED, True)
    _wrap(Executor, "__init__", _begin)
    _wrap(EngineCore, "preprocess_add_request", _admit)
    _wrap(WorkerWrapperBase, "init_device", _init_device)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _begin(original: Callable[..., Any], self: Any, vllm_config: Any) -> None:
    served = serve(vllm_config)
    if served is not None:
        setattr(self, ADMISSION, Admission(served.stored, vllm_config.model_config))
        logger.info("wise-ext serves %s", served.summary)
    original(self, vllm_config)


def _admit(original: Callable[..., Any], self: Any, request: Any) -> Any:
    admission: Admission | None = getattr(self.model_executor, ADMISSION, None)
    return original(self, request if admission is None else admission.admit(request))


def _init_device(original: Callable[..., Any], self: Any) -> None:
    original(self)
    served = served_here(self.vllm_config)
    if served is not None:
        attach(self.worker, served.stored.memory)
