"""MEMIT and AlphaEdit: what they solve for, on every architecture and in a sequence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.editing.facts import EDITS
from tests.editing.methods.facts import FACTS as KNOWN
from tests.editing.methods.test_base import state
from wise_ext import Edit
from wise_ext.editing.methods import make_method
from wise_ext.editing.methods.least_squares import AlphaEdit, AlphaEditConfig, Memit, MemitConfig
from wise_ext.editing.methods.moments import key_moments
from wise_ext.editing.methods.observing import observe
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.editing.solving import alphaedit_delta, memit_delta, null_space
from wise_ext.editing.statistics import KeyStatistics
from wise_ext.errors import ConfigError, StorageError
from wise_ext.models import fingerprint, get_module, layer_path

FACTS = [replace(EDITS[0], subject="Lumo"), replace(EDITS[2], subject="Pell")]
LONG = Edit("long", "Tell me of Lumo.", "The Senna runs by. It is cold and grey, and Varno is far.")
# Random models know nothing worth keeping, and take some persuading.
EAGER: dict[str, Any] = {"steps": 60, "step": 0.2, "clamp": 20.0, "contexts": 0, "decay": 0.0}
MEMIT = EAGER | {"weight": 1e-3}
ALPHA = EAGER | {"threshold": 1.0, "ridge": 1e-3}
METHODS = {"memit": MEMIT, "alphaedit": ALPHA}
PIECES: dict[str, Any] = {"chunks": "windows", "window": 1, "margin": 3.0, "steps": 100}


def statistics(model: Any, layers: list[str], keys: dict[str, Tensor]) -> KeyStatistics:
    moments = {layer: keys[layer].T @ keys[layer] / len(keys[layer]) for layer in layers}
    base = {"name": "tiny", "fingerprint": fingerprint(model)}
    return KeyStatistics(moments, 100, base, {})


def says(model: Any, tokenizer: Any, edit: Edit) -> bool:
    prompt = encode_prompt(tokenizer, edit.prompt)
    target = encode_target(tokenizer, edit.target_new)
    logits = model(torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist() == target


@pytest.mark.parametrize("name", METHODS)
def test_edits_take_and_accumulate_and_go(taught: Any, name: str) -> None:
    model, tokenizer = taught()
    before = state(model)
    method = make_method(name, model, tokenizer, spread=2, layer=2, **METHODS[name])
    (first,) = method.edit(KNOWN[:1])
    assert says(model, tokenizer, KNOWN[0])
    once = {key: value.clone() for key, value in method.originals.changed().items()}
    (second,) = method.edit(KNOWN[1:2])
    assert says(model, tokenizer, KNOWN[1])
    if name == "alphaedit":  # it keeps what earlier edits need
        assert says(model, tokenizer, KNOWN[0])
    twice = method.originals.changed()
    # No weight but those named.
    assert set(once) == set(twice) == {f"{layer}.weight" for layer in method.layers}
    assert method.layers == [layer_path(model, n) for n in (1, 2)]
    assert all(not torch.equal(once[key], twice[key]) for key in once)
    for outcome, edit in zip((first, second), KNOWN[:2], strict=True):
        assert outcome.edit_id == edit.id
        assert 0 < outcome.iterations <= 60
        assert outcome.loss < 0.5
        assert {"statistics", "seek", "keys", "solve", "write"} == set(outcome.seconds)
    method.reset()
    assert state(model) == before
    assert [first.loss] == [outcome.loss for outcome in method.edit(KNOWN[:1])]
    assert_close(method.originals.changed(), once, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_edits_of_one_call_are_written_together(taught: Any, name: str) -> None:
    model, tokenizer = taught()
    method = make_method(name, model, tokenizer, layer=2, spread=1, **METHODS[name])
    wishes = method._seeker.wishes(method._lessons(KNOWN))
    last = [(wish.texts[0], wish.places[0]) for wish in wishes]
    before = [observe(method._engine, method.layer, text)[1][at] for text, at in last]
    outcomes = method.edit(KNOWN)
    after = [observe(method._engine, method.layer, text)[1][at] for text, at in last]
    assert [outcome.edit_id for outcome in outcomes] == ["a", "c", "d"]
    assert outcomes[0].seconds == outcomes[1].seconds
    # Each key token's shift came out, in spite of the others'.
    for wish, old, new in zip(wishes, before, after, strict=True):
        size = float(wish.values.abs().max())
        assert_close(new - old, wish.values, rtol=2e-2, atol=2e-2 * size)


@pytest.mark.parametrize("name", ["anyedit-memit", "anyedit-alphaedit"])
@pytest.mark.parametrize(
    "pieces",
    [
        PIECES,
        PIECES | {"schedule": "together"},
        PIECES | {"chunks": "sentences"},
        PIECES | {"chunks": "needed", "schedule": "together"},
    ],
    ids=["windows", "together", "sentences", "needed"],
)
def test_long_answers(load: Any, name: str, pieces: dict[str, Any]) -> None:
    model, tokenizer = load()
    settings = METHODS[name.removeprefix("anyedit-")]
    method = make_method(name, model, tokenizer, layer=1, spread=1, **settings | pieces)
    method.edit([LONG])
    assert says(model, tokenizer, LONG)


@pytest.mark.parametrize("name", METHODS)
def test_every_architecture(lab: SimpleNamespace, load: Any, architecture: str, name: str) -> None:
    """The shift that was sought is what comes out at the key token, whatever the weight is like."""
    _, tokenizer = load()
    model = lab.make_model(architecture, vocab_size=len(tokenizer))
    layers = [layer_path(model, n) for n in (0, 1)]
    rows = lab.prompts(*range(3, 9))
    keys = {at: torch.cat([lab.activation(model, at, row) for row in rows]) for at in layers}
    # Keys of little weight, so that there is room for more.
    given = statistics(model, layers, {at: key * 1e-2 for at, key in keys.items()})
    make = {"memit": (Memit, MemitConfig), "alphaedit": (AlphaEdit, AlphaEditConfig)}[name]
    settings = METHODS[name] | {"steps": 10, "contexts": 0}
    method = make[0](model, tokenizer, make[1](layer=1, **settings), given)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lesson = method._lessons(FACTS[:1])
    (wish,) = method._seeker.wishes(lesson)
    (text,), (place,) = wish.texts, wish.places
    _, states = observe(method._engine, method.layer, text)
    method.edit(FACTS[:1])
    _, edited = observe(method._engine, method.layer, text)
    moved = (edited - states)[place]
    assert_close(moved, wish.values, rtol=2e-2, atol=2e-2 * float(wish.values.abs().max()))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{layer}.weight" for layer in method.layers}


def test_the_update_of_each_layer_is_the_closed_form(load: Any) -> None:
    """Layer after layer, with a share of what is still missing, by MEMIT's Eq. 14."""
    model, tokenizer = load()
    layers = [layer_path(model, n) for n in (0, 1)]
    moments = key_moments(model, tokenizer, layers)
    settings = EAGER | {"weight": 3.0, "steps": 5, "contexts": 2}
    method = make_method("memit", model, tokenizer, layer=1, spread=2, **settings)
    (wish,) = method._seeker.wishes(method._lessons(FACTS[:1]))
    assert len(wish.texts) == 3
    tokens = [
        tokenizer.convert_ids_to_tokens(t[int(p)])
        for t, p in zip(wish.texts, wish.places, strict=True)
    ]
    assert len(set(tokens)) == 1

    def look(layer: str) -> tuple[Tensor, Tensor]:
        keys = torch.stack(
            [
                observe(method._engine, layer, text)[0][int(place)]
                for text, place in zip(wish.texts, wish.places, strict=True)
            ]
        )
        return keys.mean(0)[None], observe(method._engine, layers[1], wish.texts[0])[1][
            wish.places[0]
        ]

    # The other model is edited by hand.
    goal = look(layers[0])[1] + wish.values
    wanted = {}
    for left, layer in ((2, layers[0]), (1, layers[1])):
        keys, now = look(layer)
        wanted[layer] = memit_delta(keys, (goal - now) / left, moments[layer], 3.0).float()
        with torch.no_grad():
            get_module(model, layer).weight += wanted[layer]
    for layer in layers:
        with torch.no_grad():
            get_module(model, layer).weight -= wanted[layer]
    method.edit(FACTS[:1])
    for name, delta in method.originals.changed().items():
        expected = wanted[name.removesuffix(".weight")]
        assert_close(delta, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_keys_of_a_long_text_that_are_no_key_tokens_stay(load: Any) -> None:
    model, tokenizer = load()
    settings = ALPHA | PIECES | {"ridge": 1e-6, "layer": 1, "spread": 1}
    method = make_method("anyedit-alphaedit", model, tokenizer, **settings)
    (wish,) = method._seeker.wishes(method._lessons([LONG]))
    _, before = observe(method._engine, method.layer, wish.texts[0])
    method.edit([LONG])
    _, after = observe(method._engine, method.layer, wish.texts[0])
    at = torch.zeros(len(before), dtype=torch.bool)
    at[wish.places[0]] = True
    moved = (after - before).norm(dim=-1)
    assert moved[~at].max() < 0.02 * moved[at].max()


def test_alphaedit_leaves_what_it_keeps_alone(load: Any) -> None:
    """Keys outside of the null space give what they gave; those of earlier edits, too."""
    model, tokenizer = load()
    layer = layer_path(model, 1)
    known = torch.randn(60, 40) @ torch.randn(40, 512)
    given = statistics(model, [layer], {layer: known})
    config = AlphaEditConfig(layer=1, spread=1, **ALPHA | {"threshold": 1e-2})
    method = AlphaEdit(model, tokenizer, config, given)
    method.edit(FACTS[:1])
    delta = method.originals.changed()[f"{layer}.weight"]
    assert delta.norm() > 0.01
    assert (known @ delta.T).norm() < 1e-3 * known.norm() * delta.norm()

    # The second edit's update keeps the first one's key.
    (first,) = method._seeker.wishes(method._lessons(FACTS[:1]))
    key = torch.stack(
        [
            observe(method._engine, layer, t)[0][int(p)]
            for t, p in zip(first.texts, first.places, strict=True)
        ]
    ).mean(0)
    assert_close(method._past[layer], torch.outer(key, key), rtol=1e-3, atol=1e-3)
    method.edit(FACTS[1:])
    more = method.originals.changed()[f"{layer}.weight"] - delta
    assert (more @ key).norm() < 0.05 * more.norm() * key.norm()
    method.reset()
    assert not method._past


def test_the_weight_counts_for_keys_of_any_width(load: Any) -> None:
    model, tokenizer = load()
    method = make_method("memit", model, tokenizer, layer=0)
    method._moments = {method.layer: torch.eye(512)}
    keys, residuals = torch.randn(2, 512), torch.randn(2, 128)
    found = method._delta(method.layer, keys, residuals)
    assert_close(found, memit_delta(keys, residuals, torch.eye(512), 15_000 * 512 / 14_336))
    assert math.isclose(15_000 * 512 / 14_336, 535.7, rel_tol=1e-3)


def test_layers_of_the_papers(lab: SimpleNamespace, load: Any) -> None:
    _, tokenizer = load()
    model = lab.make_model("llama", vocab_size=len(tokenizer), num_hidden_layers=32)
    assert make_method("memit", model, tokenizer).layers == [
        layer_path(model, n) for n in range(4, 9)
    ]
    assert make_method("rome", model, tokenizer).layer == layer_path(model, 5)
    assert make_method("unke", model, tokenizer).layer == layer_path(model, 7)
    gemma = lab.make_model("gemma2", vocab_size=len(tokenizer))
    assert make_method("memit", gemma, tokenizer, layer=2).layers == [layer_path(gemma, 2)]
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM do more .* use spread=1"):
        make_method("alphaedit", gemma, tokenizer, spread=2)


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_are_collected_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load()
    layers = [layer_path(model, n) for n in (0, 1)]
    one = key_moments(model, tokenizer, layers[:1])
    both = key_moments(model, tokenizer, layers)
    assert torch.equal(one[layers[0]], both[layers[0]])
    monkeypatch.setattr("wise_ext.editing.methods.moments.collect", None)
    again = key_moments(model, tokenizer, layers)
    assert all(torch.equal(again[layer], both[layer]) for layer in layers)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(TypeError):  # another model has statistics of its own
        key_moments(model, tokenizer, layers)


def test_statistics_may_be_given(load: Any, tmp_path: Path) -> None:
    model, tokenizer = load()
    layers = [layer_path(model, n) for n in (0, 1)]
    given = statistics(model, layers, {layer: torch.randn(9, 512) for layer in layers})
    assert key_moments(model, tokenizer, layers[:1], given)[layers[0]] is given.moments[layers[0]]
    given.save(tmp_path / "keys.safetensors")
    method = make_method(
        "memit", model, tokenizer, layer=0, statistics=str(tmp_path / "keys.safetensors"), **MEMIT
    )
    method.edit(FACTS[:1])
    method.reset()
    assert torch.equal(method._moments[layers[0]], given.moments[layers[0]])
    with pytest.raises(ConfigError, match=r"lack model.layers.2.mlp.down_proj: collect them"):
        key_moments(model, tokenizer, [layer_path(model, 2)], given)
    with pytest.raises(StorageError, match=r"has nothing of model.layers.2"):
        key_moments(model, tokenizer, [layer_path(model, 2)], tmp_path / "keys.safetensors")
    other = replace(given, base={"name": "other", "fingerprint": "0"})
    with pytest.raises(ConfigError, match="those of 'other', not of this model"):
        key_moments(model, tokenizer, layers, other)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("memit", {"weight": 0.0}, "weight is 0.0: give a number > 0"),
        ("memit", {"spread": -1}, "spread is -1: give a whole number >= 0"),
        ("memit", {"contexts": -1}, "contexts is -1"),
        ("memit", {"essence": -1.0}, "essence is -1.0"),
        ("memit", {"window": 3}, "window and overlap are of chunks"),
        ("memit", {"chunks": "pages"}, "chunks is 'pages': choose one of"),
        (
            "anyedit-memit",
            {"chunks": "windows", "overlap": 50},
            "overlap is 50: windows have 40 tokens",
        ),
        ("memit", {"in_half": 1}, "in_half is 1: give True or False"),
        ("alphaedit", {"threshold": 0.0}, "threshold is 0.0"),
        ("alphaedit", {"ridge": -1.0}, "ridge is -1.0"),
        ("alphaedit", {"statistics": 5}, "statistics is 5: give a text or None"),
        ("rome", {"statistics": 5}, "statistics is 5: give a text or None"),
    ],
)
def test_bad_settings(load: Any, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, *load(), **settings)


def test_no_null_space(load: Any) -> None:
    model, tokenizer = load()
    layer = layer_path(model, 1)
    given = statistics(model, [layer], {layer: torch.randn(2000, 512)})
    config = AlphaEditConfig(layer=1, spread=1, threshold=1e-3, contexts=0)
    method = AlphaEdit(model, tokenizer, config, given)
    with pytest.raises(ConfigError, match=r"no eigenvalue of .* is below 0.001: give a larger"):
        method.edit(FACTS[:1])


def test_alphaedit_solves_its_closed_form(load: Any) -> None:
    model, tokenizer = load()
    method = make_method("alphaedit", model, tokenizer, layer=1, spread=1, **ALPHA)
    method._prepare()
    keys, residuals = torch.randn(2, 512), torch.randn(2, 128)
    projector = null_space(method._moments[method.layer], 1.0)
    assert 0 < torch.linalg.matrix_rank(projector) < 512
    nothing = torch.zeros(512, 512)
    wanted = alphaedit_delta(keys, residuals, projector, nothing, 1e-3)
    assert_close(method._delta(method.layer, keys, residuals), wanted, rtol=1e-3, atol=1e-3)
