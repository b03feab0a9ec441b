"""Edits into a model's own weights: what comes out is a model, not a memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note, number_of, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..editing.edits import Edit


def edit_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    edits: Sequence[Edit],
    out: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Write edits into the weights, and save the model as ``save_pretrained`` does.

    Args:
        model: changed in place.
        tokenizer: its tokenizer; it goes with the model.
        method: one of ``editing.methods.METHODS``.
        edits: in order.
        out: a new folder, or an empty one; made whole or not at all.
        settings: of the method's configuration.

    Returns:
        Numbers about the run.

    Raises:
        ConfigError: the method changes no weights, or has no such setting.
    """
    from ..editing.methods import METHODS
    from ..editing.progress import progress_bar
    from ..errors import ConfigError

    if not METHODS[method].in_weights:
        raise ConfigError(f"{method} changes no weights that could be saved: compare it instead")
    editor = METHODS[method](model, tokenizer, METHODS[method].config_type.from_dict(settings))
    with progress_bar("editing") as move:
        outcomes = editor.edit(edits, progress=move)
    about = {
        "method": method,
        "settings": editor.config.to_dict(),
        "edits": len(edits),
        "cpu_seconds": sum(sum(outcome.seconds.values()) for outcome in outcomes),
        "iterations": sum(outcome.iterations for outcome in outcomes),
    }
    _save(model, tokenizer, edits, about, out)
    say(
        f"{number_of(len(edits), 'edit')} in the weights by {method} "
        f"({about['cpu_seconds'] / len(edits):.2f} CPU s an edit)"
    )
    note("edits in the weights cannot be undone: keep the model that they were made in")
    say(f"saved in {out}", style="green")
    return about


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    about: dict[str, Any],
    out: Path,
) -> None:
    from ..storage import new_folder

    with new_folder(out) as making:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
        lines = (json.dumps(asdict(edit), ensure_ascii=False) + "\n" for edit in edits)
        (making / "edits.jsonl").write_text("".join(lines), "utf-8")
        (making / "wise_ext.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
