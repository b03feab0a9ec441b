"""A lifelong run on a tiny model: its rows, its end by a kill, its data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import lifelong, lifelong_data
from bench.lifelong_state import Call, RunState, append_line, publish, read_lines
from bench.rows import ROOT
from wise_ext.editing.edits import Edit, demo_edits
from wise_ext.errors import DataError, StorageError

#: what a run costs and where it ran may differ between two runs of one command
COSTS = {
    "run",
    "name",
    "machine",
    "cpu_seconds_edit",
    "cpu_seconds_edit_span",
    "cpu_seconds_score",
    "seconds_edit",
}
SETTINGS = ("layer=2", "contexts=1", "context_tokens=4", "learning_rate=0.05", "shard_size=8")

Rows = list[dict[str, Any]]
Start = Callable[..., list[str]]


def write(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.dev.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files of 12, 4 and 3 facts; one is there twice, one contradicts an earlier one."""
    made = tmp_path_factory.mktemp("data")
    facts = [vars(edit) for edit in demo_edits()]
    write(made, "zsre_wise_edit", facts[:12])
    again = {**facts[0], "id": "again"}
    against = {**facts[1], "id": "against", "target_new": "something else"}
    write(made, "zsre_train1k", [again, against, facts[12], {**facts[13], "id": facts[0]["id"]}])
    write(made, "zsre_knowedit_extra", facts[14:17])
    write(made, "counterfact", facts[17:20])
    texts = [{**fact, "rephrase_prompt": None} for fact in facts[20:22]]
    write(made, "temporal_edit", texts[:1])
    write(made, "temporal_train", texts[1:])
    return made


@pytest.fixture
def arguments(folder: Path, model_dir: Path, tmp_path: Path) -> Start:
    """``arguments("name", ...)``: a command line for this model and data."""

    def of(name: str, *more: str) -> list[str]:
        return [
            *("--model", str(model_dir), "--data", str(folder), "--name", name),
            *("--work", str(tmp_path / name), "--json", str(tmp_path / f"{name}.jsonl")),
            *("--at", "3,6,12", "--batch", "6", "--max-new-tokens", "6"),
            *("--set", "batch_size=2" if "stream" not in more else "batch_size=1", *SETTINGS),
            *more,
        ]

    return of


def metrics(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key not in COSTS} for row in rows]


def test_rows(arguments: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.jsonl"
    words = ["x", "--json", str(file), f"--work={tmp_path}/one", "--set", "layer=2"]
    monkeypatch.setattr(sys, "argv", words)
    assert lifelong.main(arguments("one", "--until", "13")) == 0
    rows = read_lines(file)
    assert [row["T"] for row in rows] == [3, 6, 12, 13]
    for row in rows:
        assert row["n"] == row["T"] and row["superseded"] == row["conflicts"] == 0
        assert row["undisputed"]["n"] == row["T"] and row["undisputed"]["gen"] == row["gen"]
        assert 0 <= row["rel"] <= 1 and row["routing"]["right_shard"] is not None
        assert row["settings"]["layer"] == 2 and "mask_ratio" not in row["settings"]
        assert row["dropped"] == {"conflicting": 1, "repeated": 1}
        assert [file["records"] for file in row["data"]] == [12, 4, 3]
        assert row["cpu_seconds_edit"] > 0 and row["bytes_per_edit"] > 0
        assert str(tmp_path.parent) not in json.dumps(row)
        assert row["machine"]["command"].endswith("--json one.jsonl --work=one --set layer=2")
    assert [row["shards"] for row in rows] == [1, 1, 2, 2]
    assert rows[0]["rel"] > 0.9  # it does edit
    before = file.read_bytes()
    assert lifelong.main(arguments("one", "--until", "13")) == 0
    assert file.read_bytes() == before
    # Further on, and into another file.
    assert lifelong.main(arguments("one", "--until", "15")) == 0
    assert [row["T"] for row in read_lines(file)] == [3, 6, 12, 13, 15]


def test_stream(arguments: Start, tmp_path: Path) -> None:
    assert lifelong.main(arguments("s", "--regime", "stream", "--until", "4")) == 0
    rows = read_lines(tmp_path / "s.jsonl")
    assert [(row["T"], row["batch"], row["regime"]) for row in rows] == [
        (3, 1, "stream"),
        (4, 1, "stream"),
    ]
    assert len(read_lines(tmp_path / "s" / "calls.jsonl")) == 4


def test_long_targets_by_perplexity(arguments: Start, tmp_path: Path) -> None:
    assert lifelong.main(arguments("t", "--dataset", "temporal")) == 0
    (row,) = read_lines(tmp_path / "t.jsonl")
    assert row["T"] == 2
    plain, edited = row["unedited"]["target_perplexity"], row["target_perplexity"]
    assert edited["mean"] < plain["mean"]
    assert row["gen"] is None and row["generation"]["reliability"] is None


def _killed(command: list[str], when: Callable[[], bool]) -> None:
    """Start the command and kill it at the first instant at which ``when`` holds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.lifelong", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not when():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_and_started_again(arguments: Start, tmp_path: Path) -> None:
    assert lifelong.main(arguments("whole", "--until", "13")) == 0
    whole = read_lines(tmp_path / "whole.jsonl")
    command = arguments("cut", "--until", "13")
    work = tmp_path / "cut"
    steps = work / "memory" / "journal" / "steps.jsonl"
    # In the first call, one step being journaled and no memory there yet; then in a later one.
    _killed(command, lambda: _size(steps) > 0)
    assert not (work / "calls.jsonl").exists() and not (work / "memory" / "edits.jsonl").exists()
    _killed(command, lambda: len(read_lines(work / "calls.jsonl")) > 1 and _size(steps) > 0)
    assert (work / "memory" / "journal").is_dir() and (work / "rows" / "6.json").is_file()
    assert lifelong.main(command) == 0
    assert metrics(read_lines(tmp_path / "cut.jsonl")) == metrics(whole)
    for name in ("side_memory.safetensors", "wise_config.json"):
        assert (work / "memory" / name).read_bytes() == (
            tmp_path / "whole" / "memory" / name
        ).read_bytes()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_row_that_was_not_published_yet_is(arguments: Start, tmp_path: Path) -> None:
    """Killed between the row and the results file, and in the middle of a line of that."""
    command = arguments("p", "--until", "3")
    assert lifelong.main(command) == 0
    file = tmp_path / "p.jsonl"
    (line,) = file.read_text().splitlines()
    file.write_text(line[:50])
    assert lifelong.main(command) == 0
    assert file.read_text() == line + "\n"


def test_scores_that_are_there_are_not_made_again(
    arguments: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifelong, "_PART", 2)
    measured: list[int] = []
    real = lifelong.measure

    def measure(model: Any, tokenizer: Any, edits: Any, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(len(edits))
        return real(model, tokenizer, edits, *rest)

    monkeypatch.setattr(lifelong, "measure", measure)
    command = arguments("m", "--until", "5", "--at", "5")
    assert lifelong.main(command) == 130
    measured.clear()
    assert lifelong.main(command) == 0
    assert measured == [1]
    (row,) = read_lines(tmp_path / "m.jsonl")
    assert row["n"] == 5


def test_an_interrupt_says_how_to_go_on(
    arguments: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifelong.Run, "_score", stop)
    assert lifelong.main(arguments("i", "--until", "3")) == 130
    assert "stopped behind 3 edits: the same command goes on" in capsys.readouterr().err


def test_pool(folder: Path) -> None:
    found = lifelong_data.pool("zsre", folder)
    ids = [edit.id for edit in found.edits]
    facts = [edit.id for edit in demo_edits()]
    assert ids == [*facts[:13], f"zsre_train1k:{facts[0]}", *facts[14:17]]
    assert found.dropped == {"conflicting": 1, "repeated": 1}
    both = lifelong_data.pool("zsre+counterfact", folder)
    assert [edit.id for edit in both.edits] == [*ids, *facts[17:20]]
    assert [file["file"] for file in both.files][-1] == "counterfact.dev.jsonl"
    assert [edit.id for edit in lifelong_data.pool("extra", folder).edits] == facts[14:17]


def test_halves_and_orders(folder: Path) -> None:
    def ids(**how: Any) -> list[str]:
        return [edit.id for edit in lifelong_data.pool("zsre+counterfact", folder, **how).edits]

    everything = ids()
    seen, unseen = ids(half="development"), ids(half="unseen")
    assert sorted(seen + unseen) == sorted(everything) and seen and unseen
    assert ids(half="unseen", offset=1) == unseen[1:]
    mixed = ids(shuffle=1)
    assert sorted(mixed[:17]) == sorted(everything[:17]) and mixed[:17] != everything[:17]
    assert ids(shuffle=1) == mixed != ids(shuffle=2)


def test_data_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no hallucination_edit\.dev\.jsonl in .*WISE_EXT_DATA"):
        lifelong_data.pool("hallucination", folder)
    with pytest.raises(DataError, match="offset 99 leaves nothing of the 3 edits"):
        lifelong_data.pool("counterfact", folder, offset=99)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--set", "nonsense"), "write NAME=VALUE"),
        (("--at", "10,x"), "give numbers of edits"),
        (("--at", "0"), "give numbers of edits"),
        (("--until", "0"), "whole number >= 1"),
        (("--dataset", "other"), "invalid choice"),
        (("--name", "a/b"), "without slashes"),
    ],
)
def test_bad_arguments(
    more: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        lifelong.main(more)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--set", "no_such=1"), "unknown setting 'no_such'"),
        (("--set", "mask_ratio=7"), "mask_ratio is 7"),
        (("--regime", "stream", "--set", "batch_size=4"), "leave batch_size out"),
        (("--data", "nowhere"), "no zsre_wise_edit.dev.jsonl in nowhere"),
    ],
)
def test_refusals(
    arguments: Start, more: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lifelong.main(arguments("r", *more)) == 1
    assert complaint in capsys.readouterr().err


def test_another_run_in_the_folder(tmp_path: Path) -> None:
    first = RunState(tmp_path / "w", {"config": {"seed": 0}, "regime": "batch"})
    with pytest.raises(StorageError, match="another process works in"):
        RunState(tmp_path / "w", {})
    first.close()
    with pytest.raises(StorageError, match="its seed is 0, not 1; choose another --name"):
        RunState(tmp_path / "w", {"config": {"seed": 1}, "regime": "batch"})
    again = RunState(tmp_path / "w", {"config": {"seed": 0}, "regime": "batch"})
    assert again.run == first.run


def test_what_a_stopped_call_had_cost_counts(tmp_path: Path) -> None:
    state = RunState(tmp_path / "w", {})
    state.finish(Call(0, 5, 2.0, 3.0))
    beat = state.begin(Call(5, 9, 1.5, 2.0))
    sum(range(100_000))
    beat()
    state.close()
    again = RunState(tmp_path / "w", {})
    assert again.edited == 5
    call = again.unfinished()
    assert call is not None and (call.start, call.end) == (5, 9)
    assert call.cpu > 1.5 and call.seconds > 2.0
    again.finish(call)
    assert again.unfinished() is None
    assert again.cost(0, 9)[0] == 2.0 + call.cpu and again.cost(5, 9)[0] == call.cpu


def test_lines_cut_short_go(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_line(file, {"run": "a", "T": 1})
    with file.open("a") as handle:
        handle.write('{"run": "a", "T"')
    assert read_lines(file) == [{"run": "a", "T": 1}]
    assert publish(file, {"run": "a", "T": 2})
    assert not publish(file, {"run": "a", "T": 1})
    assert [row["T"] for row in read_lines(file)] == [1, 2]
    with file.open("a") as handle:
        handle.write('{"run": "b", "T": 1}')  # whole, but for its line feed
    assert publish(file, {"run": "b", "T": 2})
    assert [(row["run"], row["T"]) for row in read_lines(file)][-2:] == [("b", 1), ("b", 2)]


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot add a line to .*: make it writable"):
        publish(tmp_path, {"run": "a", "T": 1})


def test_undisputed_edits() -> None:
    def edit(name: str, subject: str | None, target: str) -> Edit:
        return Edit(name, f"prompt {name}", target, subject)

    edits = [
        edit("a", "Lumo", "Ines"),
        edit("b", " lumo ", "Orla"),
        edit("c", "Vale", "Ines"),
        edit("d", "vale", "ines "),
        edit("e", None, "Ines"),
        edit("f", None, "Orla"),
    ]
    assert lifelong_data.undisputed(edits) == {"c", "d", "e", "f"}
    assert lifelong_data.undisputed(edits[1:]) == {"b", "c", "d", "e", "f"}
