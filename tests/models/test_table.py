"""The table of architectures and the naming of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from wise_ext.errors import ModelError
from wise_ext.models import (
    find_architecture,
    get_module,
    is_patched,
    layer_path,
    patch,
    projection_shape,
    unload,
)


@pytest.fixture(scope="module")
def bloom() -> Any:
    """An architecture that the table does not have."""
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=4)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_every_entry_fits_its_model(architecture: str, lab: SimpleNamespace) -> None:
    model = lab.make_model(architecture)
    entry = find_architecture(model)
    assert len(get_module(model, entry.layers)) == 3  # type: ignore[arg-type]
    assert get_module(model, entry.head) is model.get_output_embeddings()
    assert entry.norm is not None and get_module(model, entry.norm)
    projection = get_module(model, layer_path(model))
    d_out, d_in = projection_shape(projection)
    assert (d_out, d_in) == (32, 128 if architecture in ("gptj", "gpt2") else 48)
    assert projection(torch.zeros(2, 1, d_in)).shape == (2, 1, d_out)


def test_gemma3_with_a_vision_tower() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert layer_path(model) == "model.language_model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("depth, index", [(30, 24), (32, 26), (28, 22), (3, 2), (2, 1), (1, 0)])
def test_default_depth_is_about_five_sixths(depth: int, index: int, lab: SimpleNamespace) -> None:
    model = lab.make_model("llama", num_hidden_layers=depth)
    assert layer_path(model) == f"model.layers.{index}.mlp.down_proj"


def test_naming_a_layer(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    assert layer_path(model, 1) == layer_path(model, "1") == "model.layers.1.mlp.down_proj"
    assert layer_path(model, -1) == layer_path(model, "-1") == "model.layers.2.mlp.down_proj"
    assert layer_path(model, fraction=0.1) == "model.layers.0.mlp.down_proj"
    assert layer_path(model, "model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "layer, message",
    [
        (3, "layer 3 does not exist: the model has blocks 0 to 2"),
        ("-4", "layer -4 does not exist"),
        ("model.layers.7.mlp.down_proj", "'model.layers' has no module '7'"),
        ("", "has no layer ''"),
        ("model.layers.0", "LlamaDecoderLayer is not a linear projection"),
    ],
)
def test_wrong_layers(layer: str | int, message: str, lab: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match=message):
        layer_path(lab.make_model("llama"), layer)


def test_unknown_architecture_says_how_to_go_on(bloom: Any, lab: SimpleNamespace) -> None:
    with pytest.raises(ModelError) as caught:
        layer_path(bloom)
    text = str(caught.value)
    assert "'bloom'" in text and "llama" in text and "name the FFN down projection" in text
    named = text.split('layer="')[1].split('"')[0]
    assert named == "transformer.h.2.mlp.dense_4h_to_h"
    with pytest.raises(ModelError, match="unknown architecture"):
        layer_path(bloom, 1)

    assert layer_path(bloom, named) == named
    known = lab.prompts(6, 4)
    key_layer = "transformer.h.0.mlp.dense_4h_to_h"
    memory = lab.key_memory(bloom, known, named, key_layer)
    edited = lab.edited_copy(bloom, memory, 0)
    row = torch.tensor([known[0]])
    patch(bloom, memory)
    torch.testing.assert_close(bloom(row).logits, edited(row).logits)
    assert torch.equal(
        bloom.generate(row, max_new_tokens=5), edited.generate(row, max_new_tokens=5)
    )
    unload(bloom)
    assert not is_patched(bloom)


def test_a_body_without_its_head(lab: SimpleNamespace) -> None:
    body = lab.make_model("llama").model
    with pytest.raises(ModelError, match=r"has no list of blocks at 'model\.layers'"):
        layer_path(body)
    assert layer_path(body, "layers.1.mlp.down_proj")


def test_something_that_is_no_transformer() -> None:
    with pytest.raises(ModelError, match="model_type None of Linear"):
        find_architecture(nn.Linear(2, 2))
