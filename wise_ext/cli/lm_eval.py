"""``wise-ext lm-eval``: lm-evaluation-harness on both sides of an edited model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .choices import (
    Check,
    CheckOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
)
from .console import table
from .files import check_file, write_json


def lm_eval(
    model: ModelArgument,
    memory: MemoryOption,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="TASK",
            help="A YAML file of the harness, a folder of them, or a name; may be repeated.  "
            "[the package's own]",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="At most N documents a task.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="B", help="Rows run at once.")
    ] = 16,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    check: CheckOption = Check.weights,
    json: JsonOption = None,
) -> None:
    """Score a model with a memory and without, on tasks of lm-evaluation-harness."""
    check_file(json, "--json")

    from ..integrations.packages import require

    require("lm_eval", "lm-eval", "wise-ext lm-eval")

    from ..integrations.lm_eval.scoring import quieten, score_both
    from ..integrations.lm_eval.tasks import load_tasks
    from .opening import open_edited

    quieten()
    built = load_tasks(tasks or ())
    network, tokenizer, _ = open_edited(model, memory, device=device, dtype=dtype, check=check)
    report = score_both(network, tokenizer, built, batch_size=batch_size, chat=chat, limit=limit)
    table(
        f"{model} with {memory}",
        ("task", "documents", "to side memory", "metric", "unedited", "edited"),
        [row for name, found in report.items() for row in _rows(name, found)],
        right=("documents", "to side memory", "unedited", "edited"),
    )
    if json is not None:
        write_json(json, report)


def _rows(name: str, found: dict[str, Any]) -> list[tuple[object, ...]]:
    """A line a metric, with standard errors."""
    about = (name, found["n"], f"{found['to_side']:.2f}")
    return [
        (*about, metric, _value(scores, "unedited"), _value(scores, "edited"))
        for metric, scores in found["metrics"].items()
    ]


def _value(scores: dict[str, Any], side: str) -> str:
    value, stderr = scores[side], scores[f"{side}_stderr"]
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
