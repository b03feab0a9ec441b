"""Prompts as users write them: the data files are whole, and what they become as tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import asked as prompts
from bench.asked import Asked
from wise_ext import models
from wise_ext.editing.edits import demo_edits
from wise_ext.errors import DataError

FACTS = {edit.id: edit for edit in demo_edits()}
ASKED = prompts.read_asked()
TEMPT = {"unrelated", "same_subject", "same_relation"}


# -- the files -----------------------------------------------------------------------------------


def test_every_prompt_is_well_formed() -> None:
    assert len({a.id for a in ASKED}) == len(ASKED)
    assert len({(a.form, a.text, a.before, a.first) for a in ASKED}) == len(ASKED)
    for a in ASKED:
        assert a.kind in prompts.KINDS, a.id
        assert a.form in prompts.FORMS, a.id
        assert a.text.strip() == a.text, a.id
        assert bool(a.facts) == (a.case in prompts.POSITIVE), a.id
        assert (a.case in prompts.NEGATIVE) != bool(a.facts), a.id
        assert set(a.facts) <= FACTS.keys(), a.id
        assert (a.about in FACTS) == (a.case not in ("edit", "unrelated")), a.id
        assert (a.first is not None) == (a.kind == "later_turn"), a.id


def test_every_kind_asks_every_fact_and_tempts_as_often() -> None:
    for kind in prompts.KINDS:
        own = [a for a in ASKED if a.kind == kind]
        cases = Counter(a.case for a in own)
        assert {name for a in own if a.case == "edit" for name in a.facts} == FACTS.keys(), kind
        assert cases.keys() >= TEMPT, kind
        assert sum(cases[case] for case in prompts.NEGATIVE) >= 24, kind
    assert sum(a.case == "mentioned" for a in ASKED) == 24
    assert Counter(a.kind for a in ASKED if a.case == "open") == {"bare": 24, "chat": 24}
    assert all(len(a.facts) == 2 for a in ASKED if a.kind == "two_facts" and a.facts)


def test_a_subject_is_there_where_it_is_said_to_be() -> None:
    for a in ASKED:
        whole = " ".join([a.text, a.first or "", *(content for _, content in a.before)]).lower()
        if a.kind in ("typo", "language"):  # misspelt, or called otherwise
            continue
        for name in a.facts:
            assert str(FACTS[name].subject).lower() in a.text.lower(), a.id
        if a.about is None:
            assert a.facts or not any(str(e.subject).lower() in whole for e in FACTS.values()), a.id
            continue
        subject = str(FACTS[a.about].subject).lower()
        assert (subject in a.text.lower()) == (a.case in ("same_subject", "open")), a.id
        assert (subject in whole) == (a.case != "same_relation"), a.id


def test_long_conversations_are_long_and_the_subject_comes_early() -> None:
    for a in ASKED:
        if a.kind != "long":
            continue
        words = [len(content.split()) for _, content in a.before]
        assert sum(words) > 300, a.id
        assert [role for role, _ in a.before] == ["user", "assistant"] * (len(words) // 2)
        if a.case == "mentioned":
            early = a.before[0][1].lower()
            assert str(FACTS[a.about or ""].subject).lower() in early, a.id


def test_texts_from_elsewhere_say_nothing_of_the_facts() -> None:
    texts = prompts.read_elsewhere()
    kinds = Counter(text.kind for text in texts)
    assert len(kinds) >= 8
    assert min(kinds.values()) >= 12
    assert len({t.id for t in texts}) == len({t.text for t in texts}) == len(texts)
    for text in texts:
        assert not any(str(e.subject).lower() in text.text.lower() for e in FACTS.values()), text.id
        assert 150 <= len(text.text) <= 1100, text.id


def test_a_piece_that_is_not_there(tmp_path: Path) -> None:
    line = {"id": "x", "kind": "long", "case": "unrelated", "facts": [], "form": "text"}
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({**line, "text": "Why?", "after": "nowhere"}))
    with pytest.raises(DataError, match="x comes after 'nowhere'"):
        prompts.read_asked(file)


# -- token ids -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(model_dir: Path) -> tuple[Any, Any]:
    return models.load_model(str(model_dir), device="cpu")


def some(kind: str, case: str = "edit", form: str = "text") -> Asked:
    return next(a for a in ASKED if (a.kind, a.case, a.form) == (kind, case, form))


def test_prompts_as_text(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    bare, system, long = some("bare"), some("system"), some("long")
    assert tokenizer.decode(prompts.encode(tokenizer, bare)) == bare.text
    above = system.before[0][1]
    assert tokenizer.decode(prompts.encode(tokenizer, system)) == f"{above}\n\n{system.text}"
    text = tokenizer.decode(prompts.encode(tokenizer, long))
    assert text.startswith(f"User: {long.before[0][1]}\nAssistant: {long.before[1][1]}\nUser: ")
    assert text.endswith(f"\nUser: {long.text}\nAssistant:")


def test_prompts_in_the_template(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    chat = some("chat", form="chat")
    assert tokenizer.decode(prompts.encode(tokenizer, chat)) == f"Q: {chat.text}\nA:"
    bare = replace(chat, form="text")
    tokenizer_without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert prompts.encode(tokenizer_without, bare)
    with pytest.raises(DataError, match="no chat template"):
        prompts.encode(tokenizer_without, chat)


@pytest.mark.parametrize("form", prompts.FORMS)
def test_a_dialogue_goes_on_where_its_first_turn_ended(tiny: tuple[Any, Any], form: str) -> None:
    _, tokenizer = tiny
    asked = some("later_turn", form=form)
    first = tokenizer.decode(prompts.encode(tokenizer, asked))
    second = tokenizer.decode(prompts.encode(tokenizer, asked, "So be it."))
    assert second.startswith(first)
    assert asked.text not in first
    assert second.index(str(asked.first)) < second.index("So be it.") < second.index(asked.text)
