"""Edits and the files they come from.

Three kinds of record are understood, in a JSONL file or in one JSON list:

* this project's: ``prompt``, ``target_new``, optional ``id``, ``subject``, ``rephrase_prompt``,
  ``locality_prompt``, ``locality_ground_truth``;
* EasyEdit's: the same, with ``locality: {name: {prompt, ground_truth}}``;
* zsRE as MEND prepared it: ``src``, ``alt``, ``rephrase``, ``loc``, ``loc_ans``.

A file is checked whole before anything is returned, so a mistake on its last line costs no editing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class Edit:
    """One fact to write into a model.

    Attributes:
        id: the edit's name, unique in its memory; ``undo`` and the reports use it.
        prompt: the text the model is to continue.
        target_new: what it is to answer; the stop token is added by the editor.
        subject: what the fact is about, if known. Edits of one subject share a shard.
        rephrase_prompt: the same question in other words: measured, never trained on.
        locality_prompt: unrelated text that the edit must leave alone.
        locality_ground_truth: the answer that goes with ``locality_prompt``.

    Raises:
        DataError: the id, the prompt or the target is empty, or a field is not text.
    """

    id: str
    prompt: str
    target_new: str
    subject: str | None = None
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_ground_truth: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise DataError(f"Edit.{name} must be text, not {type(value).__name__}")
            if not value.strip():
                raise DataError(f"Edit.{name} is empty (edit id {self.id!r}): give it a text")
        for name in ("subject", "rephrase_prompt", "locality_prompt", "locality_ground_truth"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                raise DataError(f"Edit.{name} must be text or None, not {kind} (edit {self.id!r})")


def read_edits(path: str | Path, limit: int | None = None, offset: int = 0) -> list[Edit]:
    """Read the edits of a JSONL or JSON file.

    Surrounding white space of every text is dropped; unknown fields are ignored; an edit without
    an id is called ``edit-<n>`` after its line (JSONL) or its place in the list (JSON), so that it
    keeps its name under any ``limit`` and ``offset``.

    Args:
        path: the file.
        limit: at most this many edits; ``None`` for all.
        offset: how many edits to leave out at the start.

    Raises:
        DataError: one line that names the file, the line, the field and the cure.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: ask for at least one edit")
    if offset < 0:
        raise DataError(f"offset is {offset}: it must not be negative")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty: write at least one edit into it")
    is_list = text.lstrip().startswith("[")
    records = _list_records(text, path) if is_list else _line_records(text, path)

    rows: list[tuple[int, str | None, dict[str, str | None]]] = []
    first_line: dict[str, int] = {}
    for line, record in records:
        where = f"{path} line {line}"
        fields = _fields(record, where)
        given = _identifier(record, where)
        if given is not None:
            if given in first_line:
                raise DataError(
                    f"{where}: field 'id': {given!r} is already the id of line "
                    f"{first_line[given]}: give each edit its own id"
                )
            first_line[given] = line
        rows.append((line, given, fields))
    if not rows:
        raise DataError(f"{path}: the list holds no edits: write at least one into it")

    taken = set(first_line)
    edits = []
    for number, (line, given, fields) in enumerate(rows, start=1):
        name = given or _free_name(f"edit-{number if is_list else line}", taken)
        taken.add(name)
        edits.append(_edit(name, fields))
    if offset >= len(edits):
        raise DataError(
            f"{path}: offset {offset} leaves nothing of its {len(edits)} edits: "
            "use a smaller offset"
        )
    return edits[offset:] if limit is None else edits[offset : offset + limit]


def demo_edits() -> list[Edit]:
    """The invented facts that ``wise-ext demo`` teaches a model (written for this project)."""
    with resources.as_file(resources.files("wise_ext").joinpath("data/demo_facts.jsonl")) as path:
        return read_edits(path)


def find_conflicts(edits: Sequence[Edit]) -> list[tuple[str, str]]:
    """Edits that an edit further down contradicts: the same prompt with another target.

    Prompts are compared without regard to white space. The last edit of a prompt wins.

    Returns:
        Pairs ``(id of the superseded edit, id of the edit that wins)``, in the order of the edits.
    """
    winner: dict[str, Edit] = {}
    for edit in edits:
        winner[squeezed(edit.prompt)] = edit
    pairs = []
    for edit in edits:
        last = winner[squeezed(edit.prompt)]
        if squeezed(edit.target_new) != squeezed(last.target_new):
            pairs.append((edit.id, last.id))
    return pairs


def squeezed(text: str) -> str:
    """A text without regard to white space."""
    return " ".join(text.split())


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path}: is a directory: name the edit file itself")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path of the edit file") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: cannot be read ({cause}): check the path and its rights"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark
        start = error.start + (len(data) - len(error.object))
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 (byte 0x{data[start]:02x} at byte offset {start}): "
            "save the file as UTF-8"
        ) from None


def _line_records(text: str, path: Path) -> Iterator[tuple[int, object]]:
    # not splitlines(): U+2028 and its like are ordinary characters inside a JSON string
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        where = f"{path} line {line}"
        try:
            yield line, json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: broken JSON ({error.msg}, column {error.colno}): "
                "write one JSON object a line, or one JSON list"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: unreadable JSON ({error}): correct the line") from None


def _list_records(text: str, path: Path) -> Iterator[tuple[int, object]]:
    # record by record, because json.loads would forget on which line each one began
    decoder = json.JSONDecoder()
    line, seen = 1, 0

    def line_of(at: int) -> int:
        nonlocal line, seen
        line, seen = line + text.count("\n", seen, at), at
        return line

    def skip_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def broken(at: int, cause: object) -> DataError:
        return DataError(
            f"{path} line {line_of(at)}: broken JSON ({cause}): write a list of JSON objects"
        )

    at = skip_space(text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        at = skip_space(at)
        try:
            record, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise broken(at, error) from None
        yield line_of(at), record
        at = skip_space(end)
        mark = text[at : at + 1]
        if mark == "]":
            at = skip_space(at + 1)
            if at < len(text):
                raise broken(at, "more text after the list")
            return
        if mark != ",":
            raise broken(at, "',' or ']' expected")
        at += 1


def _identifier(record: object, where: str) -> str | None:
    assert isinstance(record, dict)  # _fields refused anything else
    for key in ("id", "case_id"):
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise DataError(f"{where}: field '{key}' is {_kind(value)}: make it a text or a number")
        text = _checked(str(value), key, where)
        if not text:
            raise DataError(f"{where}: field '{key}' is empty: give an id, or leave the field out")
        return text
    return None


def _free_name(name: str, taken: set[str]) -> str:
    free, n = name, 2
    while free in taken:
        free, n = f"{name}-{n}", n + 1
    return free


def _fields(record: object, where: str) -> dict[str, str | None]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: {_kind(record)} where a JSON object belongs: write one edit")
    if "src" in record or "alt" in record:
        return {
            "prompt": _required(record, "src", where),
            "target_new": _required(record, "alt", where),
            "subject": _optional(record, "subject", where),
            "rephrase_prompt": _optional(record, "rephrase", where),
            "locality_prompt": _optional(record, "loc", where),
            "locality_ground_truth": _optional(record, "loc_ans", where),
        }
    locality_prompt = _optional(record, "locality_prompt", where)
    locality_answer = _optional(record, "locality_ground_truth", where)
    if locality_prompt is None and record.get("locality") is not None:
        locality_prompt, locality_answer = _easyedit_locality(record["locality"], where)
    rephrase = "rephrase" if record.get("rephrase_prompt") is None else "rephrase_prompt"
    return {
        "prompt": _required(record, "prompt", where),
        "target_new": _required(record, "target_new", where),
        "subject": _optional(record, "subject", where),
        "rephrase_prompt": _optional(record, rephrase, where),
        "locality_prompt": locality_prompt,
        "locality_ground_truth": locality_answer,
    }


def _easyedit_locality(value: object, where: str) -> tuple[str | None, str | None]:
    """The first prompt of ``{name: {prompt, ground_truth}}``; each level may also be a list."""
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: field 'locality' is {_kind(value)}: "
            "write {name: {prompt, ground_truth}} as EasyEdit does"
        )
    for name, group in value.items():
        one = group[0] if isinstance(group, list) and group else group
        if not one:
            continue
        if not isinstance(one, dict):
            raise DataError(
                f"{where}: field 'locality.{name}' is {_kind(one)}: write {{prompt, ground_truth}}"
            )
        prompt = _optional(one, "prompt", where, inside=f"locality.{name}.")
        if prompt is not None:
            return prompt, _optional(one, "ground_truth", where, inside=f"locality.{name}.")
    return None, None


def _required(record: dict[str, Any], key: str, where: str) -> str:
    if record.get(key) is None:
        raise DataError(f"{where}: field '{key}' is absent: every edit needs it")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{key}' is {_kind(value)}: make it a text")
    text = _checked(value, key, where)
    if not text:
        raise DataError(f"{where}: field '{key}' is empty: fill it in or remove the edit")
    return text


def _optional(record: dict[str, Any], key: str, where: str, inside: str = "") -> str | None:
    value = record.get(key)
    while isinstance(value, list):  # EasyEdit wraps some answers in lists, even twice
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field '{inside}{key}' is {_kind(value)}: make it a text or leave it out"
        )
    return _checked(value, inside + key, where) or None


def _checked(value: str, key: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{key}' holds half a character (a lone surrogate, "
            f"\\u{ord(value[error.start]):04x}): correct the escape"
        ) from None
    return value.strip()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _edit(name: str, fields: dict[str, str | None]) -> Edit:
    prompt, target = fields["prompt"], fields["target_new"]
    assert prompt is not None and target is not None  # _required saw to it
    return Edit(
        id=name,
        prompt=prompt,
        target_new=target,
        subject=fields["subject"],
        rephrase_prompt=fields["rephrase_prompt"],
        locality_prompt=fields["locality_prompt"],
        locality_ground_truth=fields["locality_ground_truth"],
    )
