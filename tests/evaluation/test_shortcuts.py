"""What is not run is known: the report equals that of running everything, one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wise_ext.editing.edits import Edit, demo_edits
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.evaluation import evaluate, measuring
from wise_ext.models import decide_routes, disabled, last_route, patch, prompt_lengths

STEPS = 8
OWN = (0, 6)


@pytest.fixture
def edited(
    lab: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, list[Edit]]:
    """A model whose memory knows three prompts, two rephrasings and two neighbours of eight."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    edits = demo_edits()[:8]
    known = [edits[i].prompt for i in (0, 1, 2)]
    known += [str(edits[i].rephrase_prompt) for i in (0, 3)]
    known += [str(edits[i].locality_prompt) for i in (4, 5)]
    patch(model, lab.key_memory(model, [encode_prompt(tokenizer, text) for text in known]))
    made = [
        Edit(
            f"edit-{i + 1}",
            edit.prompt,
            f"own {i}" if i in OWN else edit.target_new,
            edit.subject,
            edit.rephrase_prompt,
            edit.locality_prompt,
            edit.locality_ground_truth or "an answer of some length",
        )
        for i, edit in enumerate(edits)
    ]
    # Some targets are what the edited model says anyway, as a random one never says another.
    own = {f"own {i}": _written(model, tokenizer, edits[i].prompt)[:3] for i in OWN}

    def encode(tokenizer: Any, target: str, stop: bool = True, chat: bool = False) -> list[int]:
        return own.get(target) or encode_target(tokenizer, target, stop, chat)

    monkeypatch.setattr(measuring, "encode_target", encode)
    return model, tokenizer, made


def _written(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=STEPS
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    written = _written(model, tokenizer, prompt)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _forced(model: Any, tokenizer: Any, prompt: str, answer: str, patched: bool) -> list[int]:
    """The greedy tokens, from a pass over prompt and answer."""
    asked = encode_prompt(tokenizer, prompt)
    target = measuring.encode_target(tokenizer, answer, stop=False)
    ids = torch.tensor([asked + target])
    with torch.no_grad():
        if patched:
            with prompt_lengths(model, [len(asked)]):
                logits = model(ids).logits
        else:
            logits = model(ids).logits
    best: list[int] = logits[0, len(asked) - 1 : -1].argmax(-1).tolist()
    return best


def _everything(model: Any, tokenizer: Any, edits: list[Edit]) -> list[dict[str, Any]]:
    rows = []
    for edit in edits:
        row: dict[str, Any] = {}
        target = measuring.encode_target(tokenizer, edit.target_new, stop=False)
        for name, prompt in (("", edit.prompt), ("rephrase_", str(edit.rephrase_prompt))):
            row[f"{name}answer"] = _answer(model, tokenizer, prompt)
            row[f"{name}route"] = int(last_route(model)[0])
            best = _forced(model, tokenizer, prompt, edit.target_new, patched=True)
            score = "generalization" if name else "reliability"
            row[score] = sum(a == b for a, b in zip(best, target, strict=True)) / len(target)
        near, truth = str(edit.locality_prompt), str(edit.locality_ground_truth)
        row["locality_answer"] = _answer(model, tokenizer, near)
        row["locality_route"] = int(last_route(model)[0])
        ours = _forced(model, tokenizer, near, truth, patched=True)
        with disabled(model):
            row["locality_unedited_answer"] = _answer(model, tokenizer, near)
            theirs = _forced(model, tokenizer, near, truth, patched=False)
        row["agree"] = [a == b for a, b in zip(ours, theirs, strict=True)]
        rows.append(row)
    return rows


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_the_report_is_that_of_running_everything(
    edited: tuple[Any, Any, list[Edit]], batch_size: int
) -> None:
    model, tokenizer, edits = edited
    expected = _everything(model, tokenizer, edits)
    report = evaluate(
        model,
        tokenizer,
        edits,
        batch_size=batch_size,
        max_new_tokens=STEPS,
        progress=False,
        details=True,
    )
    for found, row in zip(report.pop("details"), expected, strict=True):
        assert {key: found[key] for key in row if key != "agree"} == {
            key: value for key, value in row.items() if key != "agree"
        }
    # Some prompts of every kind went to a shard and some did not, or this would prove little.
    for key in ("route", "rephrase_route", "locality_route"):
        assert {row[key] >= 0 for row in expected} == {True, False}
    agree = [one for row in expected for one in row["agree"]]
    assert 0 < sum(agree) < len(agree)
    assert report["locality"] == sum(agree) / len(agree)
    same = [row["locality_answer"] == row["locality_unedited_answer"] for row in expected]
    assert report["generation"]["locality"] == sum(same) / len(same) < 1
    assert [i for i, row in enumerate(expected) if row["reliability"] == 1] == list(OWN)
    # Without the texts nothing but less work.
    lean = evaluate(
        model,
        tokenizer,
        edits,
        batch_size=batch_size,
        max_new_tokens=STEPS,
        unedited=False,
        progress=False,
    )
    for key in ("reliability", "generalization", "locality", "generation", "routing"):
        assert lean[key] == report[key]


def test_what_goes_to_main_memory_is_the_unedited_model_bit_for_bit(
    edited: tuple[Any, Any, list[Edit]],
) -> None:
    model, tokenizer, edits = edited
    for edit in edits:
        ids = torch.tensor([encode_prompt(tokenizer, str(edit.locality_prompt))])
        with torch.no_grad():
            logits = model(ids).logits
            with disabled(model):
                plain = model(ids).logits
        main = int(decide_routes(model, ids).route[0]) < 0
        assert torch.equal(logits, plain) is main
