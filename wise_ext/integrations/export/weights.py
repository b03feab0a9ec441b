"""A memory baked into plain weights: a model like any other, without a router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...editing.ledger import edit_of, was_trained
from ...errors import ConfigError
from ...models import get_module, unload
from ...models.patch import current_memory
from ...storage import StoredMemory, new_folder
from ...storage.encoding import canonical
from ..card import base_line, comparison, edits_table, write_card
from .baking import bake, chosen_shards, delta_of, is_transposed
from .fidelity import Fidelity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "wise_ext.json"


def export_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stored: StoredMemory,
    out: Path,
    *,
    shards: Sequence[int] | None = None,
    merge: str | None = None,
    unrelated: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Bake a memory into the model it belongs to and save that as ``save_pretrained`` does.

    The model is changed: it has the shard in its weight afterwards, and no memory.

    Args:
        model: patched with the memory.
        tokenizer: its tokenizer; it is saved, too.
        stored: the memory.
        out: a new folder, or an empty one; made whole or not at all.
        shards: which ones; None is all.
        merge: how several become one; the density is the memory's own ``merge_density``.
        unrelated: prompts to measure the damage on; see ``Fidelity`` for the default.

    Returns:
        The report, which is ``out/wise_ext.json``, too: ``before`` (with the router) and ``after``
        (without) as ``Fidelity.measure`` has them, and what was baked.

    Raises:
        ConfigError: several shards and no ``merge``, no such shard, or one without edits.
        ModelError: the projection is quantised.
        StorageError: ``out`` is not empty, or the disk refuses.
    """
    memory = current_memory(model)
    chosen = chosen_shards(memory, shards)
    delta = delta_of(memory, chosen, merge, float(stored.config.get("merge_density", 1.0)))
    known = {name for shard in chosen for name in memory.shards[shard].edit_ids}
    entries = [e for e in stored.ledger if was_trained(e) and e["id"] in known]
    if not entries:
        raise ConfigError(f"no edits in shards {chosen}: there is nothing to export")

    # The patched projection's own module: refused before anything is measured.
    is_transposed(get_module(model, f"{memory.layer}.base"))
    fidelity = Fidelity(
        model,
        tokenizer,
        [edit_of(entry) for entry in entries],
        chat=bool(stored.config.get("chat_template")),
        unrelated=unrelated,
    )
    before = fidelity.measure()
    unload(model)
    rounding = bake(model, memory.layer, delta)
    report = {
        "format": "weights",
        "library_version": __version__,
        "base": stored.base,
        "memory": stored.checksum,
        "layer": memory.layer,
        "dtype": str(model.dtype).removeprefix("torch."),
        "shards": chosen,
        "merge": merge,
        "edits": len(entries),
        "routing": "lost: the edits are on for every prompt",
        "cue": memory.cue,
        "rounding": rounding,
        "before": before,
        "after": fidelity.measure(),
    }
    with new_folder(out) as making:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
        (making / REPORT).write_bytes(canonical(report, indent=2))
        write_card(making, stored.base, _text(report, stored, entries))
    return report


def _text(report: dict[str, Any], stored: StoredMemory, entries: Sequence[dict[str, Any]]) -> str:
    how = f"Shards {report['shards']} of a wise-ext memory, merged by {report['merge']}, are"
    if len(report["shards"]) == 1:
        how = f"Shard {report['shards'][0]} of a wise-ext memory is"
    cue = (
        "The memory was trained with cues, which tell an edit's own question from others and which "
        "plain weights do not have: it answers worse here than it did there.\n\n"
        if report["cue"]
        else ""
    )
    return (
        f"# An edited model\n\n{base_line(stored.base)}\n"
        f"{how} baked into `{report['layer']}`. **There is no router any more**: the edits are on "
        "for every prompt, also for those that have nothing to do with them. What that costs was "
        f"measured when this folder was made:\n\n"
        + comparison(("with the router", "in these weights"), (report["before"], report["after"]))
        + "\n`unrelated` compares with the unedited model on prompts about something else.\n\n"
        f"{cue}## Edits\n\n{edits_table(entries)}"
    )
