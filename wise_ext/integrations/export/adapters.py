"""Low-rank shards as PEFT adapters: a product of two thin matrices is just what LoRA adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from ..._version import __version__
from ...editing.ledger import was_trained
from ...errors import ConfigError
from ...memory import LowRankShard, SideMemory
from ...storage import StoredMemory, new_folder
from ...storage.encoding import canonical
from ..card import base_line, edits_table, write_card
from .baking import chosen_shards
from .weights import REPORT


def export_adapters(
    stored: StoredMemory, transposed: bool, out: Path, *, shards: Sequence[int] | None = None
) -> dict[str, Any]:
    """Write low-rank shards as adapters, each into a folder ``shard-<n>`` of its own.

    ``peft.PeftModel.from_pretrained(model, out / "shard-3")`` computes what the memory does where a
    prompt is routed to shard 3, for every prompt.

    Args:
        stored: the memory.
        transposed: whether the edited projection keeps its weight transposed (GPT-2's ``Conv1D``).
        out: a new folder, or an empty one; made whole or not at all.
        shards: which ones; None is all.

    Returns:
        The report, which is ``out/wise_ext.json``, too: for each adapter its shard, rank and edits.

    Raises:
        ConfigError: no such shard, or one that is no product of thin matrices.
        StorageError: ``out`` is not empty, or the disk refuses.
    """
    memory = stored.memory
    chosen = {place: _low_rank(memory, place) for place in chosen_shards(memory, shards)}
    known = {name for shard in chosen.values() for name in shard.edit_ids}
    entries = [e for e in stored.ledger if was_trained(e) and e["id"] in known]
    report = {
        "format": "peft",
        "library_version": __version__,
        "base": stored.base,
        "memory": stored.checksum,
        "layer": memory.layer,
        "routing": "lost: an adapter is on for every prompt for as long as it is active",
        "adapters": {
            _name(place): {"shard": place, "rank": shard.rank, "edits": shard.edit_ids}
            for place, shard in chosen.items()
        },
    }
    with new_folder(out) as making:
        for place, shard in chosen.items():
            _write(making / _name(place), shard, memory.layer, transposed, stored.base)
        (making / REPORT).write_bytes(canonical(report, indent=2))
        write_card(making, stored.base, _text(report, stored, entries))
    return report


def _low_rank(memory: SideMemory, place: int) -> LowRankShard:
    shard = memory.shards[place]
    if not isinstance(shard, LowRankShard):
        raise ConfigError(
            f"shard {place} is a sparse delta under a mask, of full rank: LoRA cannot hold it "
            "(--format weights can); what AnyEdit writes is of low rank"
        )
    if not shard.rank:
        raise ConfigError(f"shard {place} changes nothing (its rank is 0): leave it out")
    return shard


def _write(
    folder: Path, shard: LowRankShard, layer: str, transposed: bool, base: dict[str, Any]
) -> None:
    """``W + B A``, with B the left factors and A the right ones; lora_alpha / r scales by 1."""
    config = LoraConfig(
        r=shard.rank,
        lora_alpha=shard.rank,
        target_modules=[layer],
        fan_in_fan_out=transposed,
        bias="none",
        lora_dropout=0.0,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base.get("name"),
        inference_mode=True,
    )
    folder.mkdir()
    config.save_pretrained(str(folder))
    prefix = f"base_model.model.{layer}"
    save_file(
        {
            f"{prefix}.lora_A.weight": shard.right.contiguous(),
            f"{prefix}.lora_B.weight": shard.left.T.contiguous(),
        },
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )


def _name(place: int) -> str:
    return f"shard-{place}"


def _text(report: dict[str, Any], stored: StoredMemory, entries: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| `{name}` | {about['rank']} | {len(about['edits'])} |"
        for name, about in report["adapters"].items()
    ]
    return (
        f"# Edits as PEFT adapters\n\n{base_line(stored.base)}\n"
        f"LoRA adapters of `{report['layer']}`, one a shard of a wise-ext memory. **There is no "
        "router any more**: an adapter is on for every prompt for as long as it is active.\n\n"
        + "\n".join(["| folder | rank | edits |", "|---|---|---|", *lines])
        + f"\n\n## Edits\n\n{edits_table(entries)}"
    )
