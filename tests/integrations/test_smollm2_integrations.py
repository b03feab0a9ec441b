"""The real model: what scoring, exporting and pulling keep of edits that were really made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import demo_edits
from wise_ext.editing.prompts import neutral_prompts
from wise_ext.evaluation import generate_answers
from wise_ext.evaluation.metrics import same_text
from wise_ext.integrations.export.weights import export_weights
from wise_ext.models import load_model
from wise_ext.storage import load_memory_dir

TASK = """
task: taught
dataset_path: json
dataset_kwargs:
  data_files:
    test: taught.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    ignore_case: true
    ignore_punctuation: true
    regexes_to_ignore: ["^\\\\s+", "\\\\s+$"]
"""


@pytest.mark.slow
def test_edits_of_smollm2_are_scored_exported_and_pulled(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "wise-ext[lm-eval]"')
    facts = demo_edits()[:2]
    model, tokenizer = load_model("smollm2")
    settings = WiseConfig(cue=0.0, variant="merge")
    editor = Editor(model, tokenizer, settings, directory=tmp_path / "made")
    editor.edit(facts)
    assert run("push", tmp_path / "made", tmp_path / "hub").exit_code == 0
    assert run("pull", tmp_path / "hub", tmp_path / "memory").exit_code == 0

    rows = [{"prompt": f.prompt, "target": f.target_new} for f in facts]
    (tmp_path / "taught.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "taught.yaml").write_text(TASK)
    common = ("smollm2", "--memory", tmp_path / "memory")
    asked = ("--tasks", tmp_path / "taught.yaml", "--json", tmp_path / "scores.json")
    assert run("lm-eval", *common, *asked).exit_code == 0
    taught = json.loads((tmp_path / "scores.json").read_text())["taught"]
    assert taught["to_side"] == 1.0
    scores = taught["metrics"]["exact_match"]
    assert (scores["unedited"], scores["edited"]) == (0.0, 1.0)

    stored = load_memory_dir(tmp_path / "memory")  # the editor's model is patched with it
    report = export_weights(
        model, tokenizer, stored, tmp_path / "plain", unrelated=neutral_prompts()[:24]
    )
    # Without cues the edits survive; without a router much else does not.
    assert report["before"]["unrelated"]["same_answers"] == 1.0
    assert report["after"]["whole_answers"] == 1.0
    assert report["after"]["unrelated"]["same_answers"] < 0.9
    plain, tokenizer = load_model(tmp_path / "plain")
    answers = generate_answers(plain, tokenizer, [f.prompt for f in facts])
    assert all(same_text(a.text, f.target_new) for a, f in zip(answers, facts, strict=True))
