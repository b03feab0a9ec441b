"""The comparison with EasyEdit: loading a clone, taking turns, equal weights, what is reported.

A small stand-in for the clone serves; a real one is used where WISE_EXT_EASYEDIT names its folder.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import peer_scoring, peer_worker, peers, rows, same_settings
from bench.peer_easyedit import PeerError
from bench.peer_worker import BATCHED, PEER, STREAM, Bench, Plan, in_turns, unrelated_texts
from tests.bench import fake_easyedit
from wise_ext import load_model
from wise_ext.editing.edits import Edit

REAL = os.environ.get("WISE_EXT_EASYEDIT", "")
TEMPLATES = ["{}", *(f"{text} {{}}" for text in ("I think that", "You may. Because", "So it is"))]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return fake_easyedit.write(tmp_path / "EasyEdit")


# -- turns, texts, overhead --------------------------------------------------------------------


def test_sides_take_turns_and_the_order_turns_too() -> None:
    called: list[tuple[str, int]] = []
    sides = [lambda n, name=name: called.append((name, n)) for name in "abc"]
    told = list(in_turns(3, sides))
    assert called == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("c", 1), ("b", 1), ("a", 1)),
        *(("a", 2), ("b", 2), ("c", 2)),
    ]
    assert told[:4] == [(0, 0), (0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("as_list", [False, True])
def test_the_peer_trains_its_locality_on_what_the_record_keeps_for_that(
    tmp_path: Path, as_list: bool
) -> None:
    records: list[dict[str, Any]] = [
        {"id": "one", "prompt": "a", "target_new": "b", "wise_loc_prompt": "kept for training"},
        {"id": 2, "prompt": "c", "target_new": "d", "locality_prompt": "measured"},
    ]
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)))
    edits = [Edit("one", "a", "b"), Edit("2", "c", "d", locality_prompt="measured")]
    texts = unrelated_texts(str(path), edits)
    assert texts[0] == "kept for training"
    assert texts[1] not in ("measured", "kept for training") and texts[1]
    assert unrelated_texts(None, edits)[1] == texts[1]


def test_overhead_is_a_ratio_of_pairs_and_the_first_one_warms_up(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(model_dir)
    switched: list[bool] = []
    clock = iter([9.0, 9.0, 9.0, 9.0, 3.0, 8.0, 2.0, 4.0, 20.0, 10.0, 60.0, 40.0])

    def timed(*_: Any) -> tuple[float, float]:
        return next(clock), next(clock)

    monkeypatch.setattr(peer_scoring, "_read_and_write", timed)
    ids = peer_scoring.repeated(tokenizer, "over and over")
    found = peer_scoring.overhead(model, ids, switched.append, pairs=2)
    # Round 1: edited (3, 8) over bare (2, 4); round 2: bare (20, 10) under edited (60, 40).
    assert switched == [False, True, True, False, False, True]
    assert (found["prefill_low"], found["prefill_high"]) == pytest.approx((1.8, 2.7))
    assert (found["prefill"], found["decode"]) == (2.25, 3.0)
    assert len(ids) == 128


# -- what is reported --------------------------------------------------------------------------


def _edit_row(side: str, cpu: list[float], wall: list[float]) -> dict[str, Any]:
    return {"kind": "edit", "side": side, "cpu_s_by_round": cpu, "wall_s_by_round": wall}


def _same_row(difference: float, ours: float = 4.0, **more: Any) -> dict[str, Any]:
    row = {"kind": "same-settings", "difference": difference, "moved": 1.0, "iterations": 70}
    costs = {"peer_cpu_s": 20.0, "our_cpu_s": ours, "peer_wall_s": 30.0, "our_wall_s": 3.0}
    return {**row, "our_iterations": 70, **costs, **more}


def test_speedups_are_medians_of_ratios_by_round() -> None:
    rows = [
        _edit_row(PEER, [100.0, 300.0, 100.0], [10.0, 10.0, 10.0]),
        _edit_row(BATCHED, [1.0, 3.0, 2.0], [1.0, 2.0, 4.0]),
        _edit_row(STREAM, [4.0], [5.0]),
        _same_row(0.0),
        _same_row(1e-6, ours=2.0),
    ]
    found = peers.speedups(rows)
    assert found["speedup_default"] == 100.0
    assert found["speedup_default_wall"] == 5.0
    assert found["speedup_one_at_a_time"] == 25.0
    assert found["speedup_same_settings"] == 7.5
    assert found["speedup_same_settings_wall"] == 10.0
    assert found["largest_difference"] == 1e-6


@pytest.mark.parametrize("wrong", [_same_row(0.01), _same_row(0.0, our_iterations=69)])
def test_no_speed_is_told_of_another_edit(wrong: dict[str, Any]) -> None:
    found = peers.speedups([_same_row(0.0), wrong])
    assert found["speedup_same_settings"] is None
    assert found["largest_difference"] == wrong["difference"]


def test_what_was_not_measured_is_not_told() -> None:
    found = peers.speedups([_edit_row(BATCHED, [1.0], [1.0])])
    assert set(found.values()) == {None}


def test_the_report_is_of_one_thread_where_there_is_one(tmp_path: Path) -> None:
    rows = [
        {**row, "threads": threads}
        for threads, peer in ((2, 50.0), (1, 80.0))
        for row in (_edit_row(PEER, [peer], [1.0]), _edit_row(BATCHED, [1.0], [1.0]))
    ]
    path = tmp_path / "new" / "peers.json"
    peers.write(path, rows[:2])
    peers.write(path, rows)
    found = json.loads(path.read_text())
    assert found["speedup_default"] == 80.0
    assert {n: each["speedup_default"] for n, each in found["by_threads"].items()} == {
        "1": 80.0,
        "2": 50.0,
    }
    assert found["speedup_one_at_a_time"] is None and found["speedup_same_settings"] is None
    assert found["rows"] == rows
    assert [p.name for p in path.parent.iterdir()] == ["peers.json"]


def test_the_noted_command_names_no_folder_of_this_machine() -> None:
    words = ["--easyedit", "/home/me/EasyEdit", "--edits=/data/zsre.jsonl", "--limit", "5"]
    assert rows.command_line("bench.peers", words) == (
        "python -m bench.peers --easyedit EasyEdit --edits=zsre.jsonl --limit 5"
    )


def test_the_command_line_refuses_before_any_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(peers.main)
    answer = CliRunner().invoke(app, ["--easyedit", str(tmp_path), "--model", "no-such-model"])
    assert answer.exit_code == 1
    assert "name the folder of a clone" in answer.output


def test_a_process_that_fails_says_why_in_one_line(clone: Path, tmp_path: Path) -> None:
    plan = Plan(easyedit=str(clone), model=str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="no such directory") as error:
        list(peers.work(plan))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_cut_is_compared_without(
    clone: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise same_settings.Unsuited("it is no linear projection")

    monkeypatch.setattr(same_settings, "train", refuse)
    plan = Plan(easyedit=str(clone), model=str(model_dir), rounds=1, limit=1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(peer_worker.ask(plan)))
    assert peer_worker.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "failure": "it is no linear projection: compare with --no-same-settings"
    }


@pytest.mark.slow
def test_a_whole_comparison_in_its_own_process(clone: Path, model_dir: Path) -> None:
    plan = Plan(
        easyedit=str(clone), model=str(model_dir), limit=3, stream=2, rounds=2, pairs=2, command="c"
    )
    rows = [{**row, "threads": 1} for row in peers.work(plan)]
    found = peers.report(rows)
    assert all(found[f"speedup_{name}"] > 0 for name in ("default", "one_at_a_time"))
    assert found["speedup_same_settings"] > 0
    assert found["largest_difference"] < 1e-4
    edits = {row["side"]: row for row in rows if row["kind"] == "edit"}
    assert {side: row["edits"] for side, row in edits.items()} == {
        PEER: [1, 1],
        BATCHED: [3, 3],
        STREAM: [1, 1],
    }
    assert edits[PEER]["iterations_an_edit"] == 12
    quality = [row for row in rows if row["kind"] == "quality"]
    assert [(row["side"], row["n"], row["batch_size"]) for row in quality] == [
        ("unedited", 2, 1),
        (PEER, 2, 1),
        (BATCHED, 3, 16),
        (BATCHED, 2, 16),
        (STREAM, 2, 16),
    ]
    assert quality[0]["locality"] == quality[0]["generated_locality"] == 1.0
    assert quality[2]["reliability"] > quality[0]["reliability"]
    sides = [row["side"] for row in rows if row["kind"] == "overhead"]
    assert sides == [PEER, BATCHED, STREAM] * 2
    assert all(row["machine"]["threads"] == 1 for row in rows)


def test_a_side_that_was_not_asked_for_is_not_measured(clone: Path, model_dir: Path) -> None:
    plan = Plan(
        easyedit=str(clone),
        model=str(model_dir),
        rounds=1,
        limit=2,
        batched=False,
        one_at_a_time=False,
        same=False,
        pairs=0,
    )
    assert [(row["kind"], row["side"]) for row in Bench(plan).run()] == [
        ("edit", PEER),
        ("quality", "unedited"),
        ("quality", PEER),
    ]


def test_fewer_edits_than_the_peer_is_to_do_are_refused(clone: Path, model_dir: Path) -> None:
    plan = Plan(easyedit=str(clone), model=str(model_dir), rounds=1000)
    with pytest.raises(PeerError, match="ask for fewer --peer-edits"):
        Bench(plan)


# -- the real thing ----------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="no EasyEdit: name a clone's folder in WISE_EXT_EASYEDIT")
def test_the_real_peer_runs_through_a_comparison(model_dir: Path) -> None:
    plan = Plan(
        easyedit=REAL,
        model=str(model_dir),
        limit=3,
        rounds=1,
        one_at_a_time=False,
        pairs=2,
        changes={"n_iter": 8},
        templates=TEMPLATES,
    )
    rows = [{**row, "threads": 1} for row in peer_worker.Bench(plan).run()]
    found = peers.report(rows)
    assert found["largest_difference"] <= peers.SAME_WEIGHTS
    assert found["speedup_default"] > 0
    assert {row["side"] for row in rows if row["kind"] == "overhead"} == {PEER, BATCHED}
