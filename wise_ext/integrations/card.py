"""Model cards: what a folder holds, in the words of a hub's page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

CARD = "README.md"
# Lines of the table of edits, and characters of a prompt and of an answer there.
_MOST_EDITS = 100
_WIDTH = 100
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(folder: Path, base: Mapping[str, Any], text: str) -> None:
    """Write ``README.md``; see ``card_of``."""
    (folder / CARD).write_text(card_of(base, text), "utf-8")


def card_of(base: Mapping[str, Any], text: str) -> str:
    """A card: metadata as a hub reads it, then the text.

    Args:
        base: ``name`` and ``fingerprint`` of the base model. The metadata name it where its name
            could be a hub's, the text in any case.
        text: Markdown.
    """
    name = str(base.get("name", ""))
    is_id = _HUB_ID.fullmatch(name) and not name.startswith(".")
    data = ModelCardData(
        base_model=name if is_id else None,
        library_name="wise-ext",
        tags=["knowledge-editing", "model-editing", "wise-ext"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def base_line(base: Mapping[str, Any]) -> str:
    """The base model by name and fingerprint."""
    return f"Base model: `{base.get('name')}`, fingerprint `{base.get('fingerprint')}`.\n"


def edits_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table of a ledger's entries, the first hundred of them."""
    lines = ["| id | prompt | answer |", "|---|---|---|"]
    for entry in entries[:_MOST_EDITS]:
        cells = (entry["id"], entry["prompt"], entry["target"])
        lines.append("| " + " | ".join(_cell(str(cell)) for cell in cells) + " |")
    if len(entries) > _MOST_EDITS:
        lines.append(f"\n… and {len(entries) - _MOST_EDITS} more.")
    return "\n".join(lines) + "\n"


def metrics_table(report: Mapping[str, Any]) -> str:
    """A table of the numbers of a nested report, ``a.b`` for the ``b`` within ``a``."""
    rows = [f"| {_cell(name)} | {_number(value)} |" for name, value in _flat(report)]
    return "\n".join(["| metric | value |", "|---|---|", *rows]) + "\n"


def comparison(columns: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> str:
    """A table of several reports of the same numbers side by side."""
    flat = [dict(_flat(report)) for report in reports]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in flat[0]:
        values = " | ".join(_number(report[name]) for report in flat)
        lines.append(f"| {_cell(name)} | {values} |")
    return "\n".join(lines) + "\n"


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in report.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, bool | int | float | str):
            yield prefix + key, value


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """A text that stays one cell of a table, whatever is in it."""
    line = " ".join(text.split())
    line = line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
    for sign in ("\\", "|", "`", "*", "_", "<", "[", "]"):
        line = line.replace(sign, "\\" + sign)
    return line
