"""Ablations: what is run, that nothing is run twice, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import ablations, rows
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import demo_edits


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(ablations.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.mark.parametrize("suite", ablations.SUITES)
def test_every_run_differs_from_the_default_in_what_it_names(suite: str) -> None:
    plain = WiseConfig().to_dict()
    names = list(ablations.SUITES[suite])
    made = [WiseConfig(**ablations.SUITES[suite][name]).to_dict() for name in names]
    assert made[0] == plain
    for name, config in list(zip(names, made, strict=True))[1:]:
        changed = {key: config[key] for key in plain if config[key] != plain[key]}
        assert changed and changed.items() <= ablations.SUITES[suite][name].items()
    assert all(made.count(config) == 1 for config in made)


def test_runs_side_by_side(model_dir: Path, tmp_path: Path) -> None:
    facts = "".join(json.dumps(vars(edit)) + "\n" for edit in demo_edits()[:3])
    (tmp_path / "counterfact.jsonl").write_text(facts, encoding="utf-8")
    out = tmp_path / "rows.jsonl"
    options = ["--dataset", "counterfact", "--until", 2, "--model", model_dir, "--json", out]
    options += ["--data", tmp_path, "--work", tmp_path / "work", "--only", "subject-alone"]
    status, said = command(*options, "--only", "default")
    assert status == 0 and "subject-alone" in said and "counterfact, 2 edits" in said
    made = rows.read(out)
    assert [row["settings"] for row in made] == [{}, {"lead": 3.0}]
    assert [row["T"] for row in made] == [2, 2]
    status, again = command(*options)
    assert status == 0 and rows.read(out) == made and "subject-alone" in again
    status, said = command("--suite", "nothing")
    assert status == 1 and "unknown suite 'nothing'" in said
    status, said = command("--only", "luck")
    assert status == 1 and "ingredients has no 'luck'" in said
    # What a run complains of ends the whole.
    status, _ = command(*options, "--dataset", "temporal")
    assert status == 1 and rows.read(out) == made
