"""The harness's model: routes as when generating, figures as HFLM's where nothing is routed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from wise_ext import models
from wise_ext.editing.edits import Edit
from wise_ext.errors import StorageError
from wise_ext.evaluation import generate_answers
from wise_ext.evaluation.scoring import score_rows
from wise_ext.memory import SideMemory
from wise_ext.models import patch
from wise_ext.storage import save_memory

pytest.importorskip("lm_eval", reason='needs pip install "wise-ext[lm-eval]"')

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from wise_ext.integrations.lm_eval.model import WiseLM

UNRELATED = [
    ("Water freezes at a temperature of", " zero degrees"),
    ("The opposite of hot is", " cold"),
    ("The sun rises in the", " east"),
    ("The sun rises in the", " west"),
    ("The sun rises in the", " south"),
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, args, place) for place, args in enumerate(arguments)]


@pytest.fixture
def edited(bare: Any, memory: SideMemory) -> Any:
    patch(bare, memory)
    return bare


def pairs(facts: list[Edit]) -> list[tuple[str, str]]:
    """Contexts that go to the side memory and such that do not, of different lengths."""
    asked = [(f.prompt, f" {f.target_new}") for f in facts]
    return [pair for both in zip(asked, UNRELATED, strict=False) for pair in both]


@pytest.mark.engine("lm-evaluation-harness", "log-likelihoods")
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_score_is_that_of_teacher_forcing(
    edited: Any, tokenizer: Any, facts: list[Edit], size: int
) -> None:
    asked = pairs(facts)
    harness = WiseLM(edited, tokenizer, batch_size=size)
    found = harness.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)

    rows = [harness._encode_pair(*pair) for pair in asked]
    routed = False
    for place, ours in score_rows(edited, rows, 1, likelihood=True):
        assert ours.nll is not None
        assert found[place][0] == pytest.approx(-ours.nll * len(rows[place][1]), abs=1e-3)
        assert found[place][1] == (ours.tokens == rows[place][1])
        routed |= int(models.last_route(edited)[0]) >= 0  # type: ignore[index]
    assert routed
    with models.disabled(edited):
        plain = harness.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    # The facts come first in each pair, and what is not routed is untouched to the digit.
    assert [a != b for a, b in zip(found, plain, strict=True)] == [True, False] * len(facts)


def test_a_memory_of_another_form_of_the_model(
    bare: Any, memory: SideMemory, tokenizer: Any, tmp_path: Path
) -> None:
    save_memory(tmp_path / "m", memory, {}, [], {"name": "in full", "fingerprint": "0" * 16})
    with pytest.raises(StorageError, match="was made for 'in full'"):
        WiseLM(bare, tokenizer, memory=str(tmp_path / "m"))
    assert not models.is_patched(bare)
    WiseLM(bare, tokenizer, memory=str(tmp_path / "m"), check="shape")
    assert models.is_patched(bare)


def test_without_the_memory_it_is_hflm_to_the_digit(
    bare: Any, memory: SideMemory, tokenizer: Any, facts: list[Edit]
) -> None:
    asked = instances("loglikelihood", [*pairs(facts), *UNRELATED])
    texts = instances("loglikelihood_rolling", [(f.prompt,) for f in facts])
    plain = HFLM(pretrained=bare, tokenizer=tokenizer, batch_size=3)
    expected = plain.loglikelihood(asked), plain.loglikelihood_rolling(texts)

    patch(bare, memory)
    harness = WiseLM(bare, tokenizer, batch_size=3)
    with models.disabled(bare):
        assert (harness.loglikelihood(asked), harness.loglikelihood_rolling(texts)) == expected
    unrelated = slice(2 * len(facts), None)
    assert harness.loglikelihood(asked)[unrelated] == expected[0][unrelated]


def test_one_text_cut_in_two_ways_takes_the_route_of_each_context(
    edited: Any, tokenizer: Any, facts: list[Edit]
) -> None:
    """HFLM would read both once: their tokens are the same."""
    prompt = facts[0].prompt
    words = prompt.split(" ")
    early = " ".join(words[:2]), " " + " ".join([*words[2:], "so"])
    late = prompt, " so"
    harness = WiseLM(edited, tokenizer, batch_size=4)
    tokens = [list(chain(*harness._encode_pair(*pair))) for pair in (early, late)]
    assert tokens[0] == tokens[1]
    both = harness.loglikelihood(instances("loglikelihood", [early, late]), disable_tqdm=True)
    alone = [
        harness.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0]
        for pair in (early, late)
    ]
    assert both == alone
    with models.disabled(edited):
        plain = [
            harness.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0]
            for pair in (early, late)
        ]
    assert both[0] == plain[0]  # two words name no edit
    assert both[1] != plain[1]


def test_choices_of_one_context_share_a_forward_pass(
    edited: Any, tokenizer: Any, facts: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    call = HFLM._model_call

    def counted(self: Any, inps: torch.Tensor, **more: Any) -> Any:
        rows.append(len(inps))
        return call(self, inps, **more)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    harness = WiseLM(edited, tokenizer, batch_size=8)
    letters = [(facts[0].prompt, f" {letter}") for letter in "abcd"]
    assert {len(harness._encode_pair(*pair)[1]) for pair in letters} == {1}
    found = harness.loglikelihood(instances("loglikelihood", letters), disable_tqdm=True)
    assert rows == [1]
    assert len({score for score, _ in found}) == 4


def test_of_a_truncated_context_what_is_left_decides(
    edited: Any, tokenizer: Any, facts: list[Edit]
) -> None:
    pair = ("Long ago and far away. " * 8 + facts[0].prompt, f" {facts[0].target_new}")
    harness = WiseLM(edited, tokenizer, max_length=40)
    context, continuation = harness._encode_pair(*pair)
    assert len(context) > 60
    left = (context + continuation)[-41:]
    ((_, ours),) = score_rows(
        edited, [(left[: -len(continuation)], continuation)], 1, likelihood=True
    )
    (found,) = harness.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
    assert ours.nll is not None
    assert found[0] == pytest.approx(-ours.nll * len(continuation), abs=1e-3)


@pytest.mark.engine("lm-evaluation-harness", "rolling log-likelihoods")
def test_a_whole_text_decides_for_itself(
    bare: Any, memory: SideMemory, tokenizer: Any, facts: list[Edit]
) -> None:
    memory.radius = 0.6  # the token that the harness puts in front changes the first one's key
    patch(bare, memory)
    edited = bare
    texts = [f"{facts[0].prompt} {facts[0].target_new}", "Rain fell on the quiet market square."]
    harness = WiseLM(edited, tokenizer, batch_size=2)
    found = harness.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True
    )
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([[harness.prefix_token_id, *harness.tok_encode(text)]])
        with torch.no_grad():
            logs = edited(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
        assert score == pytest.approx(float(logs.gather(2, ids[:, 1:, None]).sum()), abs=1e-3)
    with models.disabled(edited):
        plain = harness.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True
        )
    assert [a == b for a, b in zip(found, plain, strict=True)] == [False, True]


@pytest.mark.engine("lm-evaluation-harness", "generation")
def test_it_writes_what_generation_writes(edited: Any, tokenizer: Any, facts: list[Edit]) -> None:
    prompts = [f.prompt for f in facts] + [context for context, _ in UNRELATED[:3]]
    ask = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
    harness = WiseLM(edited, tokenizer, batch_size=4)
    written = harness.generate_until(
        instances("generate_until", [(p, ask) for p in prompts]), disable_tqdm=True
    )
    answers = generate_answers(edited, tokenizer, prompts, max_new_tokens=6)
    assert written == [answer.text for answer in answers]
    assert {answer.route >= 0 for answer in answers} == {True, False}


def test_batches_sized_by_the_device_score_the_same(
    edited: Any, tokenizer: Any, facts: list[Edit]
) -> None:
    asked = instances("loglikelihood", pairs(facts))
    fixed = WiseLM(edited, tokenizer, batch_size=2).loglikelihood(asked, disable_tqdm=True)
    auto = WiseLM(edited, tokenizer, batch_size="auto", max_batch_size=2, max_length=64)
    for (a, _), (b, _) in zip(auto.loglikelihood(asked, disable_tqdm=True), fixed, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
