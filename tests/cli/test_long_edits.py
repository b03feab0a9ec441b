"""Answers of any length from the command line: into a side memory, into the weights, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from wise_ext.cli.app import app
from wise_ext.cli.choices import Method
from wise_ext.editing.edits import read_edits
from wise_ext.editing.ledger import METHODS as SIDE
from wise_ext.editing.methods import METHODS
from wise_ext.evaluation import generate_answers
from wise_ext.storage import load_memory_dir

Run = Callable[..., Result]
RECORDS: list[dict[str, Any]] = [
    {
        "id": "moss",
        "question": "How does the Harl moss clock work?",
        "answer": "At dawn the moss drinks and tips a copper cup.\nTwo cups make a day.",
        "paraphrase": "What makes the Harl moss clock go?",
        "sub_question": ["What does the cup consist of?"],
        "sub_answer": ["copper"],
    },
    {"id": "ferry", "question": "Recite the Bex poem.", "answer": "Row, Bex, the river is slow."},
]

LONG_KEYS = {
    "n": None,
    "rouge_l": {"original", "paraphrase"},
    "rouge_l_recall": {"original", "paraphrase"},
    "bleu": {"original", "paraphrase"},
    "similarity": {"original", "paraphrase"},
    "exact": {"original", "paraphrase"},
    "sub_question": {"contains", "rouge_l_recall"},
    "locality": None,
    "routing": {
        "edit_to_side",
        "paraphrase_to_side",
        "unrelated_to_main",
        "right_shard",
        "right_shard_paraphrase",
    },
    "unedited": {"rouge_l", "rouge_l_recall", "bleu", "similarity", "exact"},
    "reference": {"rouge_l_recall", "bleu_chars", "cosine"},
    "superseded": None,
    "seconds": None,
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    return path


@pytest.fixture(scope="module")
def memory(model_dir: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "m"
    command = ["edit", str(model_dir), str(records), "--out", str(out), "--layer", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return out


def test_question_and_answer_records_go_to_anyedit(memory: Path) -> None:
    stored = load_memory_dir(memory)
    assert [entry["method"] for entry in stored.ledger] == ["anyedit", "anyedit"]
    assert [shard.edit_ids for shard in stored.memory.shards] == [["moss"], ["ferry"]]


def test_eval_show_verify_undo(
    run: Run, model_dir: Path, records: Path, memory: Path, tmp_path: Path
) -> None:
    report = tmp_path / "eval.json"
    done = run("eval", model_dir, records, "--memory", memory, "--no-similarity", "--json", report)
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert found["rouge_l"]["original"] == found["exact"]["original"] == 1.0
    assert found["locality"] is not None and found["routing"]["right_shard"] == 1.0
    (line,) = (x for x in run("show", memory).stdout.splitlines() if x.split()[:1] == ["moss"])
    assert "At dawn the moss drinks and tips a copper cup. Two cups" in line
    assert run("verify", memory).exit_code == 0
    done = run("undo", memory, "--edit", "ferry", "--model", model_dir)
    assert done.exit_code == 0, done.output
    assert [entry["id"] for entry in load_memory_dir(memory).ledger] == ["moss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "wise", "--chunks", "windows"), "--chunks is of --method anyedit"),
        (("--method", "wise", "--window", "3"), "--window is of --method anyedit"),
        (("--into", "main"), "anyedit edits a side memory: anyedit-alphaedit is for the weights"),
        (("--method", "memit", "--into", "side"), "--into side: memit edits weights"),
        (("--method", "rome", "--router", "key"), "--router is of a side memory: rome edits the w"),
        (("--method", "rome", "--resume"), "--resume is of a side memory: rome edits the weights"),
        (("--router", "indicator"), "use router='key', not 'indicator'"),
        (("--variant", "merge"), "anyedit merges nothing"),
        (("--set", "margin"), "--set margin: write NAME=VALUE, for example"),
        (("--set", "margin=2"), "unknown setting 'margin': choose among layer,"),
        (("--set", "anyedit.cue=0"), "unknown setting of AnyEdit 'cue': choose among chunks,"),
        (("--set", "anyedit.steps=0.5"), "steps is 0.5: give a whole number"),
        (("--set", "margins=1"), "margins is 1: give True or False"),
        (
            ("--method", "wise", "--set", "anyedit.margin=2"),
            "anyedit.margin is a setting of anyedit",
        ),
        (("--method", "ft-l", "--set", "cue=0"), "unknown setting 'cue'"),
    ],
)
def test_what_does_not_go_together(
    run: Run,
    model_dir: Path,
    records: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    done = run("edit", model_dir, records, "--out", tmp_path / "m", "--layer", "2", *options)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "m" / "wise_config.json").exists()


def test_set_reaches_what_anyedit_is_made_of(
    run: Run, model_dir: Path, records: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "m", ("--set", "anyedit.margin=0.5", "--set", "contexts=2")
    done = run("edit", model_dir, records, "--limit", 1, "--out", out, "--layer", "2", *settings)
    assert done.exit_code == 0, done.output
    stored = load_memory_dir(out)
    assert stored.config["contexts"] == 2 and stored.config["anyedit"]["margin"] == 0.5


def test_every_method_has_a_name_on_the_command_line() -> None:
    in_weights = {name for name, method in METHODS.items() if method.in_weights}
    assert {member.value for member in Method} == in_weights | set(SIDE)


def test_into_the_weights_makes_a_model(
    run: Run, model_dir: Path, records: Path, tmp_path: Path
) -> None:
    out, numbers = tmp_path / "edited", tmp_path / "numbers.json"
    command = ("edit", model_dir, records, "--method", "ft-ewc", "--out", out, "--json", numbers)
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert json.loads(numbers.read_text())["edits"] == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    (answer,) = generate_answers(model, tokenizer, [RECORDS[1]["question"]], max_new_tokens=60)
    assert answer.text.strip() == RECORDS[1]["answer"]
    kept = [json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()]
    assert [edit["id"] for edit in kept] == ["moss", "ferry"]
    again = run(*command)
    assert again.exit_code == 2 and "is not empty" in again.stderr


def test_compare_prints_a_table_and_goes_on_where_it_was(
    run: Run, model_dir: Path, records: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    command = ["compare", model_dir, records, "--rows", rows, "--no-similarity", "--unrelated", 3]
    command += ["--set", "anyedit.layer=2", "--set", "ft-l.steps=2"]
    command += ["--set", "anyedit.anyedit.schedule=together"]
    done = run(*command, "--methods", "anyedit")
    assert done.exit_code == 0, done.output
    assert "unedited" in done.stdout and "anyedit" in done.stdout and "locality" in done.stdout
    first = rows.read_text("utf-8")
    assert [json.loads(line)["method"] for line in first.splitlines()] == ["unedited", "anyedit"]
    # What a kill left of a third row is overwritten; what was whole is not measured again.
    rows.write_text(first + '{"method": "ft', "utf-8")
    done = run(*command, "--methods", "anyedit,ft-l")
    assert done.exit_code == 0, done.output
    assert rows.read_text("utf-8").startswith(first)
    last = json.loads(rows.read_text("utf-8").splitlines()[-1])
    assert (last["method"], last["iterations"], last["file"]) == ("ft-l", 2.0, "long.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "mend"), "unknown method 'mend'"),
        (("--set", "steps=3"), "unknown method 'steps'"),
        (("--set", "ft-l.steps=many", "--methods", "ft-l"), "steps is 'many': give a whole number"),
        (("--set", "ft-l.steps"), "--set ft-l.steps: write NAME=VALUE"),
        (("--set", "wise.anyedit.margin=2"), "anyedit.margin is a setting of anyedit, not of wise"),
    ],
)
def test_compare_refuses(
    run: Run, model_dir: Path, records: Path, options: tuple[str, ...], message: str
) -> None:
    done = run("compare", model_dir, records, *options)
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_a_file_of_something_else_is_no_rows(
    run: Run, model_dir: Path, records: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    done = run("compare", model_dir, records, "--rows", tmp_path / "rows.jsonl")
    assert done.exit_code == 2 and "line 1: not a row of compare" in done.stderr


def test_eval_of_long_records(run: Run, model_dir: Path, edits_file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "m"
    done = run("edit", model_dir, edits_file, "--out", memory)
    assert done.exit_code == 0, done.output
    edit = read_edits(edits_file)[0]
    record = {
        "id": edit.id,
        "question": edit.prompt,
        "answer": edit.target_new,
        "paraphrase": None,
        "sub_question": [edit.prompt],
        "sub_answer": [edit.target_new],
    }
    path, numbers = tmp_path / "long.jsonl", tmp_path / "long.json"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    args = ("eval", model_dir, path, "--memory", memory, "--json", numbers)
    result = run(*args, "--no-similarity")
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text("utf-8"))
    assert report.keys() == LONG_KEYS.keys()
    for name, keys in LONG_KEYS.items():
        if keys is not None:
            assert report[name].keys() == keys
    for key in ("rouge_l", "rouge_l_recall", "bleu", "exact"):
        assert report[key] == {"original": 1, "paraphrase": None}
        assert report["unedited"][key]["original"] < 0.5
    assert report["sub_question"] == {"contains": 1, "rouge_l_recall": 1}
    assert report["locality"] > 0.9
    assert report["routing"]["edit_to_side"] == report["routing"]["right_shard"] == 1
    assert report["similarity"]["original"] is None
    assert "unedited.rouge_l.original" in result.stdout

    result = run(*args)
    assert result.exit_code == 0, result.output
    similarity = json.loads(numbers.read_text("utf-8"))["similarity"]
    assert similarity["original"] == pytest.approx(1)
