"""A folder appears whole, or nothing of it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wise_ext.errors import StorageError
from wise_ext.storage import new_folder


def test_it_appears_when_the_block_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with new_folder(out) as making:
        (making / "deep").mkdir()
        (making / "deep" / "file").write_text("whole")
        assert not out.exists()
    assert (out / "deep" / "file").read_text() == "whole"
    assert os.listdir(out.parent) == ["out"] and out.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), new_folder(tmp_path / "a" / "out") as making:
        (making / "file").write_text("half")
        raise ValueError("half")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with (
        monkeypatch.context() as patched,
        pytest.raises(StorageError, match="no space is left"),
        new_folder(tmp_path / "out") as making,
    ):
        (making / "file").write_text("whole")
        patched.setattr(os, call, full)
    assert all(not os.listdir(tmp_path / name) for name in os.listdir(tmp_path))


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(StorageError), new_folder(out):
            raise AssertionError("never entered")
    assert os.listdir(tmp_path) == ["mine"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as making:
        (making / "file").write_text("whole")
    assert os.listdir(tmp_path / "out") == ["file"]
