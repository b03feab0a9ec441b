"""Several memories on one model: each row uses the one that is named for it, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from wise_ext.errors import ModelError
from wise_ext.models import (
    current_memory,
    decide_routes,
    disabled,
    force_route,
    get_module,
    is_patched,
    last_route,
    layer_path,
    memories,
    patch,
    unload,
    use_memory,
)

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


class Two:
    """A model with the memories "a" and "b", which know the same two prompts and answer them
    differently; and what each answers alone on a model of its own."""

    def __init__(self, lab: SimpleNamespace, layer: str | None = None) -> None:
        self.lab = lab
        self.model = lab.make_model("llama")
        self.plain = lab.make_model("llama")
        self.rows = [*lab.prompts(5, 9), lab.prompts(7, seed=3)[0]]
        known = self.rows[:2]
        self.a = lab.key_memory(self.plain, known)
        self.b = lab.key_memory(self.plain, known, layer=layer, scale=3.0)
        self.b.shards = self.b.shards[::-1]
        self.batch = lab.padded(self.rows)
        patch(self.model, self.a, name="a")
        patch(self.model, self.b, name="b")

    def alone(self, memory: Any) -> list[list[int]]:
        """What the rows become on a model with this memory alone, or none."""
        model = self.lab.make_model("llama")
        if memory is not None:
            patch(model, memory)
        return self.written(model)

    def written(self, model: Any = None, **options: Any) -> list[list[int]]:
        with torch.no_grad():
            out = (model or self.model).generate(**self.batch, **(NEW | options))
        return out[:, self.batch["input_ids"].shape[1] :].tolist()


# Of the same layer, and of another one.
@pytest.fixture(params=["same", "other"])
def two(request: pytest.FixtureRequest, lab: SimpleNamespace) -> Two:
    layer = None if request.param == "same" else layer_path(lab.make_model("llama"), 1)
    return Two(lab, layer)


@pytest.mark.engine("transformers generate", "a memory for each row")
def test_rows_use_the_memory_that_is_named(two: Two) -> None:
    a, b, none = two.alone(two.a), two.alone(two.b), two.alone(None)
    assert a[0] != b[0] != none[0] and a[1] != b[1] != none[1]
    assert two.written() == a  # the first, where none is named
    assert two.written(memory="b") == b
    assert two.written(memory=None) == none
    assert two.written(memory=["b", "a", None]) == [b[0], a[1], none[2]]
    assert two.written(memory=[None, "b", "b"]) == [none[0], b[1], none[2]]
    with use_memory(two.model, "b"):
        assert two.written() == b
        with use_memory(two.model, ["a", None, None]):
            assert two.written() == [a[0], none[1], none[2]]
        assert two.written() == b
    assert two.written() == a


@pytest.mark.engine("transformers generate", "beams of several memories")
def test_beams_and_samples_follow_their_prompts(two: Two) -> None:
    names = ["b", None, "a"]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    mixed = two.written(memory=names, **beams)
    for row, name in enumerate(names):
        own = two.written(memory=name, **beams)
        assert mixed[2 * row : 2 * row + 2] == own[2 * row : 2 * row + 2]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 3}])
def test_without_a_cache_and_in_chunks(options: dict[str, Any], two: Two) -> None:
    a, b = two.alone(two.a), two.alone(two.b)
    assert two.written(memory=["b", "a", "b"], **options) == [b[0], a[1], b[2]]


@torch.no_grad()
def test_a_cache_holds_a_route_of_each(two: Two) -> None:
    """Steps without a name go on as their prompt began, also between those of other names."""
    model, ids = two.model, torch.tensor([two.rows[0]])
    caches, tokens = {}, {}
    for name in ("a", "b"):
        caches[name] = DynamicCache(config=model.config)
        with use_memory(model, name):
            logits = model(ids, past_key_values=caches[name]).logits
        tokens[name] = [int(logits[0, -1].argmax())]
    for _ in range(4):
        for name in ("a", "b"):
            step = torch.tensor([[tokens[name][-1]]])
            with use_memory(model, name):
                logits = model(step, past_key_values=caches[name]).logits
            tokens[name].append(int(logits[0, -1].argmax()))
    assert tokens["a"] == two.alone(two.a)[0]
    assert tokens["b"] == two.alone(two.b)[0]


def test_one_is_taken_off_and_another_comes(two: Two, lab: SimpleNamespace) -> None:
    a, b = two.alone(two.a), two.alone(two.b)
    original = get_module(two.plain, two.a.layer).weight.clone()
    assert list(memories(two.model)) == ["a", "b"]
    unload(two.model, "a")
    assert list(memories(two.model)) == ["b"] and current_memory(two.model) is two.b
    assert two.written() == b
    patch(two.model, two.a, name="a")
    assert list(memories(two.model)) == ["b", "a"]
    assert two.written() == b and two.written(memory="a") == a
    unload(two.model, "b")
    assert two.written() == a
    unload(two.model, "a")
    assert not is_patched(two.model) and memories(two.model) == {}
    assert type(get_module(two.model, two.a.layer)) is torch.nn.Linear
    assert torch.equal(get_module(two.model, two.a.layer).weight, original)
    assert "generate" not in vars(two.model) and "init_continuous_batching" not in vars(two.model)
    assert not two.model.model._forward_pre_hooks and not two.model.model._forward_hooks


def test_the_lower_of_two_projections_can_go_first(lab: SimpleNamespace) -> None:
    """ "b" was put around "a"; its router listens at the layer that "a" edits."""
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    layer = layer_path(model)
    a = lab.key_memory(model, known, layer=layer)
    b = lab.indicator_memory(model, known, layer=layer)
    patch(model, a, name="a")
    patch(model, b, name="b")
    unload(model, "a")
    alone = lab.make_model("llama")
    patch(alone, b)
    batch = lab.padded(known)
    assert torch.equal(model.generate(**batch, **NEW), alone.generate(**batch, **NEW))
    assert last_route(model).tolist() == last_route(alone).tolist() == [0, 0]


def test_a_memory_in_another_s_place_keeps_its_turn(two: Two) -> None:
    replaced = two.lab.key_memory(two.plain, two.rows[1:2], layer=two.b.layer, scale=4.0)
    patch(two.model, replaced, name="a")  # of another layer, or renewed
    assert list(memories(two.model)) == ["a", "b"]
    assert two.written() == two.alone(replaced)
    assert two.written(memory="b") == two.alone(two.b)


def test_saving_and_loading_weights_sees_the_base(two: Two) -> None:
    state = two.model.state_dict()
    assert state.keys() == two.plain.state_dict().keys()
    changed = {key: value + 1 for key, value in state.items()}
    two.model.load_state_dict(changed)
    for key, value in two.model.state_dict().items():
        assert torch.equal(value, changed[key])


@torch.no_grad()
def test_what_concerns_one_memory_and_what_all(two: Two) -> None:
    model, ids = two.model, torch.tensor([two.rows[0]])
    with disabled(model):
        assert torch.equal(model(ids).logits, two.plain(ids).logits)
    alone = two.lab.make_model("llama")
    patch(alone, two.b)
    with force_route(model, 1, name="b"), force_route(alone, 1):
        assert torch.equal(model(ids).logits, alone(ids).logits)
    assert decide_routes(model, ids, name="b").route.tolist() == [0]
    assert decide_routes(alone, ids).route.tolist() == last_route(model, "b").tolist() == [0]


def test_names_that_are_not_there(two: Two) -> None:
    for call in (
        lambda: two.written(memory="c"),
        lambda: two.written(memory=["a", "c", None]),
        lambda: unload(two.model, "c"),
        lambda: current_memory(two.model, "c"),
    ):
        with pytest.raises(ModelError, match="no memory 'c' is loaded: there is 'a', 'b'"):
            call()
    with pytest.raises(ModelError, match="2 names of memories for a batch of 3 rows"):
        two.written(memory=["a", "b"])
    assert two.written() == two.alone(two.a)


def test_a_choice_is_of_one_model(two: Two) -> None:
    a, b = two.alone(two.a), two.alone(two.b)
    with use_memory(two.model, "b"):
        assert two.alone(two.a) == a  # another model, whose memory has another name
        assert two.written() == b


def test_a_call_that_waited_while_the_memories_went(two: Two) -> None:
    waiting = two.model.generate
    unload(two.model)
    for memory in ({}, {"memory": None}):
        with torch.no_grad():
            out = waiting(**two.batch, **NEW, **memory)
        assert out[:, two.batch["input_ids"].shape[1] :].tolist() == two.alone(None)
    with pytest.raises(ModelError, match="has no side memory"):
        waiting(**two.batch, **NEW, memory="a")
