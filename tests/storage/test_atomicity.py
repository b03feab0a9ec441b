from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wise_ext.errors import StorageError
from wise_ext.storage import Journal, load_memory_dir
from wise_ext.storage.commit import FILES, JOURNAL

MakeExample = Callable[..., Any]


def _seed_of(directory: Path) -> int:
    """Load a directory whole and say which example it holds."""
    stored = load_memory_dir(directory)
    assert len(stored.ledger) == len(stored.memory.edit_ids) == 4
    assert stored.ledger[0]["id"] == stored.memory.edit_ids[0]
    seed = stored.config["seed"]
    assert isinstance(seed, int)
    return seed


@pytest.mark.parametrize("once", [True, False])
def test_a_disk_that_fails_at_any_call_leaves_the_old_memory_or_the_new(
    make_example: MakeExample, disk: Any, tmp_path: Path, once: bool
) -> None:
    old, new = make_example(1), make_example(2)
    outcomes = []
    for at in range(100):
        place = tmp_path / str(at)
        old.save(place)
        (place / "notes.txt").write_text("mine")
        failure = None
        with disk.failing(at, once=once):
            try:
                new.save(place)
            except StorageError as error:
                failure = str(error)
        if disk.calls <= at:
            break
        outcomes.append(_seed_of(place))
        if failure is not None:
            assert "no space is left" in failure
            assert "free some or choose another folder" in failure
        # Whatever was left behind is no hindrance.
        new.save(place)
        assert _seed_of(place) == 2
        assert sorted(p.name for p in place.iterdir()) == sorted([*FILES, "notes.txt"])
    # Old until the commit, new from then on, and both were seen.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_a_first_save_that_fails_leaves_nothing(
    make_example: MakeExample, disk: Any, tmp_path: Path
) -> None:
    example = make_example(1)
    left = []
    for at in range(100):
        place = tmp_path / str(at) / "deep" / "folder"
        (tmp_path / str(at)).mkdir()
        failed = False
        with disk.failing(at):
            try:
                example.save(place)
            except StorageError:
                failed = True
        if disk.calls <= at:
            break
        if failed and list((tmp_path / str(at)).iterdir()):
            # Past the commit: the memory is whole.
            assert _seed_of(place) == 1
            left.append(at)
        else:
            assert not left
    assert left


KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import conftest
from conftest import CALLS, _example
from wise_ext.storage import Journal, load_memory_dir
root, mode = Path(sys.argv[2]), sys.argv[3]

def die_at(at):
    count = [0]
    def patched(name, original):
        def call(*args, **options):
            number, count[0] = count[0], count[0] + 1
            if number == at:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        return call
    for name in CALLS:
        setattr(os, name, patched(name, getattr(os, name)))

def child(at, work):
    pid = os.fork()
    if pid == 0:
        die_at(at)
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0
    return True
"""


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", KILLER + program, str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_call_a_save_leaves_the_old_memory_or_the_new(tmp_path: Path) -> None:
    program = """
old, new = _example(1), _example(2)
seen = []
for at in range(200):
    place = root / str(at)
    old.save(place)
    if mode == "journal":
        journal = Journal.open(place, {"a": 1}, {}, "digest")
        journal.record({"n": 0}, {"t": torch.zeros(2)})
    else:
        journal = None
    if child(at, lambda: new.save(place, journal=journal)):
        break
    if journal is not None:
        journal.close()
    stored = load_memory_dir(place)
    assert [e["id"] for e in stored.ledger] == stored.memory.edit_ids
    seen.append(stored.config["seed"])
    # The run is over exactly when its memory is there.
    assert Journal.exists(place) == (mode == "journal" and seen[-1] == 1)
    if Journal.exists(place):
        again = Journal.resume(place, {"a": 1}, {}, "digest")
        assert again.state().steps == [{"n": 0}]
        again.close()
    new.save(place)
    assert load_memory_dir(place).config["seed"] == 2
    left = {p.name for p in place.iterdir()} - {"journal"}
    assert left == {"edits.jsonl", "side_memory.safetensors", "wise_config.json"}, left
assert seen == sorted(seen) and set(seen) == {1, 2}, seen
print(len(seen))
"""
    for mode in ("plain", "journal"):
        assert int(_run(program, str(tmp_path / mode), mode)) > 15


@pytest.mark.slow
def test_killed_at_any_call_a_journal_holds_the_step_or_not(tmp_path: Path) -> None:
    program = """
def record(journal, n):
    tensors = {"delta": torch.full((3,), float(n))}
    kept = {"shard": torch.full((2,), float(n))} if n % 2 else None
    journal.record({"n": n, "loss": 0.1 * n}, tensors, kept)

def check(place, least, most):
    journal = Journal.resume(place, {"a": 1}, {}, "digest")
    state = journal.state()
    count = 0 if state is None else len(state.steps)
    assert least <= count <= most, (least, count, most)
    if state is not None:
        assert [s["n"] for s in state.steps] == list(range(count))
        assert state.tensors["delta"].tolist() == [float(count - 1)] * 3
        for n, kept in enumerate(state.kept):
            assert (kept["shard"].tolist() if n % 2 else kept) == ([float(n)] * 2 if n % 2 else {})
    # The run goes on from there.
    record(journal, count)
    assert len(journal.state().steps) == count + 1
    journal.close()
    return count

seen = []
for done in (0, 1, 2):
    for at in range(200):
        place = root / f"{done}-{at}"
        journal = Journal.open(place, {"a": 1}, {}, "digest")
        for n in range(done):
            record(journal, n)
        if child(at, lambda: record(journal, done)):
            break
        journal.close()
        seen.append(check(place, done, done + 1) - done)
# Resuming may be killed as well.
for at in range(200):
    place = root / f"resume-{at}"
    journal = Journal.open(place, {"a": 1}, {}, "digest")
    for n in range(3):
        record(journal, n)
    with open(place / "journal" / "steps.jsonl", "ab") as file:
        file.write(b'{"entry": {"st')
    (place / "journal" / "state-000003.safetensors").write_bytes(b"half")
    journal.close()
    if child(at, lambda: Journal.resume(place, {"a": 1}, {}, "digest").close()):
        break
    assert check(place, 3, 3) == 3
# Opening and finishing too: there is a whole journal or none.
for at in range(200):
    place = root / f"open-{at}"
    if child(at, lambda: Journal.open(place, {"a": 1}, {}, "digest").close()):
        break
    if Journal.exists(place):
        assert check(place, 0, 0) == 0
    else:
        Journal.open(place, {"a": 1}, {}, "digest").close()
for at in range(200):
    place = root / f"finish-{at}"
    journal = Journal.open(place, {"a": 1}, {}, "digest")
    record(journal, 0)
    if child(at, journal.finish):
        break
    journal.close()
    if Journal.exists(place):
        assert check(place, 1, 1) == 1
    else:
        Journal.open(place, {"a": 1}, {}, "digest").finish()
        assert list(place.iterdir()) == []
assert set(seen) == {0, 1}, seen
print(len(seen))
"""
    assert int(_run(program, str(tmp_path), "journal")) > 20


@pytest.mark.slow
def test_killed_at_random_moments_a_run_loses_at_most_the_step_in_flight(tmp_path: Path) -> None:
    program = """
import random, time
def work():
    journal = Journal.open(root, {"a": 1}, {}, "digest")
    for n in range(100000):
        journal.record({"n": n}, {"delta": torch.full((50000,), float(n))})
        os.write(told, f"{n}\\n".encode())
for trial in range(6):
    reading, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    os.close(told)
    time.sleep(0.05 + random.Random(trial).random() / 4)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    acknowledged = os.fdopen(reading).read().count("\\n")
    if Journal.exists(root):
        journal = Journal.resume(root, {"a": 1}, {}, "digest")
        state = journal.state()
        count = 0 if state is None else len(state.steps)
        assert acknowledged <= count <= acknowledged + 1
        if state is not None:
            assert state.tensors["delta"].eq(count - 1).all()
        journal.finish()
    else:
        assert acknowledged == 0
print("done")
"""
    assert _run(program, str(tmp_path / "run"), "random") == "done\n"


def test_a_full_disk_is_one_clear_line(make_example: MakeExample, tmp_path: Path) -> None:
    make_example(1).save(tmp_path / "old")
    program = """
import resource
from wise_ext.errors import StorageError
new = _example(2)
before = (root / "side_memory.safetensors").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 100, resource.RLIM_INFINITY))
for work in (lambda: new.save(root), lambda: new.save(root / "new")):
    try:
        work()
    except StorageError as error:
        print(error)
assert (root / "side_memory.safetensors").read_bytes() == before
assert load_memory_dir(root).config["seed"] == 1
assert sorted(p.name for p in root.iterdir()) == [
    "edits.jsonl", "side_memory.safetensors", "wise_config.json"
]
journal = Journal.open(root, {"a": 1}, {}, "digest")
journal.record({"n": 0}, {"t": torch.zeros(10)})
try:
    journal.record({"n": 1}, {"t": torch.zeros(100000)})
except StorageError as error:
    print(error)
journal.record({"n": 1}, {"t": torch.ones(10)})
state = journal.state()
assert [s["n"] for s in state.steps] == [0, 1] and state.tensors["t"].tolist() == [1.0] * 10
journal.finish()
"""
    lines = _run(program, str(tmp_path / "old"), "full").splitlines()
    assert len(lines) == 3
    assert all("no space is left" in line and "choose another folder" in line for line in lines)


def test_folders_that_cannot_be_written(
    make_example: MakeExample, disk: Any, tmp_path: Path
) -> None:
    example = make_example()
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="a file stands where a folder is needed"):
            example.save(place)
        with pytest.raises(StorageError, match="a file stands where a folder is needed"):
            Journal.open(place, {}, {})
    with (
        disk.failing(0, errno.EACCES),
        pytest.raises(StorageError, match=r"not allowed .*choose a folder you may write to"),
    ):
        example.save(tmp_path / "locked")
    with disk.failing(5, errno.EIO), pytest.raises(StorageError, match="check the disk"):
        example.save(tmp_path / "worn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_read_only_directory_loads_even_in_the_middle_of_a_commit(
    make_example: MakeExample, disk: Any, tmp_path: Path
) -> None:
    old, new = make_example(1), make_example(2)
    old.save(tmp_path)
    at = 0
    # Stop after the commit, while the files are being moved.
    while not (tmp_path / ".staged").exists():
        shutil.rmtree(tmp_path / ".saving", ignore_errors=True)
        with disk.failing(at, once=False), pytest.raises(StorageError):
            new.save(tmp_path)
        at += 1
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with disk.failing(0, errno.EROFS, once=False):
        assert _seed_of(tmp_path) == 2
    assert disk.calls == 0
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert not Journal.exists(tmp_path)
    # A run that starts here finishes the move first.
    Journal.open(tmp_path, {}, {}).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, JOURNAL])
