"""Long-form records: what they become, what is refused, and that a ledger gives them back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from wise_ext.editing.edits import Edit, read_edits
from wise_ext.editing.ledger import edit_of
from wise_ext.errors import DataError

LONG: dict[str, Any] = {
    "id": "mill",
    "question": "What is the Ardo mill known for? ",
    "answer": "It grinds chestnut flour.\nIts wheel was carved by Mila Onn.\n",
    "paraphrase": "Why do people know the mill of Ardo?",
    "subject": "the Ardo mill",
    "sub_question": ["What does it grind?", "Who carved its wheel?"],
    "sub_answer": [" Chestnut flour.", "Mila Onn."],
}
MILL = Edit(
    "mill",
    "What is the Ardo mill known for?",
    "It grinds chestnut flour.\nIts wheel was carved by Mila Onn.",
    "the Ardo mill",
    "Why do people know the mill of Ardo?",
    sub_question=("What does it grind?", "Who carved its wheel?"),
    sub_answer=("Chestnut flour.", "Mila Onn."),
    is_long=True,
)
SHORT = {"prompt": "Who runs Ardo?", "target_new": "Mila Onn"}


def write(folder: Path, *records: object) -> Path:
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_long_record(tmp_path: Path) -> None:
    bare = {"question": "Sort a list.", "answer": "sorted(x)", "category": "code"}
    empty = bare | {"paraphrase": None, "subject": "", "sub_question": [], "sub_answer": None}
    plain = Edit("edit-2", "Sort a list.", "sorted(x)", is_long=True)
    edits = read_edits(write(tmp_path, LONG, bare, empty))
    assert edits[:2] == [MILL, plain]
    assert asdict(edits[2]) == asdict(plain) | {"id": "edit-3"}
    as_list = tmp_path / "edits.json"
    as_list.write_text(json.dumps([LONG, bare]))
    assert read_edits(as_list) == edits[:2]


def test_a_question_with_an_answer_wins(tmp_path: Path) -> None:
    (edit,) = read_edits(write(tmp_path, LONG | SHORT | {"ground_truth": "x", "rephrase": "y"}))
    assert edit == MILL


@pytest.mark.parametrize(
    "more",
    [{"question": "Q?"}, {"answer": "A"}, {"question": None, "answer": "A"}, {"sub_question": [1]}],
)
def test_a_short_record_stays_short(tmp_path: Path, more: dict[str, Any]) -> None:
    (edit,) = read_edits(write(tmp_path, SHORT | more))
    assert edit == Edit("edit-1", "Who runs Ardo?", "Mila Onn")
    assert not edit.is_long


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": " "}, "field 'answer' is empty: fill it in"),
        ({"answer": None}, "field 'answer' is absent"),
        ({"question": None}, "field 'question' is absent"),
        ({"answer": ["x"]}, "field 'answer' is a list: make it a text"),
        ({"question": 7}, "field 'question' is a number: make it a text"),
        ({"paraphrase": 7}, "field 'paraphrase' is a number"),
        ({"subject": {}}, "field 'subject' is an object"),
        ({"sub_question": "x"}, "field 'sub_question' is a text: make it a list of texts"),
        ({"sub_question": ["x", 3]}, "field 'sub_question[1]' is a number: make it a text"),
        ({"sub_answer": ["", "x"]}, "field 'sub_answer[0]' is empty"),
        ({"sub_answer": ["x"]}, "field 'sub_question' has 2 texts and 'sub_answer' 1: give each"),
        ({"sub_answer": None}, "field 'sub_question' has 2 texts and 'sub_answer' 0: give each"),
        ({"answer": "half \ud83d"}, "field 'answer' holds half a character"),
        ({"id": ""}, "field 'id' is empty"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, SHORT, LONG | changes)
    with pytest.raises(DataError) as caught:
        read_edits(path)
    assert str(caught.value).startswith(f"{path} line 2: {expected}")
    assert "\n" not in str(caught.value)


def test_one_half_of_a_record_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: field 'answer' is absent"):
        read_edits(write(tmp_path, {"question": "Q?"}))


def test_a_ledger_gives_the_edit_back() -> None:
    entry = json.loads(json.dumps({"record": asdict(MILL)}))
    assert edit_of(entry) == MILL
    older = {key: entry["record"][key] for key in ("id", "prompt", "target_new", "subject")}
    assert edit_of({"record": older}).sub_question == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sub_question": ("a",)}, "edit 'e' has 1 sub-questions and 0 sub-answers"),
        ({"sub_question": "a", "sub_answer": "b"}, "Edit.sub_question must be texts, none empty"),
        ({"sub_question": ("a",), "sub_answer": (1,)}, "Edit.sub_answer must be texts"),
        ({"sub_question": ("a",), "sub_answer": (" ",)}, "Edit.sub_answer must be texts"),
        ({"is_long": 1}, "Edit.is_long must be True or False"),
    ],
)
def test_made_by_hand(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        Edit("e", "p", "t", **fields)


@pytest.mark.parametrize("name", ["unke", "akew_mquake_cf", "editevery"])
def test_published_files_are_readable(name: str) -> None:
    beside = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("WISE_EXT_DATA", beside)) / f"{name}.dev.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path} (set WISE_EXT_DATA to the folder of the data)")
    edits = read_edits(path)
    assert all(edit.is_long for edit in edits)
    assert (name == "unke") is all(edit.rephrase_prompt for edit in edits)
    assert (name != "editevery") is all(edit.sub_question for edit in edits)
