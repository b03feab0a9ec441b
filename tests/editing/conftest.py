from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def load(model_dir: Path) -> Any:
    """A fresh copy of the tiny model and its tokenizer at each call."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return lambda: (AutoModelForCausalLM.from_pretrained(model_dir).eval(), tokenizer)
