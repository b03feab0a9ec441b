"""What decides where a request goes in vLLM, without vLLM: settings, routing, admission."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.served import KNOWN, UNKNOWN, Served
from wise_ext.errors import ConfigError, ModelError, StorageError
from wise_ext.integrations.vllm.admission import Admission
from wise_ext.integrations.vllm.prompts import PromptRouter
from wise_ext.integrations.vllm.requests import (
    MAIN_ROUTE,
    route_of,
)
from wise_ext.integrations.vllm.settings import memory_directory, serve, served_here
from wise_ext.storage import load_memory_dir, save_memory


def model_config(served: Served, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(
        model=str(served.model), revision=None, trust_remote_code=False, dtype=dtype
    )


def config(**changes: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at; changes are made to the sections named."""
    whole = SimpleNamespace(
        additional_config={},
        lora_config=None,
        speculative_config=None,
        model_config=SimpleNamespace(runner_type="generate", quantization=None),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_ubatching=False,
        ),
    )
    for section, fields in changes.items():
        part = getattr(whole, section)
        setattr(whole, section, SimpleNamespace(**((vars(part) if part else {}) | fields)))
    return whole


# Settings


def test_where_the_memory_is() -> None:
    given_ = {"other": 1, "wise_ext": {"memory": "/a/b"}}
    assert memory_directory(given_, {"WISE_EXT_MEMORY": "/c"}) == Path("/a/b")
    assert memory_directory({}, {"WISE_EXT_MEMORY": "/c"}) == Path("/c")
    assert memory_directory(object(), {"WISE_EXT_MEMORY": "c"}) == Path("c").absolute()
    assert memory_directory({}, {"WISE_EXT_MEMORY": ""}) is None
    assert memory_directory({}, {}) is None


@pytest.mark.parametrize("wrong", ["/a", {}, {"memory": 3}, {"memory": ""}, {"memori": "/a"}])
def test_a_setting_of_another_form_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r'give \{"wise_ext": \{"memory": "DIRECTORY"\}\}'):
        memory_directory({"wise_ext": wrong}, {})


def test_the_memory_is_noted_for_workers_and_for_compiled_code(served: Served) -> None:
    vllm = config()
    vllm.additional_config = {"mine": 1}
    found = serve(vllm, {"WISE_EXT_MEMORY": str(served.memory)})
    assert found is not None
    checksum = found.stored.checksum
    noted = {"memory": str(served.memory), "checksum": checksum}
    assert vllm.additional_config == {"mine": 1, "wise_ext": noted}
    here = served_here(vllm)
    assert here is not None and here.stored.checksum == checksum
    vllm.additional_config["wise_ext"]["checksum"] = "0"
    with pytest.raises(StorageError, match="saved anew while vLLM started"):
        served_here(vllm)
    assert serve(config(), {}) is None
    assert served_here(config()) is None


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("model_config", {"runner_type": "pooling"}, "pooling"),
        ("model_config", {"quantization": "awq"}, "--quantization"),
        ("parallel_config", {"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ("parallel_config", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill context"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode context"),
        ("parallel_config", {"use_ubatching": True}, "--enable-dbo"),
        ("speculative_config", {"enable_adaptive_verification": True}, "adaptive verification"),
        ("lora_config", {"max_loras": 1}, "--enable-lora"),
    ],
)
def test_what_a_memory_cannot_be_served_with(
    served: Served, section: str, change: dict[str, Any], said: str
) -> None:
    environment = {"WISE_EXT_MEMORY": str(served.memory)}
    with pytest.raises(ConfigError, match=said):
        serve(config(**{section: change}), environment)
    serve(config(**{section: change}), {})  # no memory, no objection


def test_another_plugins_configuration_object_is_refused(served: Served) -> None:
    vllm = config()
    vllm.additional_config = object()
    with pytest.raises(ConfigError, match="object of another plugin"):
        serve(vllm, {"WISE_EXT_MEMORY": str(served.memory)})


# Admission


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_routed_as_generate_routes_them(served: Served, dtype: torch.dtype) -> None:
    router = PromptRouter(load_memory_dir(served.memory), model_config(served, dtype))
    routes = [router.route(row) for row in KNOWN + UNKNOWN]
    assert routes == [(0, 1000), (1, 1001), (2, 0), (3, 1003), *[MAIN_ROUTE] * 3]
    assert router.route([]) == MAIN_ROUTE


def test_only_what_the_router_needs_is_brought_to_the_served_dtype(served: Served) -> None:
    router = PromptRouter(load_memory_dir(served.memory), model_config(served, torch.bfloat16))
    dtypes = {name: value.dtype for name, value in router._model.named_parameters()}
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["model.layers.1.mlp.up_proj.weight"] == torch.float32


def test_a_model_that_cannot_be_loaded_is_named(served: Served, tmp_path: Path) -> None:
    missing = model_config(served)
    missing.model = str(tmp_path)
    with pytest.raises(ModelError, match="prompts are routed by transformers' form of"):
        PromptRouter(load_memory_dir(served.memory), missing)


def request_of(prompt: list[int] | None, **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": prompt,
        "prompt_embeds": None,
        "mm_features": None,
        "sampling_params": SimpleNamespace(extra_args=None),
        "cache_salt": None,
        "resumable": False,
    }
    return SimpleNamespace(**(fields | changes))


def test_requests_leave_the_door_with_their_routes(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    stored = load_memory_dir(served.memory)
    door = Admission(stored, model_config(served))
    shared = SimpleNamespace(extra_args={"mine": 1, "wise_ext": {"shard": 2, "cue": 0}})
    first = door.admit(request_of(KNOWN[1], sampling_params=shared, cache_salt="secret"))
    assert route_of(first.sampling_params.extra_args) == (1, 1001)
    assert first.sampling_params.extra_args["mine"] == 1
    assert first.cache_salt == f"secret\nwise_ext:{stored.checksum}:1:1001"
    other = door.admit(request_of(UNKNOWN[1], sampling_params=shared))
    assert other.sampling_params.extra_args == {"mine": 1}  # a forged route is dropped
    assert other.cache_salt is None
    assert shared.extra_args["wise_ext"] == {"shard": 2, "cue": 0}  # others may use it, too
    pooled = request_of(KNOWN[1], sampling_params=None)
    assert door.admit(pooled) is pooled
    for unseen in ({"mm_features": [object()]}, {"prompt_embeds": torch.zeros(2, 2)}):
        admitted = door.admit(request_of(KNOWN[1], **unseen))
        assert admitted.sampling_params.extra_args is None
    assert caplog.text.count("images and embeddings use main memory") == 1
    with pytest.raises(ConfigError, match="streams its prompt in"):
        door.admit(request_of(KNOWN[1], resumable=True))


def test_a_memory_of_another_model_is_refused(served: Served, tmp_path: Path) -> None:
    stored = load_memory_dir(served.memory)
    save_memory(tmp_path, stored.memory, {}, [], {"name": "x", "fingerprint": "0" * 64})
    with pytest.raises(StorageError, match="made for 'x'"):
        PromptRouter(load_memory_dir(tmp_path), model_config(served))
