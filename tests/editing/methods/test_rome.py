"""ROME: one association, a change of rank one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.testing import assert_close

from tests.editing.facts import EDITS
from tests.editing.methods.facts import FACTS
from tests.editing.methods.test_base import state
from tests.editing.methods.test_least_squares import says, statistics
from wise_ext import Edit
from wise_ext.editing.methods import make_method
from wise_ext.editing.methods.moments import key_moments
from wise_ext.editing.methods.observing import observe
from wise_ext.editing.methods.rome import Rome, RomeConfig
from wise_ext.editing.methods.seeking import seek_fact
from wise_ext.editing.prompts import encode_prompt
from wise_ext.editing.solving import rank_one
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.models import layer_path

SUBJECT = replace(EDITS[0], subject="Lumo")
EAGER: dict[str, Any] = {"layer": 2, "steps": 60, "step": 0.2, "clamp": 20.0, "decay": 0.0}


def test_edits_take_and_accumulate_and_go(taught: Any) -> None:
    model, tokenizer = taught()
    before = state(model)
    method = make_method("rome", model, tokenizer, contexts=0, **EAGER)
    (first,) = method.edit(FACTS[:1])
    assert says(model, tokenizer, FACTS[0])
    (once,) = method.originals.changed().values()
    assert torch.linalg.matrix_rank(once.double(), rtol=1e-4) == 1
    method.edit(FACTS[1:2])
    assert says(model, tokenizer, FACTS[1])
    assert set(method.originals.changed()) == {f"{method.layer}.weight"}
    assert set(first.seconds) == {"statistics", "seek", "keys", "solve", "write"}
    assert first.loss < 0.2
    method.reset()
    assert state(model) == before
    assert [first.loss] == [outcome.loss for outcome in method.edit(FACTS[:1])]


def test_the_key_is_mapped_to_the_value(
    lab: SimpleNamespace, taught: Any, architecture: str
) -> None:
    """W' k* = W k* + shift, exactly, by Eq. 2; also where a weight is stored turned over."""
    _, tokenizer = taught()
    model = lab.make_model(architecture, vocab_size=len(tokenizer))
    layer = layer_path(model, 1)
    keys = torch.cat([lab.activation(model, layer, row) for row in lab.prompts(30, 40)])
    given = statistics(model, [layer], {layer: keys})
    config = RomeConfig(contexts=2, context_tokens=3, **EAGER | {"steps": 5, "layer": 1})
    method = Rome(model, tokenizer, config, given)
    (wish,) = method._seeker.wishes(method._lessons([SUBJECT]))
    assert len(wish.texts) == 3
    looks = [observe(method._engine, layer, text)[0] for text in wish.texts]
    key = torch.cat([k[at] for k, at in zip(looks, wish.places, strict=True)]).mean(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.edit([SUBJECT])
    (delta,) = method.originals.changed().values()
    delta = delta.T if architecture == "gpt2" else delta
    assert_close(delta @ key, wish.values[0], rtol=1e-3, atol=1e-4)
    wanted = rank_one(key, wish.values[0], given.moments[layer]).float()
    assert_close(delta, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{layer}.weight"}


def test_the_key_token_is_the_subjects_last(taught: Any) -> None:
    model, tokenizer = taught()
    method = make_method("rome", model, tokenizer, contexts=2, **EAGER | {"steps": 1})
    edits = [SUBJECT, replace(SUBJECT, id="x", subject="Zzz"), replace(EDITS[0], id="y")]
    named, absent, none = method._seeker.wishes(method._lessons(edits))
    for wish, last in ((named, "Lumo"), (absent, "is"), (none, "is")):
        for text, place in zip(wish.texts, wish.places, strict=True):
            upto = tokenizer.decode(text[: int(place) + 1])
            assert upto.endswith(last)
            assert not tokenizer.decode(text[: int(place)]).endswith(last)
    assert tokenizer.decode(named.texts[0]) == SUBJECT.prompt
    assert all(tokenizer.decode(text).endswith(SUBJECT.prompt) for text in named.texts)
    assert len({tuple(text) for text in named.texts}) == 3


def test_the_essence_is_kept(taught: Any) -> None:
    """The more it weighs, the less the model's idea of the subject changes."""
    model, tokenizer = taught()
    layer = layer_path(model, 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = SuffixEngine(model, layer)
    (row,) = engine.capture([encode_prompt(tokenizer, "The river Lumo")], [[5, 6]])
    (other,) = engine.capture([encode_prompt(tokenizer, "Lumo is a")], [[5]])
    rows, places = [row, other], [row.prompt_length - 1, other.prompt_length - 1]
    changes = []
    for weight in (0.0, 100.0):
        config = RomeConfig(**EAGER | {"steps": 30, "essence": weight, "stop_loss": 0.0})
        value, rounds, _ = seek_fact(engine, rows, places, 1, config)
        assert rounds == 30
        moved = other.base.index_add(0, torch.tensor([places[1]]), value[None])
        with torch.no_grad():
            was, now = (
                engine.logits(engine.above([other], base)[0]).log_softmax(-1)
                for base in (other.base, moved)
            )
        changes.append(float((was.exp() * (was - now)).sum()))
    assert changes[1] < 0.1 * changes[0]


def test_a_shift_is_clamped_and_stops(taught: Any) -> None:
    model, tokenizer = taught()
    engine = SuffixEngine(model, layer_path(model, 2))
    (row,) = engine.capture([encode_prompt(tokenizer, "The river")], [[5, 6]])
    place = row.prompt_length - 1
    config = RomeConfig(steps=9, step=1.0, clamp=0.5, stop_loss=0.0)
    value, rounds, _ = seek_fact(engine, [row], [place], 1, config)
    assert rounds == 9
    assert float(value.norm()) <= 0.5 * float(row.base[place].norm()) * (1 + 1e-4)
    value, rounds, loss = seek_fact(engine, [row], [place], 1, replace(config, stop_loss=99.0))
    assert (rounds, bool(value.any())) == (0, False)
    assert loss > 1


def test_rome_uses_the_statistics_of_its_layer(taught: Any) -> None:
    model, tokenizer = taught()
    method = make_method("rome", model, tokenizer, contexts=0, **EAGER | {"steps": 3})
    (wish,) = method._seeker.wishes(method._lessons([FACTS[0]]))
    moment = key_moments(model, tokenizer, [method.layer])[method.layer]
    key = observe(method._engine, method.layer, wish.texts[0])[0][wish.places[0]][0]
    method.edit([Edit("x", FACTS[0].prompt, FACTS[0].target_new)])
    (delta,) = method.originals.changed().values()
    wanted = rank_one(key, wish.values[0], moment).float()
    assert_close(delta, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))
