"""The objects of a JSONL file or of one JSON list, each with the line it begins on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError


def read_records(path: Path) -> tuple[bool, Iterator[tuple[int, object]]]:
    """The records of a file, parsed one by one.

    Returns:
        Whether the file is one list, and pairs (line, record).

    Raises:
        DataError: one line that names the file, the line and the cure; what is wrong with a
            record's JSON is told when it is its turn.
    """
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty: write at least one edit into it")
    if text.lstrip().startswith("["):
        return True, _list_records(text, path)
    return False, _line_records(text, path)


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
