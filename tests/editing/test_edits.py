"""Readers of edit files: every format, every mistake with its message."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from wise_ext.editing.edits import Edit, demo_edits, find_conflicts, read_edits
from wise_ext.errors import DataError

GOOD: dict[str, Any] = {"prompt": "Who runs Ardo?", "target_new": "Mila Onn"}


def write(folder: Path, *lines: object, name: str = "edits.jsonl") -> Path:
    path = folder / name
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def complaint(path: Path, **options: Any) -> str:
    """The one-line message with which a file is refused."""
    with pytest.raises(DataError) as caught:
        read_edits(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_own_format(tmp_path: Path) -> None:
    full = {
        "id": "a",
        "prompt": " Who runs Ardo? ",
        "target_new": " Mila Onn\n",
        "subject": "Ardo",
        "rephrase_prompt": "Ardo is run by",
        "locality_prompt": "2 + 2 =",
        "locality_ground_truth": "4",
        "ground_truth": ["ignored", 7],
        "portability": {"ignored": True},
    }
    edits = read_edits(write(tmp_path, full, "", GOOD))
    assert edits == [
        Edit("a", "Who runs Ardo?", "Mila Onn", "Ardo", "Ardo is run by", "2 + 2 =", "4"),
        Edit("edit-3", "Who runs Ardo?", "Mila Onn"),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        edits[0].prompt = "x"  # type: ignore[misc]


def test_mend_format_keeps_the_question_prefix(tmp_path: Path) -> None:
    record = {
        "subject": "Ardo",
        "src": "Who runs Ardo?",
        "pred": "Bo",
        "rephrase": "Ardo's head?",
        "alt": "Mila Onn",
        "answers": ["Bo"],
        "loc": "nq question: what is ice",
        "loc_ans": "frozen water",
        "cond": "Bo >> Mila Onn || Who runs Ardo?",
    }
    path = write(tmp_path, json.dumps([record], indent=1), name="zsre.json")
    expected = Edit(
        "edit-1",
        "Who runs Ardo?",
        "Mila Onn",
        "Ardo",
        "Ardo's head?",
        "nq question: what is ice",
        "frozen water",
    )
    assert read_edits(path) == [expected]
    assert read_edits(write(tmp_path, record)) == [expected]


@pytest.mark.parametrize(
    ("locality", "expected"),
    [
        ({"nbr": {"prompt": "P", "ground_truth": "G"}}, ("P", "G")),
        ({"nbr": {"prompt": ["P", "Q"], "ground_truth": ["G", "H"]}}, ("P", "G")),
        ({"a": [], "b": [{"prompt": "P", "ground_truth": [["G"], ["H"]]}]}, ("P", "G")),
        ({"nbr": {"prompt": "P"}}, ("P", None)),
        ({}, (None, None)),
    ],
)
def test_easyedit_locality(
    tmp_path: Path, locality: object, expected: tuple[str | None, str | None]
) -> None:
    record = {**GOOD, "case_id": 7, "rephrase": "Ardo's head?", "locality": locality}
    (edit,) = read_edits(write(tmp_path, json.dumps([record]), name="easy.json"))
    assert (edit.id, edit.rephrase_prompt) == ("7", "Ardo's head?")
    assert (edit.locality_prompt, edit.locality_ground_truth) == expected


def test_empty_optional_fields_are_absent(tmp_path: Path) -> None:
    record = {**GOOD, "subject": " ", "rephrase_prompt": "", "locality_prompt": None}
    assert read_edits(write(tmp_path, record)) == [Edit("edit-1", "Who runs Ardo?", "Mila Onn")]


def test_window_keeps_names(tmp_path: Path) -> None:
    path = write(tmp_path, *[{**GOOD, "prompt": f"p{i}"} for i in range(1, 6)])
    assert [e.id for e in read_edits(path, limit=2, offset=3)] == ["edit-4", "edit-5"]
    assert [e.id for e in read_edits(path, limit=9, offset=1)] == [f"edit-{i}" for i in range(2, 6)]
    assert "offset 5 leaves nothing of its 5 edits" in complaint(path, offset=5)
    assert "limit is 0" in complaint(path, limit=0)
    assert "offset is -1" in complaint(path, offset=-1)


def test_given_names_are_not_taken(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "id": "edit-1"}, {**GOOD, "id": "edit-3"}, GOOD)
    assert [e.id for e in read_edits(path)] == ["edit-1-2", "edit-1", "edit-3", "edit-4"]


def test_names_in_a_list_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([GOOD, GOOD, GOOD]), name="list.json")
    assert [e.id for e in read_edits(path)] == ["edit-1", "edit-2", "edit-3"]


def test_byte_order_mark_carriage_returns_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    line = json.dumps({**GOOD, "prompt": "a\u2028b"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert [e.prompt for e in read_edits(path)] == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x", ', "FILE line 2: broken JSON"),
        ("[1", "FILE line 2: broken JSON"),
        ('"text"', "FILE line 2: a text where a JSON object belongs"),
        ("null", "FILE line 2: null where a JSON object belongs"),
        ({"prompt": "x"}, "FILE line 2: field 'target_new' is absent"),
        ({"target_new": "x"}, "FILE line 2: field 'prompt' is absent"),
        ({"prompt": None, "target_new": "x"}, "FILE line 2: field 'prompt' is absent"),
        ({"src": "x"}, "FILE line 2: field 'alt' is absent"),
        ({**GOOD, "target_new": " \n"}, "FILE line 2: field 'target_new' is empty: fill it in"),
        ({**GOOD, "prompt": ""}, "FILE line 2: field 'prompt' is empty: fill it in"),
        ({**GOOD, "target_new": 5}, "FILE line 2: field 'target_new' is a number"),
        ({**GOOD, "target_new": ["x"]}, "FILE line 2: field 'target_new' is a list"),
        ({**GOOD, "prompt": {"a": 1}}, "FILE line 2: field 'prompt' is an object"),
        ({**GOOD, "subject": True}, "FILE line 2: field 'subject' is true/false"),
        ({**GOOD, "id": 1.5}, "FILE line 2: field 'id' is a number: make it a text or a number"),
        ({**GOOD, "id": " "}, "FILE line 2: field 'id' is empty"),
        ({**GOOD, "locality": "x"}, "FILE line 2: field 'locality' is a text"),
        ({**GOOD, "locality": {"n": "x"}}, "FILE line 2: field 'locality.n' is a text"),
        (
            {**GOOD, "locality": {"n": {"prompt": "x", "ground_truth": 3}}},
            "FILE line 2: field 'locality.n.ground_truth' is a number",
        ),
        ({**GOOD, "prompt": "half \ud83d"}, "FILE line 2: field 'prompt' holds half a character"),
        ({**GOOD, "id": "first"}, "FILE line 2: field 'id': 'first' is already the id of line 1"),
        ('{"n": ' + "9" * 5000 + "}", "FILE line 2: unreadable JSON"),
    ],
)
def test_bad_line(tmp_path: Path, line: object, expected: str) -> None:
    first = {**GOOD, "id": "first"}
    assert complaint(write(tmp_path, first, line)).startswith(expected)


def test_a_bad_line_behind_the_window_is_found(tmp_path: Path) -> None:
    assert "line 2" in complaint(write(tmp_path, GOOD, "{"), limit=1)


def test_very_deep_json(tmp_path: Path) -> None:
    assert "FILE line 1" in complaint(write(tmp_path, '{"a":' * 100_000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[\n", "FILE line 2: broken JSON (Expecting value)"),
        ('[\n{"prompt" 1\n}]', "FILE line 2: broken JSON"),
        ("[\n{} {}]", "FILE line 2: field 'prompt' is absent"),
        ("[\n%s\n%s]", "FILE line 3: broken JSON (',' or ']' expected)"),
        ("[%s,\n%s\n]\nmore", "FILE line 4: broken JSON (more text after the list)"),
        ("[%s,\n\n%s,\n]", "FILE line 4: broken JSON"),
        ("[]", "FILE: the list holds no edits"),
        ("[%s,\n 3]", "FILE line 2: a number where a JSON object belongs"),
    ],
)
def test_bad_list(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text.replace("%s", json.dumps(GOOD)))
    assert complaint(path).startswith(expected)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    first = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(first + '{"prompt": "Zürich"}'.encode("latin-1"))
    offset = len(first) + len('{"prompt": "Z')
    assert complaint(path) == (
        f"FILE line 2: not UTF-8 (byte 0xfc at byte offset {offset}): save the file as UTF-8"
    )
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\xfc")
    assert "line 2: not UTF-8 (byte 0xfc at byte offset 4)" in complaint(path)
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    assert "line 1: not UTF-8 (byte 0xff at byte offset 0)" in complaint(path)


def test_no_such_file_and_others_that_cannot_be_read(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none").startswith("FILE: no such file: check the path")
    assert complaint(tmp_path).startswith("FILE: is a directory")
    empty = tmp_path / "empty"
    empty.write_text(" \n\n")
    assert complaint(empty).startswith("FILE: the file is empty")
    assert "cannot be read (Not a directory)" in complaint(empty / "below")


@pytest.mark.parametrize("name", ["id", "prompt", "target_new"])
def test_edit_made_by_hand_is_checked(name: str) -> None:
    fields: dict[str, Any] = {"id": "a", "prompt": "p", "target_new": "t"}
    with pytest.raises(DataError, match=f"Edit.{name} is empty"):
        Edit(**{**fields, name: " "})
    with pytest.raises(DataError, match=f"Edit.{name} must be text, not int"):
        Edit(**{**fields, name: 3})
    with pytest.raises(DataError, match="rephrase_prompt must be text or None"):
        Edit(**fields, rephrase_prompt=["x"])  # type: ignore[arg-type]


def test_conflicts_name_the_loser_and_the_winner() -> None:
    edits = [
        Edit("1", "Who?", "Ann"),
        Edit("2", "Who? ", "Bob"),
        Edit("3", "When?", "now"),
        Edit("4", "Who?", " Ann"),
        Edit("5", "When?", "now"),
    ]
    assert find_conflicts(edits) == [("2", "4")]
    assert find_conflicts(edits[:3]) == [("1", "2")]
    assert find_conflicts([]) == []


def test_demo_facts_are_complete_and_distinct() -> None:
    edits = demo_edits()
    assert len(edits) >= 20
    assert find_conflicts(edits) == []
    for name in ("id", "subject", "prompt", "target_new", "rephrase_prompt", "locality_prompt"):
        values = [getattr(edit, name) for edit in edits]
        assert None not in values
        assert len(set(values)) == len(edits), name
    for edit in edits:
        assert edit.subject and edit.subject in edit.prompt
        assert edit.rephrase_prompt and edit.subject in edit.rephrase_prompt
        assert edit.locality_prompt and edit.subject not in edit.locality_prompt
        assert edit.locality_ground_truth
        assert len(edit.target_new.split()) <= 5


def test_a_benchmark_file_is_readable() -> None:
    beside = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("WISE_EXT_DATA", beside)) / "zsre_wise_edit.dev.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path} (set WISE_EXT_DATA to the folder of the data)")
    edits = read_edits(path, limit=100)
    assert len(edits) == 100
    assert all(e.rephrase_prompt and e.locality_prompt and e.subject for e in edits)
