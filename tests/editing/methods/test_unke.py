"""UnKE: a block is trained to put out shifted states, and the rest as before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.editing.methods.facts import FACTS
from tests.editing.methods.test_base import state
from tests.editing.methods.test_least_squares import LONG, says
from wise_ext.editing.anatomy import first
from wise_ext.editing.methods import make_method
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.errors import ConfigError
from wise_ext.models import get_module, layer_path

EAGER: dict[str, Any] = {"layer": 2, "steps": 60, "step": 0.2, "clamp": 20.0, "decay": 0.0}
FIT: dict[str, Any] = {"fit_rate": 1e-3, "fit_steps": 150, "fit_decay": 0.0, "preserved": 4}


def block_output(model: Any, block: int, ids: list[int]) -> Tensor:
    """What a block puts out for one text [t, d_model]."""
    seen: list[Tensor] = []
    path = layer_path(model, block)
    parts = path.split(".")
    module = get_module(model, ".".join(parts[: parts.index(str(block)) + 1]))
    hook = module.register_forward_hook(lambda m, args, out: seen.append(first(out)[0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0]


def test_edits_take_and_accumulate_and_go(taught: Any) -> None:
    model, tokenizer = taught()
    before = state(model)
    method = make_method("unke", model, tokenizer, **EAGER, **FIT)
    (outcome,) = method.edit(FACTS[:1])
    assert says(model, tokenizer, FACTS[0])
    once = method.originals.changed()
    method.edit(FACTS[1:2])
    assert says(model, tokenizer, FACTS[1])
    # All weights of the block, and no other.
    block = method.layer.removesuffix(".mlp.down_proj")
    names = {f"{block}.{name}" for name, _ in get_module(model, block).named_parameters()}
    assert set(once) == names
    assert set(method.originals.changed()) == names
    assert set(outcome.seconds) == {"seek", "fit", "write"}
    assert outcome.loss < 0.2
    method.reset()
    assert state(model) == before
    assert [outcome.loss] == [again.loss for again in method.edit(FACTS[:1])]


@pytest.mark.parametrize(
    "pieces",
    [{"chunks": "windows"}, {"chunks": "windows", "schedule": "together"}, {"chunks": "sentences"}],
    ids=["windows", "together", "sentences"],
)
def test_long_answers(taught: Any, pieces: dict[str, Any]) -> None:
    model, tokenizer = taught()
    settings = EAGER | FIT | {"fit_steps": 400, "steps": 100} | pieces
    method = make_method("anyedit-unke", model, tokenizer, window=1, margin=4.0, **settings)
    method.edit([LONG])
    assert says(model, tokenizer, LONG)


def test_the_block_puts_out_what_was_wished_for(
    lab: SimpleNamespace, taught: Any, architecture: str
) -> None:
    """The shifted state at the key token, and what it was elsewhere and on other texts."""
    _, tokenizer = taught()
    model = lab.make_model(architecture, vocab_size=len(tokenizer))
    settings = EAGER | FIT | {"layer": 1, "steps": 5, "clamp": 1.0, "preserved": 3}
    method = make_method("unke", model, tokenizer, **settings)
    (wish,) = method._seeker.wishes(method._lessons(FACTS[:1]))
    (text,), (place,) = wish.texts, wish.places
    assert place.tolist() == [len(text) - 1]
    passing, goal = method._edited([wish])
    others = [encode_prompt(tokenizer, prompt) for prompt in neutral_prompts()[:3]]
    before = [block_output(model, 1, ids) for ids in (text, *others)]
    if method._engine.additive:
        assert_close(goal[-1] - before[0][-1], wish.values[0], rtol=1e-3, atol=1e-3)
    assert_close(goal[:-1], before[0][:-1], rtol=1e-3, atol=1e-3)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    method.edit(FACTS[:1])
    after = [block_output(model, 1, ids) for ids in (text, *others)]
    asked = F.mse_loss(goal[-1], before[0][-1])
    assert F.mse_loss(after[0][-1], goal[-1]) < 0.1 * asked
    for new, old in zip(after[1:], before[1:], strict=True):
        assert F.mse_loss(new, old) < 0.1 * asked
    assert passing.real.all()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, untouched[k])}
    assert changed
    assert all(method._path in name for name in changed)


def test_pads_count_for_nothing(taught: Any) -> None:
    """The goals of texts of different lengths are those of each alone."""
    model, tokenizer = taught()
    method = make_method("unke", model, tokenizer, preserved=4, **EAGER)
    passing, goal = method._preserved()
    texts = [encode_prompt(tokenizer, text) for text in neutral_prompts()[:4]]
    lengths = [len(text) for text in texts]
    assert passing.real.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1
    wanted = torch.cat([block_output(model, 2, ids) for ids in texts])
    assert_close(goal, wanted, rtol=1e-3, atol=1e-4)


def test_weights_of_16_bits_are_trained_in_fp32(taught: Any) -> None:
    """Steps far below a weight's last bit add up."""
    model, tokenizer = taught()
    model.to(torch.bfloat16)
    settings = EAGER | FIT | {"steps": 5, "fit_rate": 2e-5, "fit_steps": 60}
    method = make_method("unke", model, tokenizer, **settings)
    method.edit(FACTS[:1])
    weight = get_module(model, method.layer).weight
    assert weight.dtype == torch.bfloat16
    delta = method.originals.changed()[f"{method.layer}.weight"]
    assert delta.count_nonzero() > 0.3 * delta.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit_steps": 0}, "fit_steps is 0: give a whole number >= 1"),
        ({"fit_rate": 0.0}, "fit_rate is 0.0: give a number > 0"),
        ({"fit_decay": -1.0}, "fit_decay is -1.0"),
        ({"preserved": -1}, "preserved is -1"),
    ],
)
def test_bad_settings(taught: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method("unke", *taught(), **settings)
