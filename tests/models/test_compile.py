"""torch.compile of patched models: whole graphs, and none anew when routes change."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation import CompileConfig

from wise_ext.models import last_decision, last_route, patch

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
ROUTES = ([0, 1, -1], [1, 0, 0], [-1, -1, -1])


class Counter:
    """Counts the graphs that its backend is given and runs as they are."""

    def __init__(self) -> None:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        self.graphs = graphs
        self.backend = backend


@pytest.fixture
def counter() -> Counter:
    torch._dynamo.reset()
    return Counter()


def batches(lab: SimpleNamespace, known: list[list[int]], left: bool) -> list[dict[str, Tensor]]:
    """One batch for each of ROUTES, all of one shape."""
    other = lab.prompts(9, seed=3)[0]
    rows = {0: known[0], 1: known[1], -1: other}
    batches = [lab.padded([rows[route] for route in routes], left) for routes in ROUTES[:2]]
    return [*batches, lab.padded([other, other, other], left)]


@torch.no_grad()
def test_forward(architecture: str, lab: SimpleNamespace, counter: Counter) -> None:
    model, known = lab.make_model(architecture), lab.prompts(5, 9)
    patch(model, lab.key_memory(model, known))
    compiled = torch.compile(model, fullgraph=True, backend=counter.backend)
    for batch, routes in zip(batches(lab, known, left=False), ROUTES, strict=True):
        eager = model(**batch, use_cache=False).logits
        logits = compiled(**batch, use_cache=False).logits
        assert last_route(model).tolist() == routes
        torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_generate_with_a_static_cache(
    architecture: str, lab: SimpleNamespace, counter: Counter
) -> None:
    model, known = lab.make_model(architecture), lab.prompts(5, 9)
    patch(model, lab.key_memory(model, known))
    config = CompileConfig(fullgraph=True, backend=counter.backend, mode=None)
    config._compile_all_devices = True
    for batch, routes in zip(batches(lab, known, left=True), ROUTES, strict=True):
        eager = model.generate(**batch, **GREEDY)
        output = model.generate(
            **batch, **GREEDY, cache_implementation="static", compile_config=config
        )
        assert last_route(model).tolist() == routes
        assert torch.equal(output, eager)
        # transformers itself needs two where a window slides: as its length, an int, changes.
        assert len(counter.graphs) == (2 if architecture == "mistral" else 1)


@torch.no_grad()
def test_a_reset_static_cache_decides_anew(lab: SimpleNamespace, counter: Counter) -> None:
    model, known = lab.make_model("llama"), lab.prompts(6, 6)
    patch(model, lab.key_memory(model, known))
    compiled = torch.compile(model, fullgraph=True, backend=counter.backend)
    cache = StaticCache(model.config, max_cache_len=16)
    for row, route in zip([*known, *known], [0, 1, 0, 1], strict=True):
        ids = torch.tensor([row])
        logits = compiled(ids, past_key_values=cache).logits
        assert last_route(model).tolist() == [route]
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        # More tokens of the same text: several at once, on a cache that holds its route.
        more = torch.tensor([[5, 9]])
        compiled(more, past_key_values=cache)
        assert [values.tolist() for values in last_decision(model)] == [[route], [1000 + route]]
        cache.reset()


@pytest.mark.parametrize("kind", ["key_memory", "indicator_memory"])
@torch.no_grad()
def test_more_edits_compile_nothing_anew(kind: str, lab: SimpleNamespace, counter: Counter) -> None:
    """A memory that has grown runs the graph there is, and says what it says eagerly."""
    model = lab.make_model("llama")
    known = lab.prompts(5, 9, 7, 6, 8)
    make = getattr(lab, kind)
    patch(model, make(model, known[:2]))
    compiled = torch.compile(model, fullgraph=True, backend=counter.backend)
    batch = lab.padded([known[0], known[4], known[1]], left=False)
    before = compiled(**batch, use_cache=False).logits
    for count in (3, 5, 4):
        patch(model, make(model, known[:count]))
        eager = model(**batch, use_cache=False).logits
        logits = compiled(**batch, use_cache=False).logits
        torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)
        if count == 5 and kind == "key_memory":
            assert last_route(model).tolist() == [0, 4, 1]
            assert not torch.allclose(logits, before)
    # The indicator's memory has one shard whatever it knows, a size that is built in.
    assert len(counter.graphs) == 1


@torch.no_grad()
def test_generating_with_more_edits_compiles_nothing_anew(
    lab: SimpleNamespace, counter: Counter
) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 9, 7, 6)
    config = CompileConfig(fullgraph=True, backend=counter.backend, mode=None)
    config._compile_all_devices = True
    batch = lab.padded([known[0], known[3], known[1]], left=True)
    for count in (2, 4, 3):
        patch(model, lab.key_memory(model, known[:count]))
        eager = model.generate(**batch, **GREEDY)
        output = model.generate(
            **batch, **GREEDY, cache_implementation="static", compile_config=config
        )
        assert last_route(model).tolist() == [0, 3 if count == 4 else -1, 1]
        assert torch.equal(output, eager)
    assert len(counter.graphs) == 1
