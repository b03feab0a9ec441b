"""``wise-ext compare``: editors side by side on one file of edits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from .choices import (
    DeviceOption,
    DtypeOption,
    EditsArgument,
    LimitOption,
    ModelArgument,
    OffsetOption,
    Regime,
)
from .console import note, table
from .files import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALL = "anyedit,wise,anyedit-memit,anyedit-alphaedit,anyedit-unke,memit,alphaedit,unke,rome,grace,"
_ALL += "ft-l,ft-ewc"
# Of a report: what is shown, under which name.
_COLUMNS = {
    "ROUGE-L": ("rouge_l", "original"),
    "para.": ("rouge_l", "paraphrase"),
    "BLEU": ("bleu", "original"),
    "similar": ("similarity", "original"),
    "exact": ("exact", "original"),
    "exact para.": ("exact", "paraphrase"),
    "sub-q.": ("sub_question", "contains"),
    "locality": ("locality",),
    "CPU s": ("cpu_seconds",),
}


def compare(
    model: ModelArgument,
    edits: EditsArgument,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,…", help="Which, in order.", show_default=False)
    ] = _ALL,
    regime: Annotated[
        Regime,
        typer.Option("--regime", help="Each edit alone, or all in sequence and then asked."),
    ] = Regime.sequence,
    limit: LimitOption = None,
    offset: OffsetOption = 0,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", help="JSON lines: kept there, and not measured again."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="A setting; may be repeated."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    unedited: Annotated[
        bool, typer.Option("--unedited/--no-unedited", help="A row of the model as it is.")
    ] = True,
    similarity: Annotated[
        bool, typer.Option("--similarity/--no-similarity", help="Compare meanings, too.")
    ] = True,
    sub_questions: Annotated[
        bool, typer.Option("--sub-questions/--no-sub-questions", help="Ask those too.")
    ] = True,
    unrelated: Annotated[
        int, typer.Option("--unrelated", min=1, max=60, help="Prompts that locality is taken from.")
    ] = 60,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Compare editors: what the model then writes, what else it changed, what it cost."""
    from ..editing.edits import find_conflicts, read_edits

    records = read_edits(edits, limit=limit, offset=offset)
    check_file(rows, "--rows")

    from ..evaluation.comparing import UNEDITED, Comparing
    from ..evaluation.comparing import compare as run
    from ..evaluation.text_metrics import require_longform

    names = [name.strip() for name in methods.split(",") if name.strip()]
    what = Comparing(
        methods=(*([UNEDITED] if unedited else []), *names),
        regime=regime.value,
        settings=_by_method(settings or ()),
        chat=chat,
        similarity=similarity,
        sub_questions=sub_questions,
        unrelated=unrelated,
    )
    require_longform(similarity)
    known = _read(rows)

    from ..models import load_model

    network, tokenizer = load_model(model, dtype=dtype, device=device)
    for earlier, later in find_conflicts(records):
        note(f"edit {earlier} is left out: {later} has its prompt")
    there = {row["digest"] for row in known}
    found = []
    for row in run(network, tokenizer, records, what, known):
        found.append(row)
        if rows is not None and row["digest"] not in there:
            _append(rows, row | {"model": model, "file": edits.name} | _surroundings(network))
    table(
        f"{len(records)} edits of {edits.name}, {regime.value}",
        ("method", *_COLUMNS),
        [(row["method"], *(_shown(row, path) for path in _COLUMNS.values())) for row in found],
        right=_COLUMNS,
    )


def _surroundings(network: PreTrainedModel) -> dict[str, Any]:
    """What a figure may depend on besides its row."""
    import torch
    import transformers

    return {
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def _by_method(given: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings by method."""
    from ..editing.settings import read_settings

    settings: dict[str, dict[str, Any]] = {}
    for place, value in read_settings(given).items():
        method, _, name = place.partition(".")
        settings.setdefault(method, {})[name] = value
    return settings


def _read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file that are whole.

    Raises:
        DataError: a line is none of them, other than a last one that was cut short.
    """
    from ..errors import DataError

    if path is None or not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows.append(row | {"digest": row["digest"]})
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} line {number}: not a row of compare: name another") from None
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with path.open("a+b") as file:
        # A line that was cut short by a kill is no part of what follows.
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _shown(row: dict[str, Any], path: tuple[str, ...]) -> str | None:
    value: Any = row
    for key in path:
        value = value[key]
    return None if value is None else f"{value:.3f}"
