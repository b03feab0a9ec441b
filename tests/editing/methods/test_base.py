"""What every method promises: it changes the model in place, and gives it back to the bit."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import wise_ext
from tests.editing.facts import EDITS, answer
from tests.editing.methods.facts import FACTS
from wise_ext import Edit
from wise_ext.editing.methods import METHODS, Originals, make_method
from wise_ext.editing.methods.base import oriented, weight_of
from wise_ext.editing.methods.fine_tuning import ConstrainedConfig, ElasticFineTuning
from wise_ext.editing.methods.grace import GraceConfig
from wise_ext.errors import ConfigError, DataError, ModelError

# What each needs to learn a fact on the tiny model.
QUICK: dict[str, dict[str, Any]] = {
    "ft-l": {"norm_constraint": None, "learning_rate": 5e-3, "steps": 50},
    "ft-ewc": {"learning_rate": 5e-3, "steps": 50},
    "grace": {},
}


@pytest.fixture(params=list(QUICK))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything there is to a model: objects, bits, hooks and flags."""
    return {
        "modules": {key: id(module) for key, module in model.named_modules()},
        "parameters": {key: id(p) for key, p in model.named_parameters()},
        "bits": {key: v.detach().numpy().tobytes() for key, v in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "own": sorted(vars(model)),
    }


def test_there_are_settings_for_every_method() -> None:
    assert {"ft-l", "ft-ewc", "grace"} <= set(METHODS)
    assert all(method.name == key for key, method in METHODS.items())


def test_edits_take_in_sequence_and_are_undone(taught: Any, name: str) -> None:
    model, tokenizer = taught()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before, unedited = state(model), answer(model.eval(), tokenizer, FACTS[0].prompt)
    model.train()
    method = make_method(name, model, tokenizer, **QUICK[name])
    assert state(model) == before

    (first,) = method.edit(FACTS[:1])
    (second,) = method.edit(FACTS[1:2])
    changed = state(model)
    assert all(changed[key] == before[key] for key in ("modules", "training", "trainable", "own"))
    model.eval()
    assert answer(model, tokenizer, FACTS[1].prompt) == FACTS[1].target_new
    for edit, outcome in zip(FACTS, (first, second), strict=False):
        assert outcome.edit_id == edit.id
        assert 1 <= outcome.iterations <= method.config.steps
        assert outcome.loss < 0.2
        assert {"capture", "optimise", "write"} <= set(outcome.seconds)
        assert all(spent >= 0 for spent in outcome.seconds.values())

    model.train()
    method.reset()
    assert state(model) == before
    assert answer(model.eval(), tokenizer, FACTS[0].prompt) == unedited
    model.train()
    # It works again after that, as if for the first time.
    assert [first.loss] == [outcome.loss for outcome in method.edit(FACTS[:1])]


def test_a_context_resets_at_its_end(load: Any, name: str) -> None:
    model, tokenizer = load()
    before = state(model)
    with (
        pytest.raises(RuntimeError, match="stop here"),
        make_method(name, model, tokenizer, **QUICK[name]) as method,
    ):
        method.edit(EDITS[:1])
        assert state(model) != before
        raise RuntimeError("stop here")
    assert state(model) == before


def test_progress_counts_edits(load: Any, name: str) -> None:
    calls: list[tuple[int, int]] = []
    method = make_method(name, *load(), **QUICK[name] | {"steps": 1})
    outcomes = method.edit(EDITS[:3], lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [outcome.edit_id for outcome in outcomes] == ["a", "b", "c"]
    assert method.edit([]) == []


def test_the_prompt_is_put_into_the_chat_template(load: Any, name: str) -> None:
    model, tokenizer = load()
    bare = tokenizer(EDITS[0].prompt, return_tensors="pt").input_ids
    asked = [{"role": "user", "content": EDITS[0].prompt}]
    chat = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    chat = chat["input_ids"]
    with torch.no_grad():
        before = [model(ids).logits[0, -1] for ids in (bare, chat)]
        make_method(name, model, tokenizer, chat=True, **QUICK[name]).edit(EDITS[:1])
        after = [model(ids).logits[0, -1] for ids in (bare, chat)]
    moved = [float((new - old).norm()) for new, old in zip(after, before, strict=True)]
    assert moved[1] > 1.5 * moved[0]


def test_a_side_memory_is_refused(load: Any, lab: SimpleNamespace, name: str) -> None:
    model, tokenizer = load()
    method = make_method(name, model, tokenizer)
    wise_ext.patch(model, lab.key_memory(model, lab.prompts(5, 6)))
    for attempt in (lambda: make_method(name, model, tokenizer), lambda: method.edit(EDITS)):
        with pytest.raises(ConfigError, match=f"{name} edits .* has a side memory: take that off"):
            attempt()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1.0}, "unknown setting 'lr': choose among layer, chat, .*learning_rate"),
        ({"layer": 1.5}, "layer is 1.5: give a text or a whole number"),
        ({"layer": True}, "layer is True"),
        ({"chat": "yes"}, "chat is 'yes': give True or False"),
        ({"steps": 0}, "steps is 0: give a whole number >= 1"),
        ({"steps": 2.5}, "steps is 2.5: give a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0: give a number > 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf: give a number > 0"),
        ({"stop_loss": -1}, "stop_loss is -1: give a number >= 0"),
    ],
)
def test_bad_settings(load: Any, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, *load(), **settings)


def test_settings_survive_a_round_trip(name: str) -> None:
    config = METHODS[name].config_type.from_dict(QUICK[name] | {"layer": 2})
    assert type(config).from_dict(config.to_dict()) == config


def test_other_names_and_settings_are_refused(load: Any) -> None:
    with pytest.raises(ConfigError, match="unknown method 'magic': choose one of ft-l, ft-ewc, "):
        make_method("magic", *load())
    with pytest.raises(ConfigError, match="ft-ewc takes a ElasticConfig, not a ConstrainedConfig"):
        ElasticFineTuning(*load(), ConstrainedConfig())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="layer 9 does not exist: the model has blocks 0 to 3"):
        make_method("grace", *load(), layer=9)


def test_the_defaults_are_the_papers() -> None:
    c = ConstrainedConfig()
    assert (c.steps, c.learning_rate, c.norm_constraint, c.stop_loss) == (25, 5e-4, 5e-4, 1e-2)
    e = METHODS["ft-ewc"].config_type()
    # GRACE's lambda of 0.1 has no factor of a half.
    assert e.to_dict() | {"learning_rate": 1e-2, "elasticity": 0.2, "memory": 10} == e.to_dict()
    g = GraceConfig()
    assert (g.steps, g.learning_rate, g.radius) == (100, 1.0, 1.0)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([EDITS[0], EDITS[0]], "edit id 'a' appears twice"),
        ([EDITS[0], {"prompt": "Who?"}], "was given a dict as an edit: make a wise_ext.Edit"),
        ([EDITS[0], Edit("long", "a " * 300, "b")], "edit 'long' has .* the model takes 256"),
    ],
)
def test_bad_edits_change_nothing(load: Any, name: str, edits: list[Any], message: str) -> None:
    model, tokenizer = load()
    before = state(model)
    with pytest.raises(DataError, match=message):
        make_method(name, model, tokenizer).edit(edits)
    assert state(model) == before


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=8),
    st.lists(st.lists(st.floats(width=32), min_size=8, max_size=8), max_size=3),
)
def test_originals_are_the_first_bits(first: list[float], later: list[list[float]]) -> None:
    parameter, other = nn.Parameter(torch.tensor(first)), nn.Parameter(torch.ones(2))
    bits = parameter.detach().view(torch.int32).clone()
    originals = Originals()
    for values in later:
        originals.keep("p", parameter)
        with torch.no_grad():
            parameter.copy_(torch.tensor(values[: len(first)]))
            other += 1
    originals.restore()
    assert torch.equal(parameter.detach().view(torch.int32), bits)
    assert torch.equal(other, torch.full((2,), 1.0 + len(later)))
    assert originals.changed() == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_changes_are_the_difference_from_the_original(dtype: torch.dtype) -> None:
    touched, kept = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    originals = Originals()
    for step in range(2):
        originals.keep("touched", touched)
        originals.keep("kept", kept)
        with torch.no_grad():
            touched[step] += 2
    (delta,) = originals.changed().values()
    assert delta.tolist() == [2, 2, 0]
    assert delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_weight_must_be_floating(lab: SimpleNamespace) -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            integers = torch.zeros(3, 4, dtype=torch.int8)
            self.weight = nn.Parameter(integers, requires_grad=False)

    with pytest.raises(ModelError, match=r"'a.b' \(Packed\) has no weight that can be written to"):
        weight_of(Packed(), "a.b")
    projection = lab.make_model("gpt2").transformer.h[0].mlp.c_proj
    matrix = torch.rand(32, 48)[:, :32]
    assert torch.equal(oriented(projection, matrix), matrix.T)
    assert oriented(nn.Linear(32, 32), matrix) is matrix


def test_methods_on_one_model_nest(load: Any) -> None:
    model, tokenizer = load()
    original = copy.deepcopy(model.state_dict())
    with make_method("ft-l", model, tokenizer, **QUICK["ft-l"]) as below:
        below.edit(EDITS[:1])
        edited = copy.deepcopy(model.state_dict())
        with make_method("ft-l", model, tokenizer, **QUICK["ft-l"]) as above:
            above.edit(EDITS[1:2])
        assert all(torch.equal(v, edited[key]) for key, v in model.state_dict().items())
    assert all(torch.equal(v, original[key]) for key, v in model.state_dict().items())
