"""Another memory for a patched model: in place where it fits, and always as if patched afresh."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from wise_ext.models import (
    current_memory,
    disabled,
    force_route,
    last_decision,
    last_route,
    layer_path,
    patch,
    prompt_lengths,
    unload,
)
from wise_ext.models.installed import patch_of


@pytest.mark.parametrize("kind", ["key_memory", "indicator_memory"])
@torch.no_grad()
def test_in_place_and_as_if_afresh(kind: str, lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 8, 7, 6)
    batch = lab.padded(known)
    make = getattr(lab, kind)
    patch(model, make(model, known[:2]))
    dual, routing = patch_of(model).dual, patch_of(model).routing
    model(**batch)
    grown = make(model, known)
    patch(model, grown)
    assert patch_of(model).dual is dual and patch_of(model).routing is routing
    assert current_memory(model) is grown
    renewed, decided = model(**batch).logits, last_decision(model)
    unload(model)
    patch(model, grown)
    assert torch.equal(model(**batch).logits, renewed)
    for got, wanted in zip(decided, last_decision(model), strict=True):
        assert got.equal(wanted)
    if kind == "key_memory":
        assert last_route(model).tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_settings_come_with_the_memory(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 8)
    memory = lab.key_memory(model, known)
    patch(model, memory)
    ids = torch.tensor(known[:1])
    cued = model(ids).logits
    memory.cue *= 2
    patch(model, memory)
    assert not torch.allclose(model(ids).logits, cued)
    memory.radius = 1.5
    patch(model, memory)
    model(ids)
    assert last_route(model).tolist() == [-1]


@torch.no_grad()
def test_what_was_held_names_shards_that_are_gone(lab: SimpleNamespace) -> None:
    """A cache, and a copy of it, decide anew; nothing is forced or limited any more."""
    model, known = lab.make_model("llama"), lab.prompts(5, 8)
    memory, swapped = lab.key_memory(model, known), lab.key_memory(model, known[::-1])
    patch(model, memory)
    ids = torch.tensor(known[:1])
    cache = model(ids, use_cache=True).past_key_values
    copied, held = copy.deepcopy(cache), copy.deepcopy(cache)
    token = torch.tensor([[5]])
    model(token, past_key_values=held)
    assert last_route(model).tolist() == [0]
    patch(model, swapped)
    for stale in (cache, copied):
        model(token, past_key_values=stale)
        assert last_route(model).tolist() == [-1]
    model(ids)
    assert last_route(model).tolist() == [1]
    with force_route(model, 0), prompt_lengths(model, [2]):
        patch(model, memory)
        model(torch.tensor(known[1:]))
        assert last_route(model).tolist() == [1]


@torch.no_grad()
def test_disabled_does_not_outlast_a_patch(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 8)
    memory = lab.key_memory(model, known)
    patch(model, memory)
    with disabled(model):
        patch(model, memory)
        model(torch.tensor(known[:1]))
        assert last_route(model).tolist() == [0]


@torch.no_grad()
def test_another_layer_or_router_is_installed_anew(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 8)
    layers = [layer_path(model, number) for number in (1, 2)]
    others = [
        lab.key_memory(model, known, layer=layers[0]),
        lab.key_memory(model, known, layer=layers[1]),
        lab.key_memory(model, known, layer=layers[1], key_layer=layers[0]),
        lab.indicator_memory(model, known, layer=layers[1]),
    ]
    plain = model(torch.tensor(known[:1])).logits
    for memory in others:
        patch(model, memory)
        installed = patch_of(model)
        assert model.get_submodule(memory.layer) is installed.dual
        model(torch.tensor(known[:1]))
        assert last_route(model).tolist() == [0]
        patch(model, memory)
        assert patch_of(model).dual is installed.dual
    unload(model)
    assert torch.equal(model(torch.tensor(known[:1])).logits, plain)
