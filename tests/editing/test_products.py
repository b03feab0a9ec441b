"""Frozen products in bf16: what they compute, and that nobody notices afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wise_ext.editing import suffix
from wise_ext.editing.products import HalfProducts, half_is_fast
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.models import layer_path


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [None, [5, 0, 5]])
def test_linear_and_its_gradient(bias: bool, rows: list[int] | None) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(48, 7, bias=bias), torch.randn(2, 9, 48, requires_grad=True)
    chosen = None if rows is None else torch.tensor(rows)
    y = HalfProducts([module]).linear(module, x, chosen)
    assert y.dtype == torch.float32
    weight = module.weight.bfloat16().double()
    wanted = x.bfloat16().double() @ weight.t() + (module.bias.double() if bias else 0.0)
    given = torch.randn(y.shape)
    back = given.bfloat16().double()
    if chosen is not None:
        wanted, weight = wanted[..., chosen], weight[chosen]
    # bf16 keeps eight bits of the result.
    assert_close(y.double(), wanted, rtol=2**-8, atol=2**-8)
    (grad,) = torch.autograd.grad(y, x, given)
    assert_close(grad.double(), back @ weight, rtol=2**-8, atol=2**-8)


def test_only_plain_float_layers_are_copied_and_all_are_given_back() -> None:
    class Own(nn.Linear):
        pass

    plain, own, half = nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)
    replaced = nn.Linear(4, 4)
    replaced.forward = plain.forward  # type: ignore[method-assign]
    halves = HalfProducts([nn.Sequential(plain, nn.ReLU()), own, half, replaced])
    assert plain in halves and not any(m in halves for m in (own, half, replaced))
    x = torch.randn(3, 4)
    before = plain(x)
    with pytest.raises(RuntimeError, match="on purpose"), halves.used():
        inside = plain(x)
        raise RuntimeError("on purpose")
    assert not inside.equal(before) and inside.allclose(before, atol=0.05)
    assert plain(x).equal(before) and "forward" not in vars(plain)


def test_an_engine_in_half(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "half_is_fast", lambda device: True)
    model = lab.make_model("llama")
    engine = SuffixEngine(model, layer_path(model, 1), layer_path(model, 0))
    rows = engine.capture(lab.prompts(4, 6), lab.prompts(2, 2, seed=1))
    d_model, d_ff = rows[0].base.shape[-1], rows[0].activation.shape[-1]
    delta = torch.randn(d_model, d_ff) * 0.01
    bits = torch.full((d_model, -(-d_ff // 32)), -1, dtype=torch.int32)
    tokens = torch.tensor([3, 1, 4])

    def both(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        replayed = engine.replay(rows, delta, bits)
        few = engine.logits(replayed.hidden, tokens)
        return engine.logits(replayed.hidden), few

    full, _ = both(delta)
    leaf = delta.clone().requires_grad_()
    with engine.in_half():
        logits, few = both(leaf)
    assert not logits.equal(full) and logits.allclose(full, atol=0.1)
    assert_close(few, logits[:, tokens])
    (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
    exact = delta.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(both(exact)[0].square().sum(), exact)
    assert torch.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.99
    assert both(delta)[0].equal(full)


def test_captures_in_half(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.make_model("llama")
    prompts, targets = lab.prompts(4, 6), lab.prompts(2, 2, seed=1)

    def differs() -> bool:
        exact, asked = (engine.capture(prompts, targets, in_half=half) for half in (False, True))
        for one, two in zip(exact, asked, strict=True):
            assert torch.cosine_similarity(one.base, two.base).min() > 0.99
        return not all(one.base.equal(two.base) for one, two in zip(exact, asked, strict=True))

    engine = SuffixEngine(model, layer_path(model, 1))
    monkeypatch.setattr(suffix, "half_is_fast", lambda device: False)
    engine.halve_captures(lab.prompts(5))
    assert not differs()
    monkeypatch.setattr(suffix, "half_is_fast", lambda device: True)
    assert not differs()
    engine.halve_captures(lab.prompts(5))
    assert differs()
    monkeypatch.setattr(suffix, "HALF_MARGIN", 0.0)
    engine.halve_captures(lab.prompts(5))
    assert not differs() and not any("forward" in vars(m) for m in model.modules())


def test_half_is_not_used_where_logits_suffer(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suffix, "half_is_fast", lambda device: True)
    monkeypatch.setattr(suffix, "_HALF_ERROR", 0.0)
    model = lab.make_model("llama")
    engine = SuffixEngine(model, layer_path(model, 1))
    with engine.in_half():
        assert not any("forward" in vars(m) for m in model.modules())
    # Texts that the caller knows decide instead, by another bound.
    engine.halve_replays(lab.prompts(5))
    with engine.in_half():
        assert any("forward" in vars(m) for m in model.modules())
    monkeypatch.setattr(suffix, "HALF_MARGIN", 0.0)
    engine.halve_replays(lab.prompts(5))
    with engine.in_half():
        assert not any("forward" in vars(m) for m in model.modules())


def test_where_half_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert half_is_fast(cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not half_is_fast(cpu)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not half_is_fast(cpu)
    assert not half_is_fast(torch.device("meta"))
