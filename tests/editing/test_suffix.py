"""The suffix engine against the whole model, on every architecture."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from wise_ext.editing.losses import label_loss
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.errors import ModelError
from wise_ext.memory import bits_to_bool, random_mask_bits
from wise_ext.models import get_module, layer_path, projection_shape


def _cut(lab: SimpleNamespace, name: str, **more: Any) -> tuple[Any, SuffixEngine, str]:
    model = lab.make_model(name, **more)
    layer = layer_path(model, 1)
    return model, SuffixEngine(model, layer, layer_path(model, 0)), layer


def _delta(model: Any, layer: str, scale: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    shape = projection_shape(get_module(model, layer))
    bits = random_mask_bits(*shape, 0.3, seed=1)
    return torch.randn(shape) * scale * bits_to_bool(bits, shape[1]), bits


def _edited(model: Any, layer: str, delta: torch.Tensor) -> Any:
    edited = copy.deepcopy(model)
    weight = get_module(edited, layer).weight
    with torch.no_grad():
        weight += delta.T if weight.shape != delta.shape else delta
    return edited


def test_replay_is_the_edited_model(lab: SimpleNamespace, architecture: str) -> None:
    """Rows of unlike lengths through the suffix = each row alone through the edited model."""
    model, engine, layer = _cut(lab, architecture)
    delta, bits = _delta(model, layer)
    prompts, targets = lab.prompts(3, 7, 12), lab.prompts(2, 4, 1, seed=1)
    rows = engine.capture(prompts, targets)
    output = engine.run(rows, delta, bits)
    edited = _edited(model, layer, delta)
    expected, owner = [], []
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        with torch.no_grad():
            logits = edited(torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0]
        expected.append(logits[len(prompt) - 1 :])
        owner += [i] * len(target)
    assert_close(output.logits, torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert output.row.tolist() == owner
    assert output.labels.tolist() == [token for target in targets for token in target]


def test_post_norm_blocks_are_replayed_whole(lab: SimpleNamespace) -> None:
    additive = {name: _cut(lab, name)[1].additive for name in ("llama", "gptj", "gpt2", "gemma2")}
    assert additive == {"llama": True, "gptj": True, "gpt2": True, "gemma2": False}


def test_gradient_is_masked_and_right(lab: SimpleNamespace) -> None:
    """Against a finite difference of the loss along the gradient's own direction."""
    model, engine, layer = _cut(lab, "llama")
    delta, bits = _delta(model, layer)
    rows = engine.capture(lab.prompts(5, 6), lab.prompts(3, 2, seed=1))

    def loss(d: torch.Tensor) -> torch.Tensor:
        labels = label_loss(engine.run(rows, d, bits), 2)
        return labels.sum() + engine.indicator(rows, d, bits).sum()

    leaf = delta.requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    assert not grad[~bits_to_bool(bits, delta.shape[1])].any()
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        slope = (loss(delta + step) - loss(delta - step)) / 2e-2
    assert_close(slope, grad.norm(), rtol=2e-2, atol=1e-3)


def test_indicator_is_the_mean_over_prompt_tokens(lab: SimpleNamespace) -> None:
    model, engine, layer = _cut(lab, "llama")
    delta, bits = _delta(model, layer)
    (prompt,) = lab.prompts(6)
    (row,) = engine.capture([prompt], [[5, 6]])
    a = lab.activation(model, layer, prompt)
    assert_close(
        engine.indicator([row], delta, bits)[0], (a @ delta.T).norm(dim=1).mean(), rtol=1e-4, atol=0
    )


def test_keys_are_prompt_means_whatever_the_company(lab: SimpleNamespace) -> None:
    model, engine, _ = _cut(lab, "llama")
    prompts = lab.prompts(3, 9)
    keys = engine.keys(prompts)
    for key, prompt in zip(keys, prompts, strict=True):
        expected = lab.activation(model, layer_path(model, 0), prompt).mean(0)
        assert_close(key, expected, rtol=1e-4, atol=1e-5)
    (row,) = engine.capture(prompts[:1], [[5]])
    assert row.key is not None
    assert_close(row.key, keys[0], rtol=1e-4, atol=1e-5)


def test_capture_repeats_to_the_bit(lab: SimpleNamespace) -> None:
    _, engine, _ = _cut(lab, "llama")
    prompts, targets = lab.prompts(4, 9), lab.prompts(2, 2, seed=1)
    first, second = engine.capture(prompts, targets), engine.capture(prompts, targets)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.activation, b.activation) and torch.equal(a.base, b.base)


def test_the_model_is_left_as_it_was(lab: SimpleNamespace) -> None:
    model, engine, layer = _cut(lab, "gemma2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine.run(engine.capture([[3, 4]], [[5]]), *_delta(model, layer))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_base(lab: SimpleNamespace) -> None:
    model, engine, layer = _cut(lab, "llama", dtype=torch.bfloat16)
    delta, bits = _delta(model, layer)
    rows = engine.capture(lab.prompts(5), lab.prompts(2, seed=1))
    assert rows[0].activation.dtype == torch.bfloat16
    assert engine.run(rows, delta, bits).logits.dtype == torch.float32


def test_a_layer_outside_the_blocks_is_refused(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    with pytest.raises(ModelError, match="not inside a list of decoder blocks"):
        SuffixEngine(model, "lm_head")
