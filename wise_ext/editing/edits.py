"""Edits and the files they come from.

They are read from a JSONL file or from one JSON list, in any of the formats of :mod:`.records`. A
file is checked whole before anything is returned: a mistake on its last line costs no editing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import DataError
from .json_records import read_records
from .records import as_object, edit_fields, identifier


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
        sub_question: questions about parts of a long target: measured, never trained on.
        sub_answer: their answers, as many.
        is_long: read from a long-form record, whose target is a text and not a few words.

    Raises:
        DataError: the id, the prompt or the target is empty, a field is not text, or there are
            not as many sub-answers as sub-questions.
    """

    id: str
    prompt: str
    target_new: str
    subject: str | None = None
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_ground_truth: str | None = None
    sub_question: tuple[str, ...] = ()
    sub_answer: tuple[str, ...] = ()
    is_long: bool = False

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
        for name in ("sub_question", "sub_answer"):
            texts = getattr(self, name)
            listed = texts if isinstance(texts, (tuple, list)) else (None,)
            if not all(isinstance(text, str) and text.strip() for text in listed):
                raise DataError(f"Edit.{name} must be texts, none empty (edit {self.id!r})")
            # A ledger, which is JSON, gives lists.
            object.__setattr__(self, name, tuple(listed))
        if len(self.sub_question) != len(self.sub_answer):
            raise DataError(
                f"edit {self.id!r} has {len(self.sub_question)} sub-questions and "
                f"{len(self.sub_answer)} sub-answers: give each its answer"
            )
        if not isinstance(self.is_long, bool):
            raise DataError(f"Edit.is_long must be True or False (edit {self.id!r})")


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
    is_list, records = read_records(path)

    rows: list[tuple[int, str | None, dict[str, Any]]] = []
    first_line: dict[str, int] = {}
    for line, found in records:
        where = f"{path} line {line}"
        record = as_object(found, where)
        fields = edit_fields(record, where)
        given = identifier(record, where)
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
        edits.append(Edit(name, **fields))
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


def _free_name(name: str, taken: set[str]) -> str:
    free, n = name, 2
    while free in taken:
        free, n = f"{name}-{n}", n + 1
    return free
