from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wise_ext.errors import StorageError
from wise_ext.storage import Journal, digest_edits, load_memory_dir
from wise_ext.storage.commit import JOURNAL

CONFIG = {"seed": 3, "rate": 0.05, "margins": (5.0, 20.0), "layer": "auto"}
BASE = {"name": "tiny", "fingerprint": "abc"}
EDITS = digest_edits([{"id": "a", "prompt": "p", "target_new": "t"}])
MakeExample = Callable[..., Any]


def _started(directory: Path, steps: int = 3) -> Journal:
    journal = Journal.open(directory, CONFIG, BASE, EDITS)
    for n in range(steps):
        kept = {"shard": torch.full((4,), n)} if n == 1 else None
        journal.record({"edit": f"é{n}", "loss": n / 3}, {"delta": torch.full((2, 3), n)}, kept)
    return journal


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    place = tmp_path / "new"
    assert not Journal.exists(place)
    _started(place).close()
    assert Journal.exists(place)
    with Journal.resume(place, CONFIG, BASE, EDITS) as journal:
        assert journal.num_steps == 3
        state = journal.state()
        assert state is not None
        assert state.steps == [{"edit": f"é{n}", "loss": n / 3} for n in range(3)]
        assert state.tensors["delta"].equal(torch.full((2, 3), 2))
        assert [sorted(kept) for kept in state.kept] == [[], ["shard"], []]
        assert state.kept[1]["shard"].equal(torch.full((4,), 1))
        journal.record({"edit": "é3", "loss": 1.0}, {})
    names = sorted(p.name for p in (place / JOURNAL).iterdir())
    assert names == [
        "header.json",
        "kept-000001.safetensors",
        "state-000003.safetensors",
        "steps.jsonl",
    ]
    with Journal.resume(place, CONFIG, BASE, EDITS) as journal:
        state = journal.state()
        assert state is not None
        assert (len(state.steps), state.tensors) == (4, {})
        journal.finish()
    assert list(place.iterdir()) == []


def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path: Path) -> None:
    _started(tmp_path / "whole", 4).close()
    _started(tmp_path / "broken", 2).close()
    with Journal.resume(tmp_path / "broken", CONFIG, BASE, EDITS) as journal:
        for n in (2, 3):
            journal.record({"edit": f"é{n}", "loss": n / 3}, {"delta": torch.full((2, 3), n)})
    whole, broken = (tmp_path / name / JOURNAL for name in ("whole", "broken"))
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in broken.iterdir()
    }


def test_a_run_without_a_step(tmp_path: Path) -> None:
    with _started(tmp_path, 0) as journal:
        assert journal.state() is None
    with Journal.resume(tmp_path, CONFIG, BASE, EDITS) as journal:
        assert (journal.state(), journal.num_steps) == (None, 0)


@pytest.mark.parametrize(
    ("config", "base", "edits", "message"),
    [
        (CONFIG | {"rate": 0.1}, BASE, EDITS, r"the settings \(rate: 0.05 then, 0.1 now\)"),
        (
            {"seed": 4, "rate": 0.05, "layer": "auto", "new": 1},
            BASE,
            EDITS,
            r"\(margins: \[5.0, 20.0\] then, None now; new: None then, 1 now; seed: 3 then, 4 now",
        ),
        (CONFIG, BASE | {"fingerprint": "xyz"}, EDITS, r"the base model \(fingerprint: abc then"),
        (CONFIG, BASE, "other", r"the list of edits \(.* then, other now\)"),
    ],
)
def test_a_run_that_differs_is_refused(
    tmp_path: Path, config: dict[str, Any], base: dict[str, Any], edits: str, message: str
) -> None:
    _started(tmp_path).close()
    with pytest.raises(StorageError, match=message) as caught:
        Journal.resume(tmp_path, config, base, edits)
    assert "resume it as it was started, or remove" in str(caught.value)
    Journal.resume(tmp_path, CONFIG, BASE, EDITS).close()


def test_a_memory_that_changed_under_the_run(make_example: MakeExample, tmp_path: Path) -> None:
    make_example(1).save(tmp_path)
    _started(tmp_path).close()
    Journal.resume(tmp_path, CONFIG, BASE, EDITS).close()
    make_example(2).save(tmp_path)
    with pytest.raises(StorageError, match="the memory that the run started from"):
        Journal.resume(tmp_path, CONFIG, BASE, EDITS)


def test_saving_ends_the_run(make_example: MakeExample, tmp_path: Path) -> None:
    make_example(1).save(tmp_path)
    journal = _started(tmp_path)
    make_example(2).save(tmp_path, journal=journal)
    assert not Journal.exists(tmp_path)
    assert load_memory_dir(tmp_path).config["seed"] == 2
    with pytest.raises(StorageError, match="is closed"):
        journal.record({}, {})
    with pytest.raises(StorageError, match="no unfinished run"):
        Journal.resume(tmp_path, CONFIG, BASE, EDITS)


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    _started(tmp_path).close()
    with pytest.raises(StorageError, match="--resume"):
        Journal.open(tmp_path, CONFIG, BASE, EDITS)
    with pytest.raises(StorageError, match="unfinished editing run and no memory yet"):
        load_memory_dir(tmp_path)
    with Journal.open(tmp_path, CONFIG, BASE, "others", discard=True) as journal:
        assert journal.num_steps == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = _started(tmp_path)
    with pytest.raises(StorageError, match="another process is editing into"):
        Journal.resume(tmp_path, CONFIG, BASE, EDITS)
    journal.close()
    Journal.resume(tmp_path, CONFIG, BASE, EDITS).close()


def test_every_byte_counts(tmp_path: Path) -> None:
    _started(tmp_path).close()
    folder = tmp_path / JOURNAL
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for place in {*range(0, len(data), 3), len(data) - 1}:
            changed = bytearray(data)
            changed[place] ^= 1
            path.write_bytes(changed)
            with (
                pytest.raises(StorageError, match=r"damaged|differs"),
                Journal.resume(tmp_path, CONFIG, BASE, EDITS) as journal,
            ):
                journal.state()
            path.write_bytes(data)
        path.unlink()
        with (
            pytest.raises(StorageError, match=f"{path.name} in .* is damaged or missing"),
            Journal.resume(tmp_path, CONFIG, BASE, EDITS) as journal,
        ):
            journal.state()
        path.write_bytes(data)
    Journal.resume(tmp_path, CONFIG, BASE, EDITS).close()


def test_steps_that_vanished_are_noticed(tmp_path: Path) -> None:
    _started(tmp_path).close()
    steps = tmp_path / JOURNAL / "steps.jsonl"
    lines = steps.read_bytes().splitlines(keepends=True)
    for kept in (lines[:1], lines[1:], lines[:2], [], [lines[1], lines[0], lines[2]]):
        steps.write_bytes(b"".join(kept))
        with pytest.raises(StorageError, match="damaged or missing"):
            Journal.resume(tmp_path, CONFIG, BASE, EDITS)


def test_a_line_cut_short_is_the_step_in_flight(tmp_path: Path) -> None:
    _started(tmp_path, 1).close()
    steps = tmp_path / JOURNAL / "steps.jsonl"
    whole = steps.read_bytes()
    steps.write_bytes(whole + b'{"entry": {"step": {}, "tens')
    (tmp_path / JOURNAL / "state-000001.safetensors").write_bytes(b"half")
    (tmp_path / JOURNAL / "kept-000001.safetensors").write_bytes(b"")
    Journal.resume(tmp_path, CONFIG, BASE, EDITS).close()
    assert steps.read_bytes() == whole
    names = sorted(p.name for p in (tmp_path / JOURNAL).iterdir())
    assert names == ["header.json", "state-000000.safetensors", "steps.jsonl"]


@pytest.mark.parametrize("once", [True, False])
def test_a_step_that_cannot_be_recorded_is_as_if_never_tried(
    tmp_path: Path, disk: Any, once: bool
) -> None:
    failures = 0
    for at in range(50):
        place = tmp_path / str(at)
        journal = _started(place, 2)
        recorded = True
        with disk.failing(at, once=once):
            try:
                journal.record({"edit": "é2", "loss": 2 / 3}, {"delta": torch.full((2, 3), 2)})
            except StorageError as error:
                recorded = False
                assert "no space is left" in str(error)
        assert journal.num_steps == 2 + recorded
        if not recorded:
            failures += 1
            # The same journal takes the step once there is space again.
            journal.record({"edit": "é2", "loss": 2 / 3}, {"delta": torch.full((2, 3), 2)})
        journal.close()
        with Journal.resume(place, CONFIG, BASE, EDITS) as again:
            state = again.state()
            assert state is not None
            assert [step["edit"] for step in state.steps] == ["é0", "é1", "é2"]
        if disk.calls <= at:
            break
    # Opening, writing and syncing the state; opening and syncing the folder; writing and syncing
    # the line.
    assert failures == 7


def test_a_journal_that_cannot_start_leaves_nothing(tmp_path: Path, disk: Any) -> None:
    for at in range(50):
        place = tmp_path / str(at)
        with disk.failing(at, errno.EACCES):
            try:
                Journal.open(place, CONFIG, BASE, EDITS).close()
                started = True
            except StorageError as error:
                assert "choose a folder you may write to" in str(error)
                started = False
        if disk.calls <= at:
            break
        assert started or not place.exists() or Journal.exists(place)


def test_steps_must_be_json(tmp_path: Path) -> None:
    journal = _started(tmp_path, 1)
    with pytest.raises(StorageError, match="JSON"):
        journal.record({"loss": float("nan")}, {})
    journal.record({1: ("a", 2)}, {})  # type: ignore[dict-item]
    state = journal.state()
    assert state is not None
    assert state.steps[1] == {"1": ["a", 2]}


def test_digest_of_edits() -> None:
    first, second = {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}
    assert digest_edits([first, second]) == digest_edits([dict(reversed(first.items())), second])
    assert (
        len({digest_edits(e) for e in ([first], [second], [first, second], [second, first])}) == 4
    )
