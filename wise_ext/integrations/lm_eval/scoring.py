"""Both sides of an edited model under lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from ... import models
from ...evaluation.scoring import prompt_routes
from .model import WiseLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Draws for the standard errors that have no closed form.
_BOOTSTRAP = 1000


def score_both(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 16,
    chat: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a patched model with its memory and without.

    Args:
        model: patched.
        tokenizer: its tokenizer.
        tasks: of ``load_tasks``.
        batch_size: rows run at once.
        chat: put prompts into the tokenizer's chat template.
        limit: at most so many documents a task.

    Returns:
        For each task ``n`` (documents), ``to_side`` (share of their first contexts that go to the
        side memory) and ``metrics``: for each metric (with its filter, unless that is "none")
        ``unedited``, ``edited``, and the standard errors ``unedited_stderr`` and ``edited_stderr``,
        None where the harness has none.

    Raises:
        ModelError: the model is not patched.
    """
    harness = WiseLM(model, tokenizer, batch_size=batch_size)

    def run() -> dict[str, Any]:
        found: dict[str, Any] = simple_evaluate(
            model=harness,
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=_BOOTSTRAP,
        )
        return found

    edited = run()
    with models.disabled(model):
        unedited = run()
    return {
        name: {
            "n": len(edited["samples"][name]),
            "to_side": _share_to_side(harness, edited["samples"][name], batch_size),
            "metrics": _beside(unedited["results"][name], edited["results"][name]),
        }
        for name in edited["results"]
        if name in edited["samples"]
    }


def quieten() -> None:
    """Leave out the harness's remarks, which are for its developers, and keep its errors."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _beside(unedited: Mapping[str, Any], edited: Mapping[str, Any]) -> dict[str, Any]:
    """The harness writes ``metric,filter`` and ``metric_stderr,filter``."""
    table: dict[str, Any] = {}
    for key, value in edited.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = f"{metric}_stderr,{which}"
        table[metric if which == "none" else key] = {
            "unedited": unedited[key],
            "edited": value,
            "unedited_stderr": _number(unedited.get(stderr)),
            "edited_stderr": _number(edited.get(stderr)),
        }
    return table


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, float) else None


def _share_to_side(harness: WiseLM, samples: Sequence[Mapping[str, Any]], size: int) -> float:
    contexts = [sample["arguments"][0][0] for sample in samples]
    tokens = [harness.tok_encode(text) or [harness.prefix_token_id] for text in contexts]
    taken = prompt_routes(harness.model, tokens, size)
    return sum(route >= 0 for route, _ in taken) / max(1, len(taken))
