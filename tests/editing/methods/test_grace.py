"""GRACE in a model: values where a prompt ends, nothing anywhere else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.editing.facts import answer
from tests.editing.methods.facts import FACTS
from wise_ext import Edit
from wise_ext.editing.methods import make_method
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.errors import ConfigError
from wise_ext.evaluation.generation import generate_answers
from wise_ext.models import get_module

UNRELATED = ["The largest ocean is", "Who?", "A list of seven colours and of two rivers:", "Red"]


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def test_an_edit_is_generated_alone_and_in_batches(taught: Any) -> None:
    """With a cache, padded or not, by our decoder and by transformers' own."""
    model, tokenizer = taught()
    asked = [edit.prompt for edit in FACTS] + UNRELATED
    unedited = [a.text for a in generate_answers(model, tokenizer, asked, max_new_tokens=12)]
    with make_method("grace", model, tokenizer) as method:
        method.edit(FACTS)
        expected = [edit.target_new for edit in FACTS] + unedited[len(FACTS) :]
        for size in (1, 3, len(asked)):
            answers = generate_answers(model, tokenizer, asked, batch_size=size, max_new_tokens=12)
            assert [a.text.strip() for a in answers] == [text.strip() for text in expected]
        assert [answer(model, tokenizer, e.prompt) for e in FACTS] == expected[: len(FACTS)]
        assert unedited[: len(FACTS)] != expected[: len(FACTS)]
    assert [
        a.text for a in generate_answers(model, tokenizer, asked, max_new_tokens=12)
    ] == unedited


def test_what_no_radius_holds_keeps_its_bits(taught: Any, lab: SimpleNamespace) -> None:
    model, tokenizer = taught()
    rows = [encode_prompt(tokenizer, prompt) for prompt in UNRELATED]
    batches = [lab.padded(rows), lab.padded(rows, left=False), {"input_ids": torch.tensor([[9]])}]
    before = [logits(model, **batch) for batch in batches]
    method = make_method("grace", model, tokenizer, steps=2)
    method.edit(FACTS)
    assert all(
        torch.equal(old, logits(model, **batch)) for old, batch in zip(before, batches, strict=True)
    )
    edited = torch.tensor([encode_prompt(tokenizer, FACTS[0].prompt)])
    with_edit = logits(model, input_ids=edited)
    method.reset()
    plain = logits(model, input_ids=edited)
    # Only the prompt's last token feels the value: what comes before it cannot.
    assert torch.equal(with_edit[:, :-1], plain[:, :-1])
    assert not torch.allclose(with_edit[:, -1], plain[:, -1])


@pytest.mark.parametrize("left", [True, False])
def test_pads_do_not_move_the_key(taught: Any, lab: SimpleNamespace, left: bool) -> None:
    model, tokenizer = taught()
    make_method("grace", model, tokenizer, steps=2).edit(FACTS)
    rows = [encode_prompt(tokenizer, text) for text in (FACTS[0].prompt, "Who?", FACTS[2].prompt)]
    batch = lab.padded(rows, left=left)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = logits(model, **batch, position_ids=positions)
    for row, own, mask in zip(rows, found, batch["attention_mask"], strict=True):
        alone = logits(model, input_ids=torch.tensor([row]))[0]
        assert_close(own[mask == 1], alone, rtol=1e-4, atol=1e-4)


def test_the_value_stands_where_the_prompt_ends_and_is_held(taught: Any) -> None:
    """With a radius that holds every key: later tokens are not looked up, a new turn is."""
    model, tokenizer = taught()
    method = make_method("grace", model, tokenizer, steps=2, radius=1e4)
    method.edit(FACTS[:1])
    (value,) = method.codebook.values
    prompt, following = [20, 21, 22, 23], [30, 31, 32]

    def by_hand(ids: list[int], places: list[int]) -> torch.Tensor:
        plain, _ = taught()

        def put(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output[0, places] = value
            return output

        get_module(plain, method.layer).register_forward_hook(put)
        return logits(plain, input_ids=torch.tensor([ids]))[0]

    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt]), use_cache=True)
        seen, cache = [output.logits[0]], output.past_key_values
        for token in following:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            seen.append(output.logits[0])
    expected = by_hand(prompt + following, [3])
    assert_close(torch.cat(seen), expected, rtol=1e-4, atol=1e-4)
    # A turn that goes on with the cache ends in a key of its own.
    turn = [40, 41]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([turn]), past_key_values=cache)
    expected = by_hand(prompt + following + turn, [3, 8])[-2:]
    assert_close(output.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_told_is_the_edited_models(lab: SimpleNamespace, taught: Any) -> None:
    """On every architecture: post-norms, flattened rows, turned weights."""
    _, tokenizer = taught()
    edit = Edit("a", "The river", "Senna")
    prompt, target = encode_prompt(tokenizer, edit.prompt), encode_target(tokenizer, "Senna")
    for name in lab.names:
        model = lab.make_model(name, vocab_size=500)
        method = make_method("grace", model, tokenizer, steps=3, stop_loss=0.0)
        (outcome,) = method.edit([edit])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt]), use_cache=True)
            predicted = [output.logits[0, -1]]
            for token in target[:-1]:
                output = model(
                    input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values
                )
                predicted.append(output.logits[0, -1])
        loss = F.cross_entropy(torch.stack(predicted), torch.tensor(target))
        assert_close(outcome.loss, float(loss), rtol=1e-3, atol=1e-3, msg=name)
        assert outcome.iterations == 3


def test_the_same_question_again(taught: Any) -> None:
    """With its answer it shares the entry, and holds already; with another it takes it over."""
    model, tokenizer = taught()
    method = make_method("grace", model, tokenizer)
    method.edit(FACTS[1:2])
    (again,) = method.edit([replace(FACTS[1], id="again")])
    assert again.iterations == 0 and len(method.codebook) == 1
    method.edit([replace(FACTS[1], id="corrected", target_new=FACTS[2].target_new)])
    assert len(method.codebook) == 1
    assert answer(model, tokenizer, FACTS[1].prompt) == FACTS[2].target_new


def test_close_questions_with_other_answers_are_told_apart(taught: Any) -> None:
    model, tokenizer = taught()
    twin = Edit("twin", "The colour of the Pelt flag is", FACTS[2].target_new)
    method = make_method("grace", model, tokenizer, radius=1e3)
    method.edit([FACTS[1], twin])
    assert len(method.codebook) == 2
    distance = float((method.codebook.keys[0] - method.codebook.keys[1]).norm())
    assert method.codebook.radii.tolist() == pytest.approx([distance / 2] * 2)
    for edit in (FACTS[1], twin):
        assert answer(model, tokenizer, edit.prompt) == edit.target_new


def test_same_seed_same_values(taught: Any) -> None:
    values = []
    for seed in (0, 0, 1):
        method = make_method("grace", *taught(), steps=2, seed=seed)
        method.edit(FACTS[:2])
        values.append(method.codebook.values)
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[0], values[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0: give a number > 0"),
        ({"seed": -1}, "seed is -1: give a whole number >= 0"),
    ],
)
def test_bad_settings(taught: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method("grace", *taught(), **settings)


def test_an_interrupted_edit_leaves_the_codebook_as_it_was(
    taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = taught()
    method = make_method("grace", model, tokenizer)
    method.edit(FACTS[1:2])

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        method.edit(FACTS[:1])
    assert len(method.codebook) == 1
    assert answer(model, tokenizer, FACTS[1].prompt) == FACTS[1].target_new
