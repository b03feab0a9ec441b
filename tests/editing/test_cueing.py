"""Who has a cue: every edit but those that answer one question differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.editing.facts import EDITS, QUICK, answer, edits_of
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.editing.cueing import cue_numbers
from wise_ext.editing.workshop import Workshop
from wise_ext.memory import NO_CUE, cue_number
from wise_ext.models import force_route, last_decision, patch, prompt_lengths

HEAD, PLACE = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
UNKNOWN = torch.zeros(2)


def edit(name: str, prompt: str, target: str, subject: str | None = "Arbor Mills") -> Edit:
    return Edit(name, prompt, target, subject)


def numbers(*pairs: tuple[Edit, Tensor]) -> list[int]:
    made = cue_numbers([e for e, _ in pairs], [asked for _, asked in pairs])
    return [made[" ".join(e.prompt.split())] for e, _ in pairs]


def test_everyone_has_a_cue_of_its_own() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    second = edit("b", "Bern Works is led by", "Ben", "Bern Works")
    assert numbers((first, HEAD), (second, HEAD)) == [
        cue_number("Arbor Mills is led by"),
        cue_number("Bern Works is led by"),
    ]


def test_two_answers_to_one_question_are_contested() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    second = edit("b", "Who is at the head of arbor  mills?", "Ben", " arbor mills")
    assert numbers((first, HEAD), (second, HEAD)) == [NO_CUE, NO_CUE]
    assert numbers((first, HEAD), (second, UNKNOWN)) == [NO_CUE, NO_CUE]


def test_another_question_or_the_same_answer_is_not() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    seat = edit("b", "Arbor Mills has its seat in", "Graz")
    again = edit("c", "Who is at the head of Arbor Mills?", " ann ")
    nobody = edit("d", "Arbor Mills is in the hands of", "Ben", None)
    assert NO_CUE not in numbers((first, HEAD), (seat, PLACE), (again, HEAD), (nobody, HEAD))


def test_who_answers_a_prompt_anew_takes_its_cue() -> None:
    first = edit("a", "Arbor Mills is led by", "Ann")
    anew = edit("b", " Arbor Mills is  led by", "Ben")
    own = cue_number("Arbor Mills is led by")
    assert numbers((first, HEAD), (anew, HEAD)) == [own, own]
    # What no longer holds contests nothing.
    other = edit("c", "Who is at the head of Arbor Mills?", "Ben")
    assert NO_CUE not in numbers((first, HEAD), (anew, HEAD), (other, HEAD))


def test_a_cue_comes_back_when_what_contested_it_is_undone(load: Any) -> None:
    config = WiseConfig(shard_size=2, batch_size=1, **QUICK)
    editor = Editor(*load(), config)
    told = [
        Edit("a", "The river through Lumo is", "the Senna", "Lumo"),
        EDITS[1],
        Edit("a2", "The river through  Lumo is the", "Orla", "Lumo"),
    ]
    editor.edit(told, progress=False)
    own = {e.id: cue_number(e.prompt) for e in told}
    assert _cues(editor) == {"a": NO_CUE, "b": own["b"], "a2": NO_CUE}
    assert [answer(editor.model, load()[1], e.prompt) for e in told] == [
        "the Senna",
        "Ines Hult",
        "Orla",
    ]
    editor.undo("a2")
    assert _cues(editor) == {"a": own["a"], "b": own["b"]}
    assert answer(editor.model, load()[1], told[0].prompt) == "the Senna"


def test_without_cues_none_enter(load: Any) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(cue=0.0, **QUICK))
    editor.edit(edits_of("a b"), progress=False)
    assert editor.memory.cue == 0.0
    assert [answer(model, tokenizer, e.prompt) for e in edits_of("a b")] == [
        "the Senna",
        "Ines Hult",
    ]
    model(**tokenizer(EDITS[0].prompt, return_tensors="pt"))
    decision = last_decision(model)
    assert decision is not None and decision.route.tolist() == [0]
    assert decision.cue.tolist() == [NO_CUE]


def test_what_is_trained_is_what_answers(load: Any) -> None:
    """The replay of a cued row, and the patched model's own logits."""
    model, tokenizer = load()
    shop = Workshop(model, tokenizer, WiseConfig(**QUICK))
    shard, told = shop.writer.open(0), edits_of("a b")
    shop.writer.write(shard, told)
    memory = shop.empty_memory()
    assert memory.key_index is not None and memory.cue > 0
    practised = [shop.coach.practice(e) for e in told]
    memory.add_shard(shard.seal(0.0))
    memory.key_index.add_worded([p.addresses for p in practised], [0, 0], ["a", "b"])
    memory.key_index.place([0] * len(memory.key_index), _numbers(memory.key_index.ids, told))
    replayed = shop.coach.engine.run([p.bare for p in practised], shard.delta, shard.mask_bits)
    patch(model, memory)
    for row, p in enumerate(practised):
        assert p.bare.cue is not None
        prompt = tokenizer(p.edit.prompt)["input_ids"]
        ids = torch.tensor([[*prompt, *p.bare.labels[:-1].tolist()]])
        with torch.no_grad(), prompt_lengths(model, [len(prompt)]):
            logits = model(ids).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(
            logits, replayed.logits[replayed.row == row].detach(), rtol=1e-3, atol=1e-3
        )
        with torch.no_grad(), force_route(model, 0):
            assert not torch.allclose(model(ids).logits[0, len(prompt) - 1 :], logits, atol=1e-2)


def _numbers(ids: list[str], told: list[Edit]) -> list[int]:
    of_edit = {e.id: cue_number(e.prompt) for e in told}
    return [of_edit[name] for name in ids]


def _cues(editor: Editor) -> dict[str, int]:
    index = editor.memory.key_index
    assert index is not None
    return dict(zip(index.ids, index.cues.tolist(), strict=True))
