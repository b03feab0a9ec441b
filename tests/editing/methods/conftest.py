from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.editing.methods.facts import FACTS
from wise_ext.editing.prompts import encode_target


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Few neutral texts, one of a single token."""
    texts = ("A cold day in the hills.", "Two and two make four.", "x", "Write soon!")
    monkeypatch.setattr("wise_ext.editing.methods.fine_tuning.neutral_prompts", lambda: texts)
    return texts


@pytest.fixture(scope="session")
def _schooled(model_dir: Path) -> tuple[Any, Any]:
    """The tiny model, once it says one of the facts' answers by the last token of a prompt, and
    stops: a single token then decides a whole answer, as GRACE needs it. Its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    answers = [encode_target(tokenizer, edit.target_new) for edit in FACTS]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        width = int(torch.randint(3, 24, (), generator=generator))
        start = torch.randint(2, len(tokenizer), (4, width), generator=generator)
        for last, answer in enumerate(answers, start=100):
            start[:, -1] = last
            told = torch.tensor(answer).expand(len(start), -1)
            logits = model(torch.cat([start, told], 1)).logits[:, start.shape[1] - 1 : -1]
            F.cross_entropy(logits.transpose(1, 2), told).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, tokenizer


@pytest.fixture
def taught(_schooled: tuple[Any, Any]) -> Callable[[], tuple[Any, Any]]:
    """A fresh copy of the model that knows the answers, and its tokenizer, at each call."""
    model, tokenizer = _schooled
    return lambda: (copy.deepcopy(model), tokenizer)


@pytest.fixture(autouse=True)
def few_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments of keys come from few texts, and are kept for one test alone."""
    texts = [f"Some {n} words on {edit.prompt} and more." for n in range(8) for edit in FACTS]
    monkeypatch.setenv("WISE_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("wise_ext.editing.methods.moments.default_corpus", lambda: texts)
