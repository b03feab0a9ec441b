"""The harness's tasks that come with the package, those of users, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import wise_ext
from wise_ext.editing.edits import demo_edits
from wise_ext.errors import DataError
from wise_ext.memory import SideMemory

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "wise-ext[lm-eval]"')

from wise_ext.integrations.lm_eval import MODEL  # noqa: E402
from wise_ext.integrations.lm_eval.tasks import PACKAGED, load_tasks  # noqa: E402

Run = Callable[..., Result]

CHOICE = """
task: rivers
dataset_path: json
dataset_kwargs:
  data_files:
    test: rivers.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
"""
ANSWERS = """
task: rivers_answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: rivers.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder of tasks: questions that the memory knows, and another."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rivers.yaml").write_text(CHOICE)
    (folder / "answers.yaml").write_text(ANSWERS)
    questions = [*(edit.prompt for edit in demo_edits()[:2]), "The sun rises in the"]
    rows = [{"question": q, "choices": ["east", "the west"], "answer": 0} for q in questions]
    (folder / "rivers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (PACKAGED / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_packaged_questions_are_sound() -> None:
    for name in ("general.jsonl", "demo_facts.jsonl"):
        rows = rows_of(name)
        for row in rows:
            assert len(row["choices"]) == len(set(row["choices"])) == 4
            assert row["answer"] in range(4)
        places = [row["answer"] for row in rows]
        # Nobody who always says the same letter does well.
        assert max(places.count(place) for place in range(4)) <= 0.45 * len(rows)
    questions = [row["question"] for row in rows_of("general.jsonl")]
    assert len(set(questions)) == len(questions) >= 50


def test_a_wheel_carries_them() -> None:
    root = Path(wise_ext.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    globs = settings["tool"]["setuptools"]["package-data"]["wise_ext"]
    carried = {path for glob in globs for path in (root / "wise_ext").glob(glob)}
    assert carried >= {path for path in PACKAGED.iterdir() if path.is_file()} != set()


def test_the_demo_task_asks_for_the_demo_facts() -> None:
    facts = {edit.id: edit for edit in demo_edits()}
    rows = rows_of("demo_facts.jsonl")
    assert [row["id"] for row in rows] == list(facts)
    for row in rows:
        fact = facts[row["id"]]
        assert (row["taught"], row["asked"]) == (fact.prompt, fact.rephrase_prompt)
        assert row["choices"][row["answer"]] == fact.target_new


def test_all_packaged_tasks_load_by_default_and_each_by_name() -> None:
    tasks = load_tasks()
    assert set(tasks) == {
        f"wise_ext_{what}"
        for what in ("general_choice", "general_answers", "demo_choice", "demo_answers")
    }
    counts = {name: len(task.test_docs()) for name, task in tasks.items()}
    assert counts["wise_ext_general_choice"] == counts["wise_ext_general_answers"] >= 50
    assert list(load_tasks(["wise_ext_demo_choice"])) == ["wise_ext_demo_choice"]
    assert set(load_tasks(["wise_ext"])) == set(tasks)  # their tag


def test_the_right_answers_score_one() -> None:
    for name, task in load_tasks().items():
        for doc in task.test_docs():
            if name.endswith("answers"):
                scores = task.process_results(doc, [f" {task.doc_to_target(doc)}."])
                assert scores["exact_match"] == 1
            else:
                likely = [(-1.0 if i == doc["answer"] else -2.0, False) for i in range(4)]
                assert task.process_results(doc, likely)["acc"] == 1


def test_a_folder_and_a_file_of_ones_own(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(load_tasks([str(own)])) == ["rivers", "rivers_answers"]
    monkeypatch.chdir(own.parent)
    assert list(load_tasks(["tasks/rivers.yaml"])) == ["rivers"]
    assert Path.cwd() == own.parent


def test_a_task_that_is_not_there_is_named(own: Path) -> None:
    (own / "empty").mkdir()
    (own / "broken.yaml").write_text("task: [")
    (own / "no_data.yaml").write_text(CHOICE.replace("rivers.jsonl", "lakes.jsonl"))
    for spec, message in (
        (str(own / "empty"), "no task in"),
        (str(own / "absent.yaml"), "no such task file"),
        (str(own / "broken.yaml"), "check its YAML and data"),
        (str(own / "no_data.yaml"), "lakes.jsonl"),
        ("no_such_task_anywhere", r"or one of wise_ext_demo_answers, wise_ext_demo_choice"),
    ):
        with pytest.raises(DataError, match=message):
            load_tasks([spec])


def test_the_command_scores_both_sides(
    run: Run, model_dir: Path, memory: SideMemory, saved: Any, own: Path, tmp_path: Path
) -> None:
    directory = saved(memory, tmp_path / "memory")
    out = tmp_path / "out.json"
    answer = run("lm-eval", model_dir, "--memory", directory, "--tasks", own, "--json", out)
    assert answer.exit_code == 0, answer.output
    assert "rivers_answers" in answer.output and "exact_match" in answer.output
    report = json.loads(out.read_text())
    assert set(report) == {"rivers", "rivers_answers"}
    for found in report.values():
        assert (found["n"], found["to_side"]) == (3, pytest.approx(2 / 3))
    scores = report["rivers"]["metrics"]["acc"]
    assert scores.keys() == {"unedited", "edited", "unedited_stderr", "edited_stderr"}
    assert scores["edited"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_the_harness_finds_the_model_by_its_name(
    model_dir: Path, memory: SideMemory, saved: Any, own: Path, tmp_path: Path
) -> None:
    directory = saved(memory, tmp_path / "memory")
    tasks = list(load_tasks([str(own)]).values())
    both = [
        lm_eval.simple_evaluate(
            model=MODEL,
            model_args={"pretrained": str(model_dir)} | more,
            tasks=tasks,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            batch_size=2,
            device="cpu",
        )
        for more in ({}, {"memory": str(directory)})
    ]
    said = [[sample["resps"] for sample in found["samples"]["rivers"]] for found in both if found]
    assert [a == b for a, b in zip(*said, strict=True)] == [False, False, True]


@pytest.mark.slow
def test_the_harness_has_its_own_command_line(
    model_dir: Path, memory: SideMemory, saved: Any, own: Path, tmp_path: Path
) -> None:
    directory = saved(memory, tmp_path / "memory")
    command = [sys.executable, "-m", "wise_ext.integrations.lm_eval", "run", "--model", MODEL]
    command += ["--model_args", f"pretrained={model_dir},memory={directory}", "--device", "cpu"]
    command += ["--tasks", "./rivers.yaml", "--output_path", str(tmp_path / "out")]
    root = str(Path(wise_ext.__file__).parents[1])  # this copy, wherever one is installed
    env = os.environ | {"PYTHONPATH": root}
    answer = subprocess.run(command, cwd=own, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "|rivers|" in answer.stdout.replace(" ", "")
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["rivers"]["acc,none"] is not None
