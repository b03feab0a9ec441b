"""Base models in half precision, and with a frozen quantised projection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wise_ext.memory import Cues
from wise_ext.models import fingerprint, get_module, last_route, patch, unload
from wise_ext.models.patch import patch_of

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
@torch.no_grad()
def test_half_precision(architecture: str, dtype: torch.dtype, lab: SimpleNamespace) -> None:
    model = lab.make_model(architecture, dtype=dtype)
    known = lab.prompts(5, 9)
    memory = lab.key_memory(model, known)
    batch = lab.padded([*known, *lab.prompts(7, seed=3)], left=False)
    plain, mark = model(**batch).logits, fingerprint(model)
    # What the model would compute had it been edited in full precision: the yardstick for both.
    exact = lab.edited_copy(model, memory, 0).float()(**batch).logits[0]
    rounded = lab.edited_copy(model, memory, 0)(**batch).logits[0].float()
    patch(model, memory)
    assert patch_of(model).dual.bank.values.dtype == dtype
    logits = model(**batch).logits
    assert last_route(model).tolist() == [0, 1, -1]
    assert logits.dtype == dtype and torch.equal(logits[2], plain[2])
    error = (logits[0].float() - exact).abs().max()
    assert error <= 2 * (rounded - exact).abs().max() + 1e-3
    assert fingerprint(model) == mark
    output = model.generate(**lab.padded(known), **GREEDY)
    assert last_route(model).tolist() == [0, 1] and output.shape == (2, 14)
    patch(model, memory, torch.float32)
    assert patch_of(model).dual.bank.values.dtype == torch.float32
    model(**batch)
    unload(model)
    assert torch.equal(model(**batch).logits, plain)


def dynamic_int8(linear: nn.Linear) -> nn.Module:
    """torch's own dynamically quantised linear with the weight of `linear`."""
    holder = nn.Sequential(linear)
    return torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, torch.qint8)[0]


def torchao_int8(linear: nn.Linear) -> nn.Module:
    """torchao's int8 weight-only linear."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("quantise", [dynamic_int8, torchao_int8])
@torch.no_grad()
def test_a_quantised_projection(quantise: Any, lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    path = "model.layers.2.mlp.down_proj"
    block = model.model.layers[2].mlp
    block.down_proj = quantise(block.down_proj)
    frozen = block.down_proj
    memory = lab.key_memory(model, known)
    assert memory.layer == path and memory.shape == (32, 48)
    mark = fingerprint(model)
    row = torch.tensor([known[0]])
    plain, written = model(row).logits, model.generate(row, **GREEDY)

    # The oracle adds D (a + cue) to the quantised projection's own output.
    delta = memory.shards[0].dense()
    cue = Cues(memory.cue, 48).vectors(torch.tensor([1000]))
    handle = frozen.register_forward_hook(lambda _, args, y: y + (args[0] + cue) @ delta.T)
    exact, expected = model(row).logits, model.generate(row, **GREEDY)
    handle.remove()

    patch(model, memory)
    assert fingerprint(model) == mark
    assert last_route(model) is None
    torch.testing.assert_close(model(row).logits, exact, rtol=1e-3, atol=1e-3)
    assert last_route(model).tolist() == [0]
    assert torch.equal(model.generate(row, **GREEDY), expected)
    assert not torch.equal(expected, written)
    unload(model)
    assert get_module(model, path) is frozen
    assert torch.equal(model(row).logits, plain)
