"""What the fields of a record mean, in each of the formats that edits come in.

* this project's: ``prompt``, ``target_new``, optional ``id``, ``subject``, ``rephrase_prompt``,
  ``locality_prompt``, ``locality_ground_truth``;
* EasyEdit's: the same, with ``locality: {name: {prompt, ground_truth}}``;
* zsRE as MEND prepared it: ``src``, ``alt``, ``rephrase``, ``loc``, ``loc_ans``;
* long-form, as UnKE, AKEW and EditEvery have it: ``question``, ``answer``, optional ``id``,
  ``subject``, ``paraphrase``, and ``sub_question`` with ``sub_answer``, two equally long lists. A
  record with a question and an answer is read so whatever else it holds.
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError


def as_object(record: object, where: str) -> dict[str, Any]:
    """The record, which must be a JSON object. Raises :class:`DataError`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: {_kind(record)} where a JSON object belongs: write one edit")
    return record


def edit_fields(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an edit, all but its id, by their names in ``Edit``.

    Surrounding white space is dropped; an optional text that is empty is absent.

    Args:
        record: one JSON object.
        where: the file and the line, for complaints.

    Raises:
        DataError: one line that names the place, the field and the cure.
    """
    if _is_long(record):
        return _long_fields(record, where)
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


def identifier(record: dict[str, Any], where: str) -> str | None:
    """The name a record gives its edit, if it does.

    Raises:
        DataError: it is empty, or neither text nor a whole number.
    """
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


def _is_long(record: dict[str, Any]) -> bool:
    if record.get("question") is not None and record.get("answer") is not None:
        return True
    # One of the two alone, and nothing else it could be: a long-form record to complain about.
    short = {"prompt", "target_new", "src", "alt"}
    return bool({"question", "answer"} & record.keys()) and not short & record.keys()


def _long_fields(record: dict[str, Any], where: str) -> dict[str, Any]:
    questions = _texts(record, "sub_question", where)
    answers = _texts(record, "sub_answer", where)
    if len(questions) != len(answers):
        raise DataError(
            f"{where}: field 'sub_question' has {len(questions)} texts and 'sub_answer' "
            f"{len(answers)}: give each sub-question one answer"
        )
    return {
        "prompt": _required(record, "question", where),
        "target_new": _required(record, "answer", where),
        "subject": _optional(record, "subject", where),
        "rephrase_prompt": _optional(record, "paraphrase", where),
        "sub_question": questions,
        "sub_answer": answers,
        "is_long": True,
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


def _texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = record.get(key)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise DataError(f"{where}: field '{key}' is {_kind(values)}: make it a list of texts")
    return tuple(
        _required({f"{key}[{i}]": value}, f"{key}[{i}]", where) for i, value in enumerate(values)
    )


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
