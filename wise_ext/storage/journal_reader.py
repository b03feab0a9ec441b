"""Reading a journal: whole lines count, a line that was cut short is dropped, damage is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from wise_ext.errors import StorageError
from wise_ext.storage.commit import CONFIG, JOURNAL, read_committed
from wise_ext.storage.directory import read_config
from wise_ext.storage.encoding import canonical, decode_tensors, parse
from wise_ext.storage.files import sha256

JOURNAL_VERSION = 1
HEADER = "header.json"
STEPS = "steps.jsonl"
_NAMES = {
    "version": "the journal's format version",
    "config": "the settings",
    "base": "the base model",
    "edits": "the list of edits",
    "memory": "the memory that the run started from",
}


class JournalState(NamedTuple):
    """Where a run was.

    Attributes:
        steps: what ``record`` was given for each step.
        tensors: the open state after the last step.
        kept: for each step the tensors it left for good (mostly none).
    """

    steps: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    kept: list[dict[str, Tensor]]


class Tail(NamedTuple):
    """The end of the steps: what the next line is appended to."""

    entries: tuple[dict[str, Any], ...]
    length: int
    digest: str


def make_header(
    where: Path, config: Mapping[str, Any], base: Mapping[str, Any], edits: str
) -> dict[str, Any]:
    """Return what identifies a run: its arguments and the memory now in the directory."""
    try:
        read_committed(where, CONFIG)
        memory = read_config(where)["checksum"]
    except FileNotFoundError:
        memory = None
    header = {
        "version": JOURNAL_VERSION,
        "config": dict(config),
        "base": dict(base),
        "edits": edits,
        "memory": memory,
    }
    return plain(header)


def compare_header(where: Path, stored: bytes, wanted: Mapping[str, Any]) -> None:
    """Check that a run is the one that is to be resumed.

    Raises:
        StorageError: naming what differs, with both values.
    """
    try:
        header = parse(stored)
    except ValueError:
        raise damaged(where / JOURNAL, HEADER) from None
    if not isinstance(header, dict) or header.keys() != wanted.keys():
        raise damaged(where / JOURNAL, HEADER)
    for key, name in _NAMES.items():
        old, new = header[key], wanted[key]
        if old != new:
            raise StorageError(
                f"the unfinished run in {where} differs in {name}{_difference(old, new)}: resume "
                f"it as it was started, or remove {where / JOURNAL} to start over"
            )


def make_line(entry: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """Return the line of an entry, and its digest, which covers the lines before."""
    digest = sha256(before.encode() + canonical(entry))
    return canonical({"entry": entry, "sha256": digest}), digest


def read_tail(folder: Path) -> Tail:
    """Read the steps as far as they are whole.

    Args:
        folder: the journal's folder.

    Raises:
        StorageError: a line, or the latest state, is damaged or missing.
    """
    digest = sha256(_read(folder, HEADER))
    data = _read(folder, STEPS)
    entries: list[dict[str, Any]] = []
    length = 0
    # Only a line that was being written ends without a line feed.
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            entry = parse(line)["entry"]
            expected, after = make_line(entry, digest)
        except (ValueError, TypeError, KeyError):
            raise damaged(folder, STEPS) from None
        if line != expected:
            raise damaged(folder, STEPS)
        entries.append(entry)
        length, digest = length + len(line), after
    if any(_number(path) > len(entries) for path in tensor_files(folder)):
        raise damaged(folder, STEPS)
    tail = Tail(tuple(entries), length, digest)
    if entries:
        read_tensors(folder, entries[-1]["tensors"]["state"])
    return tail


def read_state(folder: Path, tail: Tail) -> JournalState | None:
    """Read all that the steps name; None where there is no step.

    Raises:
        StorageError: a file of tensors is missing or damaged.
    """
    if not tail.entries:
        return None
    kept = []
    for entry in tail.entries:
        name = entry["tensors"].get("kept")
        kept.append(read_tensors(folder, name) if name else {})
    tensors = read_tensors(folder, tail.entries[-1]["tensors"]["state"])
    return JournalState([entry["step"] for entry in tail.entries], tensors, kept)


def read_tensors(folder: Path, named: Mapping[str, str]) -> dict[str, Tensor]:
    """Read one file of tensors.

    Raises:
        StorageError: it is missing or damaged.
    """
    data = _read(folder, named["file"])
    if sha256(data) != named["sha256"]:
        raise damaged(folder, named["file"])
    return decode_tensors(data, str(folder / named["file"]))


def tensor_files(folder: Path) -> list[Path]:
    """Return the files of tensors that are there, named or not."""
    return sorted([*folder.glob("state-*.safetensors"), *folder.glob("kept-*.safetensors")])


def named_files(tail: Tail) -> set[str]:
    """Return the files of tensors that count."""
    return {
        content["file"]
        for entry in tail.entries
        for kind, content in entry["tensors"].items()
        if kind == "kept" or entry is tail.entries[-1]
    }


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value as it reads back from JSON."""
    copy: dict[str, Any] = parse(canonical(value))
    return copy


def damaged(folder: Path, name: str) -> StorageError:
    """Return the error about a file of the journal that cannot be used."""
    return StorageError(
        f"{name} in {folder} is damaged or missing: the run cannot be resumed, remove {folder} to "
        "start over"
    )


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise damaged(folder, name) from None


def _difference(old: object, new: object) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f" ({old} then, {new} now)"
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    parts = (f"{key}: {old.get(key)} then, {new.get(key)} now" for key in keys)
    return f" ({'; '.join(parts)})"
