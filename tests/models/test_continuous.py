"""Continuous batching: every request is answered as it is alone, whatever runs beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import CudaGraphBuffer

from wise_ext.errors import ModelError
from wise_ext.models import disabled, layer_path, patch, unload, use_memory

NEW = 6
# One pass for all, and small passes that cut prompts into chunks and blocks into shares.
ROOMY = {"num_blocks": 128, "max_batch_tokens": 128, "page_size": 8}
TIGHT = {"num_blocks": 64, "max_batch_tokens": 7, "page_size": 4}


class Served:
    """A patched model whose shards 0 and 1 belong to two prompts; requests for them and others."""

    def __init__(self, lab: SimpleNamespace, architecture: str, implementation: str) -> None:
        self.lab = lab
        # GPT-NeoX has no groups of heads, but transformers' paged cache goes by its configuration.
        more = {"num_key_value_heads": 4} if architecture == "gpt_neox" else {}
        self.model = lab.make_model(architecture, attn_implementation=implementation, **more)
        self.model.generation_config.do_sample = False
        self.model.generation_config.eos_token_id = -1
        self.known = lab.prompts(5, 9)
        self.requests = [*lab.prompts(7, 12, 3, seed=3), *self.known, *lab.prompts(4, seed=4)]
        # Not the last block: what an edit adds has to reach keys and values above it.
        self.layer = layer_path(self.model, 1)
        self.memory = lab.key_memory(self.model, self.known, layer=self.layer)
        patch(self.model, self.memory)

    @torch.no_grad()
    def alone(self, **options: Any) -> list[list[int]]:
        """What `generate` writes for each by itself."""
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        return [
            self.model.generate(torch.tensor([row]), **(settings | options))[0, len(row) :].tolist()
            for row in self.requests
        ]

    def together(self, config: dict[str, Any], new: int = NEW) -> list[list[int]]:
        found = self.model.generate_batch(
            self.requests,
            max_new_tokens=new,
            continuous_batching_config=ContinuousBatchingConfig(**config),
        )
        assert all(one.error is None for one in found.values()), found
        return [one.generated_tokens for one in found.values()]


@pytest.fixture(params=["sdpa", "eager"])
def served(request: pytest.FixtureRequest, lab: SimpleNamespace) -> Served:
    return Served(lab, "llama", request.param)


@pytest.mark.engine("transformers continuous batching", "a route for each request: {name}")
@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_every_request_as_alone(name: str, config: dict[str, Any], lab: SimpleNamespace) -> None:
    served = Served(lab, name, "sdpa")
    expected = served.alone()
    with disabled(served.model):
        unedited = served.alone()
    changed = [one != other for one, other in zip(expected, unedited, strict=True)]
    assert changed == [False, False, False, True, True, False]
    assert served.together(config) == expected
    with disabled(served.model):
        assert served.together(config) == unedited


@pytest.mark.engine("transformers continuous batching", "the indicator router")
def test_the_indicator_routes_packed_requests(lab: SimpleNamespace) -> None:
    served = Served(lab, "llama", "sdpa")
    unload(served.model)
    patch(served.model, lab.indicator_memory(served.model, served.known, served.layer))
    assert served.together(TIGHT) == served.alone()


def test_eager_attention(served: Served) -> None:
    assert served.together(TIGHT) == served.alone()


@pytest.mark.engine("transformers continuous batching", "sharing of blocks, within a route")
def test_blocks_are_not_shared_across_routes(lab: SimpleNamespace) -> None:
    """One prompt, by the shard and by main memory in turn, on one cache."""
    served = Served(lab, "llama", "sdpa")
    served.known = served.requests = lab.prompts(14)
    plain = lab.make_model("llama")
    patch(served.model, lab.key_memory(plain, served.known, layer=served.layer))
    answers = {name: served.alone(memory=name)[0] for name in (None, "default")}
    assert answers[None] != answers["default"]
    config = ContinuousBatchingConfig(**TIGHT, allow_block_sharing=True)
    with served.model.continuous_batching_context_manager(
        continuous_batching_config=config, block=True
    ) as manager:
        for name in ("default", None, "default", None, None, "default"):
            request = manager.add_request(served.requests[0], max_new_tokens=NEW, memory=name)
            result = manager.get_result(request, timeout=30)
            assert result.generated_tokens == answers[name]
        cache = manager.batch_processor.cache
        kept = [allocator.ledger.hash_to_block for allocator in cache.cache_allocators.values()]
        # Main memory's are shared all the same: the three whole pages of its prompt, and its own.
        assert cache.use_prefix_sharing and all(len(blocks) >= 3 for blocks in kept)


@pytest.mark.engine("transformers continuous batching", "several answers a request")
def test_several_answers_a_request(lab: SimpleNamespace) -> None:
    """Children take their parent's blocks and its route; by a temperature near 0 all are alike."""
    served = Served(lab, "llama", "sdpa")
    expected = served.alone()
    for key, value in {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 3}.items():
        setattr(served.model.generation_config, key, value)
    assert served.together(ROOMY) == [one for one in expected for _ in range(3)]


@pytest.mark.engine("transformers continuous batching", "requests put aside for want of room")
@pytest.mark.parametrize("children", [1, 2])
def test_requests_that_begin_anew_keep_their_memory(
    children: int, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds two or three requests: others are thrown out and begin again, children too.
    They name the second memory, so that one that forgets is not answered by the first."""
    served = Served(lab, "llama", "sdpa")
    other = lab.key_memory(lab.make_model("llama"), served.known, served.layer, scale=3.0)
    other.shards.reverse()
    patch(served.model, other, name="other")
    served.requests = [served.requests[3], served.requests[4]] * 3
    expected = served.alone(memory="other", max_new_tokens=20, min_new_tokens=20)
    assert expected != served.alone(max_new_tokens=20, min_new_tokens=20)
    begun: list[str] = []
    original = RequestState.create_equivalent_initial_request

    def anew(state: RequestState) -> RequestState:
        begun.append(state.request_id)
        return original(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", anew)
    if children > 1:
        settings = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": children}
        for key, value in settings.items():
            setattr(served.model.generation_config, key, value)
    small = {"num_blocks": 20, "max_batch_tokens": 16, "page_size": 4}
    with use_memory(served.model, "other"):
        found = served.together(small, new=20)
    assert begun, "the cache was large enough for all"
    assert found == [one for one in expected for _ in range(children)]


@pytest.mark.engine("transformers continuous batching", "a memory for each request")
def test_a_memory_of_its_own_for_each_request(lab: SimpleNamespace) -> None:
    served = Served(lab, "llama", "sdpa")
    other = lab.key_memory(lab.make_model("llama"), served.known, served.layer, scale=3.0)
    other.shards.reverse()
    patch(served.model, other, name="other")
    a, b, none = served.alone(), served.alone(memory="other"), served.alone(memory=None)
    assert a[3] != b[3] != none[3]
    assert served.together(TIGHT) == a
    names = [None, "other", "default", "other", None, "default"]
    pick = {"default": a, "other": b, None: none}
    expected = [pick[name][row] for row, name in enumerate(names)]
    with use_memory(served.model, names):
        assert served.together(TIGHT) == expected
    with use_memory(served.model, "other"):
        assert served.together(ROOMY) == b
    with (
        use_memory(served.model, ["other"] * 2),
        pytest.raises(ModelError, match="2 names of memories for 6 prompts"),
        served.model.continuous_batching_context_manager() as manager,
    ):
        manager.add_requests(served.requests)
    with (
        use_memory(served.model, ["other"] * 2),
        pytest.raises(ModelError, match="2 names of memories for one request"),
        served.model.continuous_batching_context_manager() as manager,
    ):
        manager.add_request(served.requests[0])


@pytest.mark.engine("transformers continuous batching", "memories that come and go")
def test_memories_come_and_go_while_requests_are_served(lab: SimpleNamespace) -> None:
    served = Served(lab, "llama", "sdpa")
    model, known = served.model, served.requests[3]
    other = lab.key_memory(lab.make_model("llama"), served.known, served.layer, scale=3.0)
    other.shards.reverse()
    edited = served.alone()[3]
    with disabled(model):
        unedited = served.alone()[3]
    config = ContinuousBatchingConfig(**ROOMY)
    with model.continuous_batching_context_manager(
        continuous_batching_config=config, block=True
    ) as manager:

        def answer(**options: Any) -> list[int]:
            name = manager.add_request(known, max_new_tokens=NEW, **options)
            tokens: list[int] = manager.get_result(name, timeout=30).generated_tokens
            return tokens

        assert answer() == edited and answer(memory=None) == unedited
        with pytest.raises(ModelError, match="no memory 'other' is loaded"):
            answer(memory="other")
        with manager.pause():
            patch(model, other, name="other")
        theirs = answer(memory="other")
        assert theirs not in (edited, unedited) and answer() == edited
        with manager.pause():
            patch(model, other)  # renews the default one
        assert answer() == theirs
        with manager.pause():
            unload(model, "default")
        assert answer() == theirs and answer(memory=None) == unedited
        # One in flight whose memory goes is finished by the unedited model.
        request = manager.add_request(known, max_new_tokens=40, streaming=True, memory="other")
        first = next(manager.request_id_iter(request)).generated_tokens
        with manager.pause():
            unload(model)
        last = list(manager.request_id_iter(request))[-1]
        assert last.error is None and len(last.generated_tokens) == 40
        assert last.generated_tokens[: len(first)] == first
        assert answer() == unedited


@pytest.mark.engine(
    "transformers continuous batching", "managers made before the first memory", possible=False
)
def test_a_manager_made_before_the_patch_is_refused(lab: SimpleNamespace) -> None:
    """Its requests would all be taken for one prompt."""
    model = lab.make_model("llama")
    model.generation_config.eos_token_id = -1
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(**ROOMY)
    )
    patch(model, lab.key_memory(lab.make_model("llama"), lab.prompts(5, 9)))
    manager.start()
    try:
        name = manager.add_request(lab.prompts(5)[0], max_new_tokens=2)
        manager.get_result(name, timeout=10)
        fatal = manager.background_thread_status.fatal_error
        assert "set up before the side memory was loaded" in str(fatal)
    finally:
        manager.stop(block=True, timeout=5)


def test_another_transformers_is_refused_in_a_line(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(lab, "llama", "sdpa")
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    monkeypatch.delattr(ContinuousBatchingManager, "_create_batch_processor")
    with pytest.raises(ModelError, match="a way wise-ext does not know"):
        served.model.init_continuous_batching()


def test_captured_graphs_end_with_the_memory_they_read(lab: SimpleNamespace) -> None:
    """Without a card: graphs by a stand-in, the buffer that keeps them is transformers' own."""

    class Graph:
        ended = False

        def reset(self) -> None:
            self.ended = True

    served = Served(lab, "llama", "sdpa")
    manager = served.model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(**ROOMY)
    )
    processor = manager._create_batch_processor()
    requests, io = processor._wise_ext_equipped, processor.inputs_and_outputs
    requests.lay_out([], 4)
    assert isinstance(io.graphs, CudaGraphBuffer)
    graph = Graph()
    io.graphs.set_graph((1,), graph)
    requests.lay_out([], 4)
    assert not graph.ended and io.graphs.get_graph((1,)) is graph
    patch(served.model, served.memory)  # the same again: its tensors may lie elsewhere
    requests.lay_out([], 4)
    assert graph.ended and io.graphs.get_graph((1,)) is None
    manager.destroy()
