"""The report on long edits: that of running everything, and what a baseline adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.evaluation.facts import EDITS, UNRELATED, measured, written
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.errors import ConfigError, DataError
from wise_ext.evaluation import baseline_of, contains
from wise_ext.evaluation.long_answers import unrelated_prompts
from wise_ext.evaluation.metrics import mean
from wise_ext.evaluation.text_metrics import rouge_l, score_pairs
from wise_ext.models import disabled, get_module, last_route, layer_path, prompt_lengths

MEASURES = ("rouge_l", "rouge_l_recall", "bleu", "similarity", "exact")


def answer(model: Any, tokenizer: Any, prompt: str, *targets: str) -> str:
    room = max(len(encode_target(tokenizer, target, stop=False)) for target in targets) + 32
    text = tokenizer.decode(written(model, tokenizer, prompt, room), skip_special_tokens=True)
    return str(text).strip()


def agreement(model: Any, tokenizer: Any, said: dict[str, list[int]]) -> float:
    """Of what was said, the share that the model says too, one prompt at a time."""
    hits = tokens = 0
    for prompt, answered in said.items():
        asked = encode_prompt(tokenizer, prompt)
        ids = torch.tensor([asked + answered])
        with torch.no_grad():
            logits = model(ids).logits
        best = logits[0, len(asked) - 1 : -1].argmax(-1).tolist()
        hits += sum(a == b for a, b in zip(best, answered, strict=True))
        tokens += len(answered)
    return hits / tokens


@pytest.mark.parametrize("batch_size", [2, 16])
def test_the_report_is_that_of_running_everything(
    patched: Any, tokenizer: Any, batch_size: int
) -> None:
    model = patched
    report = measured(model, tokenizer, batch_size=batch_size, similarity=True, details=True)
    rows: dict[str, dict[str, list[Any]]] = {"edited": {}, "plain": {}}
    routes: dict[str, list[int | None]] = {}
    for name, prompts in (
        ("original", [edit.prompt for edit in EDITS]),
        ("paraphrase", [edit.rephrase_prompt for edit in EDITS]),
    ):
        rows["edited"][name], rows["plain"][name], routes[name] = [], [], []
        for edit, prompt in zip(EDITS, prompts, strict=True):
            if prompt is None:
                rows["edited"][name].append(None)
                rows["plain"][name].append(None)
                routes[name].append(None)
                continue
            rows["edited"][name].append(answer(model, tokenizer, prompt, edit.target_new))
            routes[name].append(int(last_route(model)[0]))
            with disabled(model):
                rows["plain"][name].append(answer(model, tokenizer, prompt, edit.target_new))
    for which, found in (("edited", report), ("plain", report["unedited"])):
        for name, texts in rows[which].items():
            pairs = [
                None if text is None else (text, edit.target_new)
                for text, edit in zip(texts, EDITS, strict=True)
            ]
            scores = score_pairs([pair for pair in pairs if pair])
            for key in MEASURES:
                expected = mean(None if pair is None else scores[pair][key] for pair in pairs)
                assert found[key][name] == pytest.approx(expected, abs=1e-6), (which, key, name)
            if which == "edited":
                for key, values in report["reference"].items():
                    expected = mean(scores[pair]["reference"][key] for pair in pairs if pair)
                    assert values[name] == pytest.approx(expected, abs=1e-6)
    for row, text, plain in zip(
        report["details"], rows["edited"]["original"], rows["plain"]["original"], strict=True
    ):
        assert (row["original"]["answer"], row["unedited"]["original"]["answer"]) == (text, plain)

    parts = [
        (answer(model, tokenizer, question, edit.target_new, expected), expected)
        for edit in EDITS
        for question, expected in zip(edit.sub_question, edit.sub_answer, strict=True)
    ]
    assert [p["answer"] for row in report["details"] for p in row["sub_questions"]] == [
        text for text, _ in parts
    ]
    assert report["sub_question"] == {
        "contains": mean(contains(*pair) for pair in parts),
        "rouge_l_recall": mean(rouge_l(*pair).recall for pair in parts),
    }

    with disabled(model):
        said = {prompt: written(model, tokenizer, prompt, 32) for prompt in UNRELATED}
    hits = []
    for prompt, answered in said.items():
        with prompt_lengths(model, [len(encode_prompt(tokenizer, prompt))]):
            hits.append(agreement(model, tokenizer, {prompt: answered}) * len(answered))
    assert report["locality"] == pytest.approx(sum(hits) / sum(map(len, said.values())))
    assert 0.4 < report["locality"] < 1

    # Some prompts of every kind went to a shard and some did not, or this would prove little.
    assert [route is not None and route >= 0 for route in routes["original"]] == [True, False, True]
    assert routes["paraphrase"] == [-1, None, 2]
    assert report["routing"] == {
        "edit_to_side": pytest.approx(2 / 3),
        "paraphrase_to_side": 0.5,
        "unrelated_to_main": 0.5,
        "right_shard": 0.5,  # of the mill and the tower, which the memory has
        "right_shard_paraphrase": 0.0,
    }
    assert (report["n"], report["superseded"]) == (3, 0)
    assert report["seconds"] > 0


def test_a_model_that_says_its_targets(patched: Any, tokenizer: Any) -> None:
    first = measured(patched, tokenizer, max_new_tokens=9, details=True)
    edits = [
        replace(
            edit,
            target_new=row["original"]["answer"],
            rephrase_prompt=edit.prompt,
            sub_question=(edit.prompt,),
            sub_answer=(row["original"]["answer"],),
        )
        for edit, row in zip(EDITS, first["details"], strict=True)
    ]
    report = measured(patched, tokenizer, edits, max_new_tokens=9, similarity=True)
    for key in MEASURES:
        assert report[key] == {"original": pytest.approx(1), "paraphrase": pytest.approx(1)}, key
    for key, values in report["reference"].items():
        assert values["original"] == pytest.approx(1), key
    assert report["sub_question"] == {"contains": 1, "rouge_l_recall": 1}
    assert report["unedited"]["rouge_l"]["original"] < 1 > report["unedited"]["exact"]["original"]


def test_what_is_not_there_makes_no_mean(patched: Any, tokenizer: Any) -> None:
    report = measured(patched, tokenizer, EDITS[1:2], unrelated=[], unedited=False)
    for key in (*MEASURES, *report["reference"]):
        found = report["reference"].get(key) or report[key]
        assert found["paraphrase"] is None
        assert (found["original"] is None) is (key in ("similarity", "cosine")), key
    assert set(report["sub_question"].values()) == {None}
    assert report["locality"] is report["routing"]["unrelated_to_main"] is None
    assert report["routing"]["paraphrase_to_side"] is None
    assert report["routing"]["right_shard"] is None
    assert report["unedited"] == {key: {"original": None, "paraphrase": None} for key in MEASURES}
    without = measured(patched, tokenizer, sub_questions=False)
    assert set(without["sub_question"].values()) == {None}


def disturb(model: Any, scale: float) -> None:
    weight = get_module(model, layer_path(model)).weight
    with torch.no_grad():
        weight += scale * weight.std() * torch.randn(weight.shape)


def test_weights_that_were_changed(bare: Any, tokenizer: Any) -> None:
    baseline = baseline_of(
        bare, tokenizer, EDITS, similarity=False, unrelated=UNRELATED, progress=False
    )
    said = {
        prompt: list(tokens)
        for prompt, tokens in zip(baseline.unrelated, baseline.answers, strict=True)
    }
    assert said == {prompt: written(bare, tokenizer, prompt, 32) for prompt in UNRELATED}

    def report() -> Any:
        return measured(bare, tokenizer, unrelated=None, baseline=baseline, batch_size=3)

    before = report()
    assert before["locality"] == 1
    assert before["unedited"] == {key: before[key] for key in MEASURES}
    assert before["routing"]["edit_to_side"] == 0 and before["routing"]["unrelated_to_main"] == 1
    disturb(bare, 0.3)
    little = report()
    assert little["locality"] == pytest.approx(agreement(bare, tokenizer, said))
    disturb(bare, 5.0)
    much = report()
    assert much["locality"] == pytest.approx(agreement(bare, tokenizer, said))
    assert much["locality"] < little["locality"] < 1
    assert much["unedited"] == before["unedited"]  # what was, not what is
    assert much["rouge_l"] != before["rouge_l"]


def test_without_a_baseline_nothing_is_claimed(bare: Any, tokenizer: Any) -> None:
    report = measured(bare, tokenizer)
    assert report["locality"] is None
    assert report["unedited"]["rouge_l"] == {"original": None, "paraphrase": None}
    unasked = baseline_of(bare, tokenizer, [], similarity=False, progress=False)
    assert unasked.unrelated == unrelated_prompts() and not unasked.scores
    report = measured(bare, tokenizer, unrelated=None, baseline=unasked)
    assert report["locality"] == 1
    assert report["unedited"]["rouge_l"]["original"] is None


def test_a_baseline_is_of_the_model_without_its_memory(patched: Any, tokenizer: Any) -> None:
    report = measured(patched, tokenizer)
    baseline = baseline_of(
        patched, tokenizer, EDITS, similarity=False, unrelated=UNRELATED, progress=False
    )
    beside = measured(patched, tokenizer, unrelated=None, baseline=baseline)
    for key in report.keys() - {"seconds"}:
        assert beside[key] == report[key], key
    # The model under the memory has changed since: main memory is no longer what was.
    disturb(patched, 5.0)
    assert measured(patched, tokenizer, unrelated=None, baseline=baseline)["locality"] < 0.5


@pytest.mark.parametrize("how", ["patched", "bare", "baseline"])
def test_progress_counts_to_its_total(
    how: str, request: pytest.FixtureRequest, bare: Any, tokenizer: Any
) -> None:
    if how == "patched":
        request.getfixturevalue("patched")
    seen: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda *pair: seen.append(pair)  # noqa: E731
    options: dict[str, Any] = {}
    if how == "baseline":
        baseline = baseline_of(
            bare, tokenizer, EDITS, similarity=False, unrelated=UNRELATED, progress=progress
        )
        assert seen[-1] == (9, 9)
        options = {"unrelated": None, "baseline": baseline}
        seen.clear()
    measured(bare, tokenizer, progress=progress, **options)
    total = {"patched": 5 + 3 + 5 + 2 * 4, "bare": 5 + 3 + 4, "baseline": 5 + 3 + 4}[how]
    assert {whole for _, whole in seen} == {total}
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_model_is_left_as_it_was(patched: Any, tokenizer: Any) -> None:
    patched.train()
    expected = measured(patched, tokenizer)
    assert patched.training
    patched.eval()
    assert measured(patched, tokenizer)["rouge_l"] == expected["rouge_l"]


def test_superseded_edits_and_the_chat_template(patched: Any, tokenizer: Any) -> None:
    older = replace(EDITS[0], id="older", target_new="Nothing at all.")
    report = measured(patched, tokenizer, [older, *EDITS], chat=True)
    assert (report["n"], report["superseded"]) == (3, 1)
    assert report["routing"]["edit_to_side"] < 1  # the memory knows the prompts bare


def test_refusals(bare: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no edits to evaluate"):
        measured(bare, tokenizer, [])
    for bad in ({"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            measured(bare, tokenizer, **bad)
        with pytest.raises(ConfigError, match="must be at least 1"):
            baseline_of(bare, tokenizer, EDITS, similarity=False, progress=False, **bad)
    few: dict[str, Any] = {"similarity": False, "unrelated": UNRELATED[:1], "progress": False}
    baseline = baseline_of(bare, tokenizer, EDITS[:1], **few)
    with pytest.raises(ConfigError, match="leave unrelated out"):
        measured(bare, tokenizer, baseline=baseline)
    with pytest.raises(DataError, match="the baseline does not know edit 'code'"):
        measured(bare, tokenizer, unrelated=None, baseline=baseline)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        measured(bare, tokenizer, chat=True)
