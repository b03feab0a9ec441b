"""What serves a memory in vLLM, without vLLM: settings, admission, batches, the side memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.served import KNOWN, UNKNOWN, Served
from tests.tiny_models import CUE, make_shard
from wise_ext.errors import ConfigError, ModelError, StorageError
from wise_ext.integrations.vllm.admission import Admission
from wise_ext.integrations.vllm.projection import CueLines, SideProjection
from wise_ext.integrations.vllm.prompts import PromptRouter
from wise_ext.integrations.vllm.requests import (
    MAIN_ROUTE,
    HeldRoutes,
    RequestRoute,
    marked,
    route_of,
    salted,
    token_values,
)
from wise_ext.integrations.vllm.settings import memory_directory, serve, served_here
from wise_ext.integrations.vllm.worker import _follow, attach, find_projection
from wise_ext.memory import Cues, LowRankShard, PackedBank, SideMemory
from wise_ext.storage import load_memory_dir, save_memory

SHAPE = (6, 40)
CUES = Cues(CUE, SHAPE[1])
SHARDS = 3
SOME_ROUTES = st.one_of(
    st.just(MAIN_ROUTE),
    st.builds(RequestRoute, st.integers(0, SHARDS - 1), st.integers(0, 5)),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


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


# Routes on requests


@given(SOME_ROUTES, st.sampled_from([None, {}, {"a": 1}, {"wise_ext": 7}]))
def test_a_route_comes_back_from_a_request(route: RequestRoute, extra: Any) -> None:
    assert route_of(marked(extra, route)) == route
    assert {k: v for k, v in (marked(extra, route) or {}).items() if k != "wise_ext"} == {
        k: v for k, v in (extra or {}).items() if k != "wise_ext"
    }


@given(st.lists(st.tuples(SOME_ROUTES, st.sampled_from([None, "a", "b"])), max_size=6))
def test_salts_are_equal_where_routes_and_given_salts_are(pairs: list[Any]) -> None:
    salts = {salted(given_, route, "c") for route, given_ in pairs}
    assert len(salts) == len(set(pairs))
    assert all(salted(given_, MAIN_ROUTE, "c") == given_ for _, given_ in pairs)


@given(st.lists(st.tuples(st.integers(-1, 9), st.integers(0, 5))), st.integers(0, 9))
def test_token_values_lie_as_the_tokens_do(pairs: list[tuple[int, int]], rest: int) -> None:
    values, counts = [v for v, _ in pairs], [n for _, n in pairs]
    expected = [value for value, count in pairs for _ in range(count)] + [7] * rest
    found = token_values(values, counts, 7, sum(counts) + rest)
    assert found.tolist() == expected


def test_cue_lines_are_given_back() -> None:
    lines = CueLines(3)  # two requests at a time
    assert lines.of([11, 0]) == ([2, 0], [(2, 11)])
    assert lines.of([12, 11]) == ([1, 2], [(1, 12)])
    assert lines.of([12, 12]) == ([1, 1], [])
    assert lines.of([13, 14])[0] in ([1, 2], [2, 1])


# The side memory, over whole lives of requests


def bank_of(low_rank: bool) -> Any:
    shards: list[Any] = [make_shard(SHAPE, seed=i, scale=1.0) for i in range(SHARDS)]
    if low_rank:
        shards[1] = LowRankShard(torch.randn(2, SHAPE[0]), torch.randn(2, SHAPE[1]))
    index = SimpleNamespace()
    memory = SideMemory("l", SHAPE, shards, "key", "k", index)  # type: ignore[arg-type]
    return memory.bank()


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[list[str], list[str], dict[str, int]]]:
    """Steps of an engine: what is over, what comes in or back, and tokens by request."""
    steps = []
    alive: list[str] = []
    waiting = [f"r{i}" for i in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.integers(1, 8))):
        over = [name for name in alive if draw(st.integers(0, 4)) == 0]
        alive = [name for name in alive if name not in over]
        come = [name for name in waiting if draw(st.booleans())]
        waiting = [name for name in waiting if name not in come]
        # A preempted request leaves the batch, and is new to a worker of the second kind.
        again = [name for name in alive if draw(st.integers(0, 5)) == 0]
        alive += come
        batch = draw(st.permutations(alive))[: draw(st.integers(0, 4))]
        steps.append((over, come + again, {name: draw(st.integers(1, 3)) for name in batch}))
    return steps


@pytest.mark.parametrize("low_rank", [False, True])
@given(lives(), st.lists(SOME_ROUTES, min_size=5, max_size=5), st.integers(0, 3))
def test_every_token_gets_its_requests_side_memory(
    low_rank: bool, steps: list[Any], routes: list[RequestRoute], padding: int
) -> None:
    bank = bank_of(low_rank)
    side = SideProjection(bank, CUES, 16, 4, torch.float32, torch.device("cpu"))
    places = side._route.data_ptr(), side._line.data_ptr(), side._table.data_ptr()
    held = HeldRoutes()
    route = {f"r{i}": routes[i] for i in range(5)}
    for over, come, batch in steps:
        held.update(over, [(name, marked(None, route[name])) for name in come])
        if not batch:
            continue
        names, counts = list(batch), list(batch.values())
        side.begin(held.of(names), counts)
        x = torch.randn(sum(counts) + padding, SHAPE[1])
        y = torch.randn(sum(counts) + padding, SHAPE[0])
        expected = y.clone()
        own = [route[name] for name in names for _ in range(batch[name])]
        for token, (shard, cue) in enumerate(own):
            if shard >= 0:
                entering = x[token] + CUES.vectors(torch.tensor([cue]))[0]
                alone = expected[token : token + 1]
                bank.add_side_(alone, entering[None], torch.tensor([shard], dtype=torch.int32))
        side.add_(y, x)
        torch.testing.assert_close(y, expected)
        still = [shard < 0 for shard, _ in own] + [True] * padding
        assert torch.equal(y[still], expected[still])
    assert places == (side._route.data_ptr(), side._line.data_ptr(), side._table.data_ptr())


def test_before_the_first_step_everything_runs_that_a_graph_would_capture() -> None:
    side = SideProjection(bank_of(False), None, 8, 2, torch.float32, torch.device("cpu"))
    ran = []
    side.bank = SimpleNamespace(add_side_=lambda y, x, route: ran.append(route.tolist()))  # type: ignore[assignment]
    y, x = torch.zeros(2, SHAPE[0]), torch.zeros(2, SHAPE[1])
    side.add_(y, x)
    assert ran == [[-1, -1]]
    side.begin([MAIN_ROUTE], [2])
    side.add_(y, x)
    assert len(ran) == 1
    side.begin([RequestRoute(1, 0), MAIN_ROUTE], np.array([1, 1], dtype=np.int32))
    side.add_(y, x)
    assert ran[1:] == [[1, -1]]


def test_the_served_banks_sizes_are_closed() -> None:
    bank = bank_of(False)
    assert isinstance(bank, PackedBank)
    assert hasattr(bank.values, "_dynamo_weak_dynamic_indices")
    side = SideProjection(bank, None, 8, 2, torch.float32, torch.device("cpu"))
    assert isinstance(side.bank, PackedBank)
    assert not hasattr(side.bank.values, "_dynamo_weak_dynamic_indices")


# Workers


class Seen:
    """Stands for the side memory: what each batch was said to be."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[RequestRoute], list[int]]] = []

    def begin(self, routes: list[RequestRoute], counts: Any) -> None:
        self.batches.append((routes, list(counts)))


def step(new: dict[str, Any], finished: tuple[str, ...] = ()) -> SimpleNamespace:
    fresh = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra))
        for name, extra in new.items()
    ]
    return SimpleNamespace(scheduled_new_reqs=fresh, finished_req_ids=set(finished))


class RunnerV1:
    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=[])

    def execute_model(self, scheduled: Any, intermediate: Any = None) -> str:
        self._prepare_inputs(scheduled, np.array([2, 1], dtype=np.int32))
        return "done"

    def _prepare_inputs(self, scheduled: Any, counts: Any) -> str:
        self.input_batch.req_ids = ["b", "a"]  # a runner may order them anew
        return "prepared"


class RunnerV2:
    def execute_model(self, scheduled: Any, intermediate: Any = None, dummy: bool = False) -> str:
        if not dummy:
            self.prepare_inputs(scheduled, "state", "graph", 0)
        return "done"

    def prepare_inputs(self, *given_: Any) -> SimpleNamespace:
        return SimpleNamespace(req_ids=["b", "a"], num_scheduled_tokens=np.array([2, 1]))


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_model_runners_say_who_is_in_a_batch(kind: Any) -> None:
    runner, seen = kind(), Seen()
    _follow(runner, seen)  # type: ignore[arg-type]
    route = RequestRoute(2, 9)
    assert runner.execute_model(step({"a": marked(None, route), "b": None})) == "done"
    assert runner.execute_model(step({})) == "done"  # still the same two
    runner.execute_model(step({"a": None}, finished=("a",)))  # the id anew, with another prompt
    both = ([MAIN_ROUTE, route], [2, 1])
    assert seen.batches == [both, both, ([MAIN_ROUTE, MAIN_ROUTE], [2, 1])]


def test_another_model_runner_is_refused() -> None:
    runner = SimpleNamespace(execute_model=lambda scheduled: None)
    with pytest.raises(ModelError, match=r"use vLLM 0\.32 or 0\.33"):
        _follow(runner, Seen())  # type: ignore[arg-type]


def test_a_memory_without_shards_leaves_a_worker_as_it_was(served: Served) -> None:
    memory = load_memory_dir(served.memory).memory
    memory.shards = []
    load = object()
    worker = SimpleNamespace(load_model=load)
    attach(worker, memory)
    assert worker.load_model is load


@pytest.fixture
def vllm_model() -> Iterator[torch.nn.Module]:
    """What vLLM has where transformers has model.language_model.layers.0.down_proj."""
    block = torch.nn.Module()
    block.down_proj = torch.nn.Module()
    block.down_proj.output_size, block.down_proj.input_size = 6, 40
    model = torch.nn.Module()
    model.inner = torch.nn.ModuleList([block])
    yield model


def test_a_projection_is_found_by_the_models_own_names(vllm_model: Any) -> None:
    names = SimpleNamespace(
        apply_list=lambda keys: [key.replace("model.layers", "inner") for key in keys]
    )
    with pytest.raises(ModelError, match=r"has no layer 'model\.layers\.0\.down_proj'"):
        find_projection(vllm_model, "model.layers.0.down_proj", (6, 40))
    vllm_model.hf_to_vllm_mapper = names
    found = find_projection(vllm_model, "model.layers.0.down_proj", (6, 40))
    assert found is vllm_model.inner[0].down_proj
    with pytest.raises(ModelError, match=r"of shape \(6, 41\), and .* is \(6, 40\)"):
        find_projection(vllm_model, "model.layers.0.down_proj", (6, 41))


def test_a_memory_of_another_model_is_refused(served: Served, tmp_path: Path) -> None:
    stored = load_memory_dir(served.memory)
    save_memory(tmp_path, stored.memory, {}, [], {"name": "x", "fingerprint": "0" * 64})
    with pytest.raises(StorageError, match="made for 'x'"):
        PromptRouter(load_memory_dir(tmp_path), model_config(served))
