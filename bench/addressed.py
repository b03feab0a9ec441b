"""Memories that hold nothing but addresses: where prompts go is measured without any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.edits import Edit
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import ConfigError
from wise_ext.memory import Shard, SideMemory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def key_only_memory(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: WiseConfig,
    edits_by_slot: Sequence[Sequence[Edit]],
    memory: SideMemory | None = None,
) -> SideMemory:
    """A memory that finds edits as a trained one would, and changes nothing.

    Args:
        model: the model as it was before any edit; it is not patched.
        tokenizer: its tokenizer.
        config: how keys are made and compared.
        edits_by_slot: the edits of each shard. Shards are empty: a route is all they give.
        memory: append the shards to this memory, which is changed; None starts a new one.

    Raises:
        ConfigError: the settings do not route by keys.
    """
    if config.router != "key":
        raise ConfigError(
            f"router is {config.router!r}: only keys can be stored without training, so measure "
            "this memory without a crowd and without --routing-only"
        )
    # Contexts are what edits are trained in; keys do not need them.
    shop = Workshop(
        model, tokenizer, config.replace(contexts=0, contexts_per_edit=0, contexts_per_round=0)
    )
    if memory is None:
        memory = shop.empty_memory()
    assert memory.key_index is not None
    d_out, d_in = memory.shape
    bits = torch.zeros(d_out, -(-d_in // 32), dtype=torch.int32)
    training = model.training
    model.eval()
    for edits in edits_by_slot:
        ids = [edit.id for edit in edits]
        dtype = memory.shards[0].values.dtype if memory.shards else torch.float32
        slot = memory.add_shard(
            Shard.from_delta(torch.zeros(d_out, d_in, dtype=dtype), bits, 0, ids)
        )
        keys = [shop.coach.addresses(edit.prompt, edit.subject) for edit in edits]
        memory.key_index.add_worded(keys, [slot] * len(keys), ids)
    model.train(training)
    return memory
