"""The suffix engine against the whole model, on every architecture."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wise_ext.editing.anatomy import only_at
from wise_ext.editing.losses import label_loss
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.errors import ModelError
from wise_ext.memory import bits_to_bool, random_mask_bits
from wise_ext.memory.token_keys import WINDOW
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


def test_keys_are_a_prompts_last_tokens_whatever_the_company(
    lab: SimpleNamespace, architecture: str
) -> None:
    model, engine, _ = _cut(lab, architecture)
    prompts = lab.prompts(3, 9, WINDOW + 5)
    keys = engine.keys(prompts)
    for key, prompt in zip(keys, prompts, strict=True):
        assert key.ids.tolist() == prompt[-WINDOW:]
        expected = lab.activation(model, layer_path(model, 0), prompt)[-WINDOW:]
        assert_close(key.activation, expected, rtol=1e-3, atol=1e-4)


def _everywhere(engine: SuffixEngine) -> SuffixEngine:
    """The same engine, its feed-forwards run at every place of the grid."""
    plain = copy.copy(engine)
    plain._feed_forwards = [None] * len(engine._feed_forwards)
    return plain


def test_feed_forwards_at_real_tokens_alone_change_nothing(
    lab: SimpleNamespace, architecture: str
) -> None:
    model, engine, layer = _cut(lab, architecture)
    none = architecture == "opt"
    assert [module is None for module in engine._feed_forwards] == [none, True, none]
    delta, bits = _delta(model, layer)
    found = []
    for each in (engine, _everywhere(engine)):
        rows = each.capture(lab.prompts(3, 11, 6, 1), lab.prompts(2, 4, 1, 9, seed=1))
        leaf = delta.clone().requires_grad_()
        output = each.run(rows, leaf, bits)
        loss = label_loss(output, len(rows)).sum() + output.indicator.sum()
        found.append((output.logits.detach(), *torch.autograd.grad(loss, leaf)))
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_feed_forwards_read_each_real_token_once(lab: SimpleNamespace, name: str) -> None:
    model, engine, layer = _cut(lab, name, num_hidden_layers=4)
    rows = engine.capture(lab.prompts(3, 11), lab.prompts(2, 4, seed=1))
    seen: list[torch.Size] = []
    # The first run asks the model what its blocks are called with, too.
    engine.run(rows, *_delta(model, layer))
    hooks = [
        block.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
        for block in engine.blocks[2:]
    ]
    engine.run(rows, *_delta(model, layer))
    for hook in hooks:
        hook.remove()
    # 3 + 1 and 11 + 3 tokens; the last block where one of six labels is predicted.
    assert [shape[:2].numel() for shape in seen] == [18, 6]


class _Pair(nn.Module):
    """A feed-forward that returns more than a hidden state, as mixtures of experts may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down_proj = inner.down_proj

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.inner(hidden), None


class _Shifted(_Pair):
    """A feed-forward in which a token sees the one before it."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.inner(torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1))


class _Positioned(_Pair):
    """A feed-forward with a gain for each of eight positions, which breaks on more tokens."""

    def forward(self, hidden: torch.Tensor) -> Any:
        gain = torch.linspace(0.5, 1.5, 8)[: hidden.shape[1], None]
        return self.inner(hidden * gain)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("kind", [_Pair, _Shifted, _Positioned])
def test_feed_forwards_that_cannot_be_cut_run_everywhere(
    lab: SimpleNamespace, kind: type[_Pair], place: int
) -> None:
    model = lab.make_model("llama")
    mlp = kind(model.model.layers[place].mlp)
    model.model.layers[place].mlp = mlp
    if kind is _Pair:
        # The block takes what it needs, as the block of such a model does.
        model.model.layers[place] = _Block(model.model.layers[place])
    layer = layer_path(model, 1)
    engine = SuffixEngine(model, layer)
    assert set(engine._feed_forwards) == {None}
    delta, bits = _delta(model, layer)
    rows = engine.capture([[3, 4, 5], [6]], [[7, 8], [9]])
    edited = _edited(model, layer, delta)
    with torch.no_grad():
        wanted = edited(torch.tensor([[3, 4, 5, 7, 10, 11, 12, 13]]), use_cache=False).logits[0]
    assert_close(engine.run(rows, delta, bits).logits[:2], wanted[2:4], rtol=1e-3, atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Block(nn.Module):
    """A decoder block whose feed-forward returns a pair."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.mlp = block, block.mlp
        block.mlp = _First(block.mlp)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class _First(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.pair(hidden)[0]


def test_only_at_leaves_no_hook_behind() -> None:
    module = nn.Linear(2, 2)
    with only_at(module, torch.tensor([1, 3])):
        out = module(torch.ones(2, 2, 2))
    assert out.shape == (2, 2, 2)
    assert not out[:, 0].any() and out[:, 1].equal(module(torch.ones(2, 2)))
    refused = pytest.raises(ModelError, match=r"not called with \[rows, width, d\]")
    with refused, only_at(module, torch.tensor([0])):
        module(torch.ones(2, 2))
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_rows_captured_together_are_those_captured_alone(
    lab: SimpleNamespace, architecture: str
) -> None:
    _, engine, _ = _cut(lab, architecture)
    prompts, targets = lab.prompts(3, 12, 1), lab.prompts(2, 4, 1, seed=1)
    together = engine.capture(prompts, targets)
    for row, prompt, target in zip(together, prompts, targets, strict=True):
        (alone,) = engine.capture([prompt], [target])
        assert len(row) == len(prompt) + len(target) - 1 and row.labels.tolist() == target
        for name in ("activation", "base", "inputs"):
            both = getattr(row, name), getattr(alone, name)
            assert both == (None, None) or both[0].shape == both[1].shape
            if both[0] is not None:
                assert_close(*both, rtol=1e-4, atol=1e-5)
    assert engine.capture([], []) == []


def test_the_feed_forwards_of_a_capture_see_no_pads(lab: SimpleNamespace) -> None:
    _, engine, _ = _cut(lab, "llama")
    seen: list[int] = []
    below = engine.blocks[0].mlp
    hook = below.up_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].shape[:-1].numel())
    )
    engine.capture(lab.prompts(3, 12, 5), lab.prompts(2, 4, 1, seed=1))
    hook.remove()
    assert engine.index > 0 and seen == [3 + 12 + 5 + (1 + 3 + 0)]


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
