"""Texts to take statistics over: files read lazily, and a small corpus of our own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from ..errors import DataError

_SUFFIXES = (".txt", ".jsonl", ".json")
# What `save_to_disk` of the library `datasets` leaves in its folder.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Corpus:
    """Texts under a name; every iteration reads them anew, from the first on, as they are needed.

    Attributes:
        name: what statistics say they were taken over.
        read: starts reading; raises DataError where the texts cannot be read.
    """

    name: str
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def default_corpus() -> Corpus:
    """More than two hundred paragraphs on ordinary things, in many registers and a few languages
    (written for this project): about 25,000 tokens."""
    file = resources.files("wise_ext").joinpath("data/corpus.txt")

    def read() -> Iterator[str]:
        with resources.as_file(file) as path:
            yield from _paragraphs(path)

    return Corpus("wise-ext", read)


def read_corpus(path: str | Path) -> Corpus:
    """The texts of a file or a folder.

    Args:
        path: a ``.txt`` file (blank lines between texts); a ``.jsonl`` file (each line an object
            with a "text", or a text); a ``.json`` file (a list of such); a folder of those, taken
            in the order of their names; a ``.parquet`` file or a folder of them, or a folder that
            the library ``datasets`` saved with ``save_to_disk`` (of several splits "train", or else
            the first). The last two take the column "text", and need pyarrow and datasets.

    Raises:
        DataError: one line that names the file, the place in it and the cure. Whether there is
            anything to read, and what it is read with, is found at once; what is wrong inside a
            file, when it is reached.
    """
    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        return Corpus(path.name, _tables([path]))
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(
                f"{path}: what a {path.suffix or 'nameless'} file holds is not known: "
                "give a .txt, .jsonl, .json or .parquet file"
            )
        return Corpus(path.name, lambda: _texts(path))
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder: check the path of the corpus")
    if any((path / name).is_file() for name in _SAVED):
        return Corpus(path.name, _saved(path))
    inside = sorted(p for p in path.iterdir() if p.is_file())
    files = [p for p in inside if p.suffix in _SUFFIXES]
    if files:
        return Corpus(path.name, lambda: (text for file in files for text in _texts(file)))
    tables = [p for p in inside if p.suffix == ".parquet"]
    if tables:
        return Corpus(path.name, _tables(tables))
    raise DataError(f"{path}: no .txt, .jsonl, .json or .parquet file in this folder: add one")


def _texts(path: Path) -> Iterator[str]:
    return {".txt": _paragraphs, ".jsonl": _lines, ".json": _list}[path.suffix](path)


def _decoded(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line of a file stands ("<path> line <n>"), and the line."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path} line {number}"
                try:
                    yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise DataError(f"{where}: not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        cause = error.strerror or error
        raise DataError(
            f"{path}: cannot be read ({cause}): check the path and its rights"
        ) from None


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in _decoded(path):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _lines(path: Path) -> Iterator[str]:
    for where, line in _decoded(path):
        if line.strip():
            yield _text(_parsed(line, where), where)


def _list(path: Path) -> Iterator[str]:
    records = _parsed("".join(line for _, line in _decoded(path)), str(path))
    if not isinstance(records, list):
        raise DataError(f"{path}: holds no list: write a list of texts")
    for number, record in enumerate(records, start=1):
        yield _text(record, f"{path} text {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON ({error}): correct it") from None


def _text(record: object, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise DataError(f'{where}: no text: write a text, or an object with a field "text"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a character: correct the escape") from None
    return text


def _library(name: str, path: Path) -> Any:
    """A library that only such corpora need."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(
            f"{path}: is read with {package}, which is not installed: pip install {package}, "
            "or give a .txt or .jsonl file"
        ) from None


def _tables(paths: list[Path]) -> Callable[[], Iterator[str]]:
    parquet = _library("pyarrow.parquet", paths[0])

    def read() -> Iterator[str]:
        for path in paths:
            with _explained(path), parquet.ParquetFile(path) as table:
                _require_column(table.schema_arrow.names, path)
                for batch in table.iter_batches(columns=["text"]):
                    yield from batch.column("text").to_pylist()

    return read


def _saved(path: Path) -> Callable[[], Iterator[str]]:
    datasets = _library("datasets", path)

    def read() -> Iterator[str]:
        with _explained(path):
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, dict):
                rows = rows.get("train") or next(iter(rows.values()))
            _require_column(rows.column_names, path)
            for row in rows.select_columns(["text"]):
                yield row["text"]

    return read


def _require_column(names: list[str], path: Path) -> None:
    if "text" not in names:
        raise DataError(
            f'{path}: no column "text" among {", ".join(names)}: rename the one to read'
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What those libraries complain of, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read ({cause}): restore it from a copy") from error
