"""Fine-tuning: within its bounds, on one weight, and elastic as Eq. 3 has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.editing.facts import EDITS
from wise_ext import Edit
from wise_ext.editing.methods import make_method
from wise_ext.editing.methods.fine_tuning import elastic_penalty
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.errors import ConfigError
from wise_ext.models import get_module, layer_path

FAST: dict[str, Any] = {"norm_constraint": None, "learning_rate": 5e-3, "steps": 50}


def mean_nll(model: Any, prompt: Sequence[int], target: Sequence[int]) -> Tensor:
    """What the whole model makes of a target behind its prompt."""
    logits = model(torch.tensor([[*prompt, *target]]), use_cache=False).logits[0]
    return F.cross_entropy(logits[len(prompt) - 1 : -1].float(), torch.tensor(target))


def edit_nll(model: Any, tokenizer: Any, edit: Edit) -> Tensor:
    prompt = encode_prompt(tokenizer, edit.prompt)
    return mean_nll(model, prompt, encode_target(tokenizer, edit.target_new))


def squared_gradient(model: Any, layer: str, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, get_module(model, layer).weight)
    return gradient.square()


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bound=st.floats(1e-5, 1e-2), steps=st.integers(1, 6))
def test_no_entry_leaves_the_bounds(model_dir: Any, bound: float, steps: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chosen = {"norm_constraint": bound, "steps": steps, "learning_rate": 5e-3}
    method = make_method("ft-l", model, tokenizer, **chosen)
    method.edit(EDITS[:1])
    (delta,) = method.originals.changed().values()
    # A weight of magnitude w is rounded to w * 2^-24.
    assert float(delta.abs().max()) <= bound + 1e-7
    if bound < 4e-3:  # less than a step: the bound is what holds it
        assert float(delta.abs().max()) == pytest.approx(bound, abs=1e-7)


@pytest.mark.parametrize("none", [None, 0.0])
def test_there_may_be_no_bound(load: Any, none: float | None) -> None:
    with make_method("ft-l", *load(), **FAST | {"norm_constraint": none}) as method:
        method.edit(EDITS[:1])
        (delta,) = method.originals.changed().values()
        assert float(delta.abs().max()) > 5e-3


@pytest.mark.parametrize("name", ["ft-l", "ft-ewc"])
def test_one_weight_changes(load: Any, name: str) -> None:
    model, tokenizer = load()
    before = {key: v.clone() for key, v in model.state_dict().items()}
    method = make_method(name, model, tokenizer, layer=1)
    method.edit(EDITS[:1])
    changed = [key for key, v in model.state_dict().items() if not torch.equal(v, before[key])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"] == list(method.originals.changed())


def test_each_edit_has_bounds_of_its_own_and_they_add_up(load: Any) -> None:
    bound = 1e-3
    chosen = {"norm_constraint": bound, "learning_rate": 5e-3}
    method = make_method("ft-l", *load(), **chosen)
    deltas = []
    for edit in EDITS[:3]:
        method.edit([edit])
        deltas += method.originals.changed().values()
    for before, after in pairwise(deltas):
        assert float((after - before).abs().max()) <= bound + 1e-7
    assert float(deltas[-1].abs().max()) > 1.5 * bound


def test_the_loss_told_is_the_edited_models(lab: SimpleNamespace, load: Any) -> None:
    """On every architecture: turned weights, other norms, positions of their own."""
    _, tokenizer = load()
    edit = Edit("a", "The river", "Senna")
    for name in lab.names:
        model = lab.make_model(name, vocab_size=500)
        with torch.no_grad():
            untrained = edit_nll(model, tokenizer, edit)
        method = make_method("ft-l", model, tokenizer, **FAST | {"steps": 3, "stop_loss": 0.0})
        (outcome,) = method.edit([edit])
        with torch.no_grad():
            loss = edit_nll(model, tokenizer, edit)
        assert_close(outcome.loss, float(loss), rtol=1e-3, atol=1e-3, msg=name)
        assert float(loss) < float(untrained), name


def test_an_edit_that_holds_already_takes_no_step(load: Any) -> None:
    model, tokenizer = load()
    method = make_method("ft-l", model, tokenizer, **FAST)
    (first,) = method.edit(EDITS[:1])
    (before,) = method.originals.changed().values()
    (again,) = method.edit(EDITS[:1])
    (after,) = method.originals.changed().values()
    assert first.iterations > 0 and first.loss < method.config.stop_loss
    assert again.iterations == 0 and torch.equal(before, after)


def test_edits_of_a_batch_are_trained_together(load: Any) -> None:
    """Unlike lengths, padded on the right: as many steps, each its own loss, both learnt."""
    model, tokenizer = load()
    method = make_method("ft-l", model, tokenizer, batch_size=2, **FAST)
    outcomes = method.edit([EDITS[0], EDITS[3], EDITS[4]])
    assert outcomes[0].iterations == outcomes[1].iterations
    assert outcomes[0].seconds == outcomes[1].seconds != outcomes[2].seconds
    method.reset()
    method.edit([EDITS[0], EDITS[3]])
    with torch.no_grad():
        for edit, outcome in zip((EDITS[0], EDITS[3]), outcomes, strict=False):
            assert_close(
                outcome.loss, float(edit_nll(model, tokenizer, edit)), rtol=1e-2, atol=1e-4
            )


def test_bf16_models_are_edited(load: Any) -> None:
    model, tokenizer = load()
    model.to(torch.bfloat16)
    with torch.no_grad():
        before = float(edit_nll(model, tokenizer, EDITS[0]))
    make_method("ft-l", model, tokenizer, **FAST).edit(EDITS[:1])
    with torch.no_grad():
        assert float(edit_nll(model, tokenizer, EDITS[0])) < before / 4


def test_the_penalty_is_eq_3s(lab: SimpleNamespace) -> None:
    """On a layer of three weights, by hand and by finite differences."""
    fisher = torch.tensor([[0.5, 2.0, 0.0]], dtype=torch.float64)
    delta = torch.tensor([[2.0, -1.0, 7.0]], dtype=torch.float64, requires_grad=True)
    penalty = elastic_penalty(delta, fisher, 0.3)
    # 0.3 / 2 * (0.5 * 4 + 2 * 1 + 0 * 49)
    assert_close(penalty.item(), 0.6, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(penalty, delta)
    step = 1e-5
    for i in range(3):
        shift = torch.zeros_like(delta)
        shift[0, i] = step
        ahead, behind = (elastic_penalty(delta + s, fisher, 0.3) for s in (shift, -shift))
        assert_close(
            float(gradient[0, i]), ((ahead - behind) / (2 * step)).item(), rtol=0, atol=1e-6
        )


def test_fisher_is_the_squared_gradient_of_each_text(load: Any, few_texts: tuple[str, ...]) -> None:
    """Neutral texts on the unedited model, then a tenth of the edit's on the edited one."""
    model, tokenizer = load()
    layer = layer_path(model)
    texts = [encode_prompt(tokenizer, text) for text in few_texts]
    texts = [ids for ids in texts if len(ids) > 1]
    assert len(texts) == len(few_texts) - 1
    neutral = torch.stack(
        [squared_gradient(model, layer, mean_nll(model, ids[:1], ids[1:])) for ids in texts]
    ).mean(0)
    method = make_method("ft-ewc", model, tokenizer, steps=1, learning_rate=1e-3)
    assert method.fisher is None
    expected = neutral
    edits = torch.zeros_like(neutral)
    for edit in EDITS[:2]:
        (outcome,) = method.edit([edit])
        newest = squared_gradient(model, layer, edit_nll(model, tokenizer, edit))
        edits = 0.9 * edits + 0.1 * newest
        expected = neutral + edits
        assert_close(method.fisher, expected, rtol=1e-3, atol=1e-9)
    assert "fisher" in outcome.seconds
    method.reset()
    assert_close(method.fisher, neutral, rtol=1e-3, atol=1e-9)


def test_elasticity_keeps_the_weights_that_matter(load: Any) -> None:
    moved = []
    for elasticity in (0.0, 1e6):
        method = make_method("ft-ewc", *load(), elasticity=elasticity, steps=20, stop_loss=0.0)
        method.edit(EDITS[:1])
        (delta,) = method.originals.changed().values()
        method.reset()  # leaves the neutral texts' information
        moved.append(float((method.fisher * delta.square()).sum()))
    assert moved[1] < moved[0] / 10


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("ft-l", {"norm_constraint": -1.0}, "norm_constraint is -1.0: give a number >= 0"),
        ("ft-l", {"batch_size": 0}, "batch_size is 0: give a whole number >= 1"),
        ("ft-ewc", {"elasticity": "much"}, "elasticity is 'much': give a number"),
        ("ft-ewc", {"memory": 0}, "memory is 0: give a whole number >= 1"),
    ],
)
def test_bad_settings(load: Any, name: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, *load(), **chosen)
