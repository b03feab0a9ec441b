"""Known relations, and the wordings an edit is practised in because of them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from wise_ext import Edit, WiseConfig
from wise_ext.editing.practice import Coach
from wise_ext.editing.prompts import encode_prompt, subject_tokens
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.wordings import examples, moved, relations, reworded
from wise_ext.models import layer_path


def test_every_relation_is_worded_in_several_forms_about_one_subject() -> None:
    wordings = [wording for relation in relations() for wording in relation.wordings]
    assert len(relations()) > 100 and max(Counter(wordings).values()) == 1
    for relation in relations():
        assert len(relation.wordings) >= 2
        assert all(wording.count("{}") == 1 for wording in relation.wordings)
        forms = {wording.endswith("?") for wording in relation.wordings}
        assert forms == {True, False} or relation.kind == "anything", relation
    for relation, made in zip(relations(), examples(), strict=True):
        assert [text for text, _ in made] == [
            wording.format(name) for wording, (_, name) in zip(relation.wordings, made, strict=True)
        ]


def test_rewording_draws_without_repetition() -> None:
    drawn = reworded(0, "Vera {Lund}", 3, random.Random(1))
    assert len(set(drawn)) == 3 and all("Vera {Lund}" in text for text in drawn)
    assert drawn == reworded(0, "Vera {Lund}", 3, random.Random(1))
    assert len(reworded(0, "Vera", 99, random.Random(1))) == len(relations()[0].wordings)


@pytest.fixture(scope="module")
def coach(model_dir: Path) -> Coach:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    engine = SuffixEngine(model, layer_path(model, 2), layer_path(model, 0))
    config = WiseConfig(shortened=0, chat_context=False, contexts_per_edit=0)
    made = Coach(engine, AutoTokenizer.from_pretrained(model_dir), config, [])
    made.empty_index()
    return made


def test_a_recognised_question_is_practised_in_other_words(
    coach: Coach, monkeypatch: pytest.MonkeyPatch
) -> None:
    relation, name = relations()[7], "Mina Torvald"
    seen: list[list[int]] = []
    capture = coach.engine.capture

    def spy(prompts: Any, *rest: Any) -> Any:
        seen.extend(prompts)
        return capture(prompts, *rest)

    monkeypatch.setattr(coach.engine, "capture", spy)
    practice = coach.practice(Edit("a", relation.wordings[1].format(name), "Oda", subject=name))
    others = [coach._tokenizer.decode(ids) for ids in seen[1:]]
    assert len(set(others)) == len(practice.wordings) == 2
    assert set(others) <= {wording.format(name) for wording in relation.wordings}
    key, elsewhere = practice.addresses
    assert key.subject is not None and elsewhere.subject is not None
    for each in (key, elsewhere):
        said = coach._tokenizer.decode(each.ids[each.subject].tolist())
        assert "".join(said.split()) == "MinaTorvald"
    assert coach.empty_index().asks(key).any()


@pytest.mark.parametrize("subject", [None, "Somebody Else", "  "])
def test_without_a_subject_in_the_prompt_there_are_no_other_words(
    coach: Coach, subject: str | None
) -> None:
    edit = Edit(f"b{subject}", relations()[7].wordings[1].format("Mina"), "Oda", subject=subject)
    practice = coach.practice(edit)
    assert practice.wordings == []
    (address,) = practice.addresses
    assert address.subject is None


def test_an_unknown_question_is_left_in_its_own_words(coach: Coach) -> None:
    edit = Edit("c", "zq 77 !! Mina xx", "Oda", subject="Mina")
    assert coach.practice(edit).wordings == []


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("Who taught Mina Torvald?", "Mina Torvald? Who taught"),
        ("mina torvald was taught by", "So, mina torvald was taught by"),
        ("Who taught Ann?", None),
    ],
)
def test_a_name_is_known_at_the_beginning_of_a_text_and_within(
    coach: Coach, prompt: str, other: str | None
) -> None:
    assert moved(prompt, " Mina Torvald") == other
    assert moved("  Mina Torvald, who", "Mina Torvald") == "So, Mina Torvald, who"
    assert moved(prompt, None) is None and moved(prompt, " ") is None
    addresses = coach.addresses(prompt, "Mina Torvald")
    texts = [prompt] if other is None else [prompt, other]
    assert [a.ids.tolist() for a in addresses] == [coach._prompt(text) for text in texts]
    assert len(coach.addresses(prompt, None)) == 1


def test_subject_tokens(coach: Coach) -> None:
    tokenizer = coach._tokenizer
    for prompt, subject in (
        ("Who taught Mina Torvald?", "Mina Torvald"),
        ("who taught mina torvald, and was mina torvald tall?", "Mina Torvald"),
        ("Mina (b. 1950) was", "mina (b. 1950)"),
    ):
        named = subject_tokens(tokenizer, prompt, subject)
        ids = encode_prompt(tokenizer, prompt)
        assert named is not None and len(named) == len(ids)
        inside = [i for i, yes in zip(ids, named, strict=True) if yes]
        said = "".join(tokenizer.decode(inside).split()).lower()
        assert said == "".join(subject.split()).lower() * prompt.lower().count(subject.lower())
    chat = subject_tokens(tokenizer, "Who is Mina?", "Mina", chat=True)
    assert chat is not None and len(chat) == len(encode_prompt(tokenizer, "Who is Mina?", True))
    assert any(chat)
    assert subject_tokens(tokenizer, "Who is it?", "Mina") is None
    assert subject_tokens(tokenizer, "Who is it?", None) is None
