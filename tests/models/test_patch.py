"""Patching every architecture, and taking the patch off again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from wise_ext import ops
from wise_ext.errors import ModelError, NativeError
from wise_ext.memory import SideMemory
from wise_ext.models import (
    current_memory,
    decide_routes,
    disabled,
    fingerprint,
    force_route,
    get_module,
    is_patched,
    last_route,
    layer_path,
    patch,
    projection_shape,
    unload,
)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that unpatching has to put back."""
    hooks = {
        (path, kind): list(value)
        for path, module in model.named_modules()
        for kind, value in vars(module).items()
        if "hook" in kind and hasattr(value, "__len__")
    }
    return {
        "modules": [(path, id(module)) for path, module in model.named_modules()],
        "parameters": [(path, id(p), p._version) for path, p in model.named_parameters()],
        "buffers": [(path, id(b)) for path, b in model.named_buffers()],
        "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
        "hooks": hooks,
        "keys": list(model.state_dict()),
        "generate": model.generate.__func__,  # type: ignore[union-attr, operator]
    }


def empty_memory(model: nn.Module) -> SideMemory:
    layer = layer_path(model)
    return SideMemory(layer, projection_shape(get_module(model, layer)), routing="indicator")


@torch.no_grad()
def test_edit_and_unload(architecture: str, lab: SimpleNamespace) -> None:
    model = lab.make_model(architecture)
    known = lab.prompts(5, 8)
    batch = lab.padded([*known, *lab.prompts(6, seed=7)], left=False)
    memory = lab.key_memory(model, known)
    before, plain = anatomy(model), model(**batch).logits
    mark = fingerprint(model)
    edited = [lab.edited_copy(model, memory, shard) for shard in (0, 1)]

    patch(model, memory)
    assert is_patched(model) and current_memory(model) is memory
    routed = model(**batch).logits
    assert last_route(model).tolist() == [0, 1, -1]
    assert decide_routes(model, **batch).route.tolist() == [0, 1, -1]
    for row in (0, 1):
        own = edited[row](**batch).logits
        torch.testing.assert_close(routed[row], own[row], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(routed[row], plain[row], atol=1e-2)
    assert torch.equal(routed[2], plain[2])
    with force_route(model, -1):
        assert torch.equal(model(**batch).logits, plain)
    with force_route(model, [-1, 0, 1], cue=[0, 1000, 1001]):
        forced = model(**batch).logits
    for row, shard in ((1, 0), (2, 1)):
        torch.testing.assert_close(
            forced[row], edited[shard](**batch).logits[row], rtol=1e-3, atol=1e-4
        )
    assert fingerprint(model) == mark
    assert list(model.state_dict()) == before["keys"]

    unload(model)
    assert not is_patched(model)
    assert anatomy(model) == before
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_an_empty_memory_changes_no_bit(architecture: str, lab: SimpleNamespace) -> None:
    model = lab.make_model(architecture)
    batch = lab.padded(lab.prompts(5, 8))
    plain = model(**batch).logits
    written = model.generate(**batch, max_new_tokens=4)
    patch(model, empty_memory(model))
    assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), written)
    assert last_route(model).tolist() == [-1, -1]
    assert decide_routes(model, **batch).route.tolist() == [-1, -1]


@torch.no_grad()
def test_disabled_is_the_unedited_model(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 8)
    batch = lab.padded(known)
    plain, written = model(**batch).logits, model.generate(**batch, max_new_tokens=4)
    patch(model, lab.key_memory(model, known))
    with disabled(model):
        assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model.generate(**batch, max_new_tokens=4), written)
        assert last_route(model).tolist() == [-1, -1]
        assert decide_routes(model, **batch).route.tolist() == [-1, -1]
    assert not torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_the_indicator_decides_at_the_edited_layer(architecture: str, lab: SimpleNamespace) -> None:
    model, known = lab.make_model(architecture), lab.prompts(7)
    memory = lab.indicator_memory(model, known)
    edited, row = lab.edited_copy(model, memory, 0), torch.tensor(known)
    patch(model, memory)
    torch.testing.assert_close(model(row).logits, edited(row).logits, rtol=1e-3, atol=1e-4)
    assert last_route(model).tolist() == [0]
    memory.shards[0].threshold *= 1.02
    patch(model, memory)
    model(row)
    assert last_route(model).tolist() == [-1]


@torch.no_grad()
def test_patching_again_replaces_the_memory(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("qwen2"), lab.prompts(5, 8)
    before, row = anatomy(model), torch.tensor([known[0]])
    first = lab.key_memory(model, known)
    second = lab.key_memory(model, known, layer="model.layers.1.mlp.down_proj")
    edited = lab.edited_copy(model, second, 0)
    patch(model, first)
    cache = model(row, use_cache=True).past_key_values
    patch(model, second)
    assert current_memory(model) is second
    torch.testing.assert_close(model(row).logits, edited(row).logits, rtol=1e-3, atol=1e-4)
    # A route of the first memory means nothing to the second: its cache decides anew.
    model(torch.tensor([known[1][:1]]), past_key_values=cache)
    assert last_route(model).shape == (1,)
    unload(model)
    assert anatomy(model) == before


def test_an_instance_s_own_generate_comes_back(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5)
    own = lambda *args, **kwargs: "mine"  # noqa: E731
    model.generate = own
    patch(model, lab.key_memory(model, known))
    assert model.generate(torch.tensor(known)) == "mine"
    unload(model)
    assert model.generate is own


@torch.no_grad()
def test_saving_a_patched_model_saves_the_base(lab: SimpleNamespace, tmp_path: Path) -> None:
    model, known = lab.make_model("llama", tie_word_embeddings=True), lab.prompts(5)
    model.save_pretrained(tmp_path / "base")
    patch(model, lab.key_memory(model, known))
    model.save_pretrained(tmp_path / "patched")
    contents = []
    for name in ("base", "patched"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            contents.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert list(contents[0]) == list(contents[1])
    assert all(torch.equal(contents[0][key], contents[1][key]) for key in contents[0])
    again = type(model).from_pretrained(tmp_path / "patched")
    row = torch.tensor(known)
    with disabled(model):
        assert torch.equal(again(row).logits, model(row).logits)


def test_what_does_not_fit_leaves_the_model_alone(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5)
    before, memory = anatomy(model), lab.key_memory(model, known)
    layer, key_layer = memory.layer, memory.key_layer
    with pytest.raises(ModelError, match=r"shape \(32, 48\), but .* is \(32, 128\)"):
        patch(
            lab.make_model("gpt2"),
            SideMemory("transformer.h.2.mlp.c_proj", (32, 48), routing="indicator"),
        )
    memory.layer = "model.layers.9.mlp.down_proj"
    with pytest.raises(ModelError, match=r"'model\.layers' has no module '9'"):
        patch(model, memory)
    memory.layer, memory.key_layer = key_layer, layer
    with pytest.raises(ModelError, match="lies above the edited layer"):
        patch(model, memory)
    memory.layer, memory.key_layer = layer, key_layer
    with pytest.raises(ModelError, match=r"not in torch\.float64"):
        patch(model, memory, torch.float64)
    assert anatomy(model) == before


def test_a_backend_that_cannot_be_had_is_refused_first(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lab.make_model("llama")
    memory = lab.key_memory(model, lab.prompts(5, 8))
    before = anatomy(model)
    monkeypatch.setattr(ops.backends._state, "choice", "triton")
    with pytest.raises(NativeError, match="no triton add_side_ for device type 'cpu'"):
        patch(model, memory)
    assert anatomy(model) == before


def test_unloading_and_asking_without_a_patch(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5)
    for call in (unload, current_memory, last_route):
        with pytest.raises(ModelError, match="LlamaForCausalLM has no side memory"):
            call(model)
    patch(model, lab.key_memory(model, known))
    model.model.layers[2].mlp.down_proj = nn.Linear(48, 32)
    with pytest.raises(ModelError, match="was replaced after the side memory was loaded"):
        unload(model)


@pytest.mark.parametrize("route", [2, [0, 5], [], -2])
def test_forcing_a_shard_that_is_not_there(route: Any, lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    patch(model, lab.key_memory(model, lab.prompts(5, 6)))
    with pytest.raises(ModelError, match="there are 2 shards"), force_route(model, route):
        pass
