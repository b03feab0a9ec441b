"""Long answers measured: who finds them, and that reading and writing report the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import passages, rows
from wise_ext import models
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit
from wise_ext.editing.workshop import Workshop

EDITS = [
    Edit(
        "a",
        "What was Tennick's best clock?",
        "It ran backwards.",
        rephrase_prompt="Which clock of Tennick was best?",
    ),
    Edit(
        "b",
        "Describe the high tower.",
        "It is high.",
        rephrase_prompt="What is the high tower like?",
    ),
    Edit(
        "c",
        "Who keeps the mill of Ardo?",
        "Mila Onn does.",
        rephrase_prompt="Whose is the mill of Ardo?",
    ),
]


@pytest.fixture
def pieces(model_dir: Path) -> tuple[Any, Any]:
    return models.load_model(str(model_dir), device="cpu")


def test_routing_counts_what_reaches_a_shard(pieces: tuple[Any, Any]) -> None:
    config = WiseConfig(layer=2, contexts=0, contexts_per_edit=0, contexts_per_round=0)
    named, without = passages.routing(Workshop(*pieces, config), EDITS, 2)
    assert (named["names"], without["names"]) == (True, False)
    assert (named["named"], without["named"]) == (0.5, 0.0)
    for row in (named, without):
        assert (row["stored"], row["foreign"], row["unrelated"], row["own"]) == (2, 2, 60, 1.0)
        assert row["reworded"] in (0.0, 0.5, 1.0) and 0 <= row["foreign_to_side"] <= 2


def test_reading_is_refused_where_it_reports_otherwise(
    pieces: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = passages.reading(*pieces, EDITS[:2], rounds=2)
    assert row["ratio"] == pytest.approx(row["read_cpu_s"] / row["written_cpu_s"])
    assert not models.is_patched(pieces[0])
    monkeypatch.setattr(
        passages, "evaluate_long", lambda *args, one_pass, **others: {"n": one_pass}
    )
    with pytest.raises(RuntimeError, match="reports other figures"):
        passages.reading(*pieces, EDITS[:2], rounds=1)


def test_memory_is_that_of_a_process_of_its_own(model_dir: Path) -> None:
    (row,) = passages.memory(str(model_dir), [16])
    assert row["tokens"] == 16 and 0 <= row["grown_mib"] < 500


def test_the_command_appends_its_rows(model_dir: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "long.jsonl", tmp_path / "rows.jsonl"
    file.write_text('{"question": "Who keeps the mill of Ardo?", "answer": "Mila Onn does."}\n')
    app = typer.Typer()
    app.command()(passages.main)
    arguments = [file, "--model", model_dir, "--read", 1, "--rounds", 1, "--no-grow", "--json", out]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, list(map(str, arguments)))
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    made = rows.read(out)
    assert [row["measure"] for row in made] == ["routing", "routing", "reading"]
    assert all(
        row["file"] == "long.jsonl" and "bench.passages" in str(row["machine"]) for row in made
    )
    result = CliRunner().invoke(app, [str(tmp_path / "none.jsonl")])
    assert result.exit_code == 1
