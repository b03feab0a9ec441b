"""What an edit is practised on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wise_ext import Edit, WiseConfig
from wise_ext.editing.contexts import in_context, shorter
from wise_ext.editing.practice import Coach
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.wordings import relations
from wise_ext.models import layer_path

EDIT = Edit("a", "The river through Lumo is", "the Senna", locality_prompt="The sky is")
CONTEXTS = [f"It was number {i}" for i in range(8)]


@pytest.fixture(scope="module")
def make(model_dir: Path) -> Any:
    """A coach with these settings, and what it has its engine capture, decoded."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    engine = SuffixEngine(model, layer_path(model, 2), layer_path(model, 0))

    def coach(**changes: Any) -> Coach:
        return Coach(engine, tokenizer, WiseConfig(**changes), CONTEXTS)

    coach.tokenizer = tokenizer  # type: ignore[attr-defined]
    return coach


def _texts(coach: Coach, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(prompt, target) of each row that practising an edit captures, in order."""
    seen: list[tuple[str, str]] = []
    capture, decode = coach.engine.capture, coach._tokenizer.decode

    def spy(prompts: Any, targets: Any, in_half: bool = False) -> Any:
        # What the edit is, and what margins keep it apart from, is captured exactly.
        assert in_half == (coach.in_half and bool(seen))
        seen.extend((decode(p), decode(t)) for p, t in zip(prompts, targets, strict=True))
        return capture(prompts, targets, in_half)

    with monkeypatch.context() as patch:
        patch.setattr(coach.engine, "capture", spy)
        coach.practice(edit)
    return seen


def test_rows_of_an_edit(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    coach = make(contexts_per_edit=3)
    texts = _texts(coach, EDIT, monkeypatch)
    assert texts[0] == (EDIT.prompt, " the Senna</s>")
    # The chat template's turn has an answer of its own: no space in front.
    assert texts[-2] == (f"Q: {EDIT.prompt}\nA:", "the Senna</s>")
    words = texts[-1][0].split()
    assert "Lumo" in words and len(words) < 5 and texts[-1][1] == " the Senna</s>"
    drawn = [text for text, _ in texts[1:-2]]
    assert len(set(drawn)) == 3
    assert set(drawn) <= {in_context(context, EDIT.prompt) for context in CONTEXTS}
    practice = coach.practice(EDIT)
    assert len(practice.contexts) == 4 and len(practice.wordings) == 1
    assert practice.unrelated is None
    assert coach.practice(EDIT) is practice
    target = encode_target(make.tokenizer, EDIT.target_new)
    assert practice.bare.labels.tolist() == target
    (address,) = practice.addresses
    assert address.ids.tolist() == encode_prompt(make.tokenizer, EDIT.prompt)


def test_each_edit_draws_contexts_of_its_own(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(name: str, **changes: Any) -> list[str]:
        edit = Edit(name, EDIT.prompt, EDIT.target_new)
        coach = make(contexts_per_edit=3, shortened=0, chat_context=False, **changes)
        # Neither the company nor the order decides.
        coach.practice(Edit("other", "Who?", "Ines"))
        return [text for text, _ in _texts(coach, edit, monkeypatch)]

    assert drawn("a") == drawn("a")
    assert len({tuple(drawn(name)) for name in "abcdefgh"}) > 4
    assert len({tuple(drawn("a", seed=seed)) for seed in range(8)}) > 4
    assert len(drawn("a")) == 4


def test_margins_bring_an_unrelated_prompt(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    coach = make(margins=True, contexts_per_edit=2)
    texts = _texts(coach, EDIT, monkeypatch)
    assert len(texts) == 6 and texts[1] == ("The sky is", "")
    practice = coach.practice(EDIT)
    assert practice.unrelated is not None and len(practice.contexts) == 3
    assert len(practice.unrelated.labels) == 0
    assert practice.locality_prompt == "The sky is"
    bare = coach.practice(Edit("b", EDIT.prompt, EDIT.target_new))
    assert bare.locality_prompt


def test_contexts_of_the_chat_template(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything is in the template already.
    coach = make(chat_template=True, contexts_per_edit=2, shortened=0)
    texts = _texts(coach, EDIT, monkeypatch)
    assert len(texts) == 3 and all(text.startswith("Q: ") for text, _ in texts)
    coach = make(contexts_per_edit=0, contexts_per_round=0, shortened=0, chat_context=False)
    assert [text for text, _ in _texts(coach, EDIT, monkeypatch)] == [EDIT.prompt]
    # A tokenizer without a template is none the worse.
    template, make.tokenizer.chat_template = make.tokenizer.chat_template, None
    try:
        coach = make(contexts_per_edit=1, shortened=0)
        assert len(_texts(coach, EDIT, monkeypatch)) == 2
    finally:
        make.tokenizer.chat_template = template


def test_the_chat_template_hardly_changes_what_is_asked(make: Any) -> None:
    name = "Mina Torvald"
    texts = [r.wordings[1].format(name) for r in relations()[:40] if r.kind == "person"]
    coach, likeness = make(), {}
    bare, chat = (coach.keys(texts, [name] * len(texts), chat=c) for c in (False, True))
    template = make.tokenizer.chat_template
    for known in (True, False):
        make.tokenizer.chat_template = template if known else None
        try:
            index = make().empty_index()
        finally:
            make.tokenizer.chat_template = template
        pairs = zip(bare, chat, strict=True)
        each = [float(index.asks(one) @ index.asks(other)) for one, other in pairs]
        likeness[known] = sum(each) / len(each)
    assert len(texts) > 5 and likeness[True] > likeness[False] + 0.03


def test_an_edit_of_the_same_name_is_captured_anew(make: Any) -> None:
    coach = make(contexts_per_edit=1)
    first = coach.practice(EDIT)
    second = coach.practice(Edit("a", EDIT.prompt, "the Orla"))
    assert not torch.equal(first.bare.labels, second.bare.labels)
    coach.forget()
    assert coach.practice(EDIT) is not first


@pytest.mark.parametrize(
    ("prompt", "subject", "stays"),
    [
        ("Which river runs through old Lumo?", "Lumo", {"Lumo?"}),
        ("Which river runs through old lumo-town?", "Old Lumo", {"old", "lumo-town?"}),
        # Without a subject, or with one that the prompt does not name.
        ("Which river runs through Lumo in 1950?", None, {"Lumo", "1950?"}),
        ("Which river runs through Lumo?", "the capital", {"Lumo?"}),
    ],
)
def test_a_shorter_wording_keeps_the_subject(prompt: str, subject: str, stays: set[str]) -> None:
    words = prompt.split()
    left = [shorter(prompt, subject, random.Random(seed)) for seed in range(40)]
    for text in left:
        assert text is not None
        kept = text.split()
        assert stays <= set(kept) and len(kept) < len(words)
        assert kept == [word for word in words if word in kept]
    # Every other word is left out now and then, and stays now and then.
    for word in set(words) - stays:
        assert 0 < sum(word in str(text).split() for text in left) < 40


@pytest.mark.parametrize(
    "prompt", ["Lumo", "Lumo Vale", "what is it", "\u6771\u4eac\u306e\u5ddd\u306f"]
)
def test_no_shorter_wording_where_every_word_may_matter(prompt: str) -> None:
    assert shorter(prompt, "Lumo Vale", random.Random(0)) is None


@pytest.mark.parametrize(
    ("changes", "half"),
    [({}, True), ({"stop_margin": 0.5}, False), ({"early_stop": False}, False)],
)
def test_half_precision_takes_a_margin(make: Any, changes: dict[str, Any], half: bool) -> None:
    assert make(**changes).in_half == half
