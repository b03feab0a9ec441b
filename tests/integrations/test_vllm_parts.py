"""What serves a memory in vLLM, without vLLM: routes on requests, batches, the side memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.served import Served
from tests.tiny_models import CUE, make_shard
from wise_ext.errors import ModelError
from wise_ext.integrations.vllm.projection import CueLines, SideProjection
from wise_ext.integrations.vllm.requests import (
    MAIN_ROUTE,
    HeldRoutes,
    RequestRoute,
    marked,
    route_of,
    salted,
    token_values,
)
from wise_ext.integrations.vllm.worker import _follow, attach, find_projection
from wise_ext.memory import Cues, LowRankShard, PackedBank, SideMemory
from wise_ext.storage import load_memory_dir

SHAPE = (6, 40)
CUES = Cues(CUE, SHAPE[1])
SHARDS = 3
SOME_ROUTES = st.one_of(
    st.just(MAIN_ROUTE),
    st.builds(RequestRoute, st.integers(0, SHARDS - 1), st.integers(0, 5)),
)


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
