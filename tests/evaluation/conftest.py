"""A tiny model, and the same with a memory that knows some of the facts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.facts import KNOWN
from wise_ext.editing.prompts import encode_prompt
from wise_ext.models import patch


@pytest.fixture
def patched(lab: Any, bare: Any, tokenizer: Any) -> Any:
    """The same model with a memory that knows some prompts; the first shard is the mill's."""
    memory = lab.key_memory(bare, [encode_prompt(tokenizer, text) for text in KNOWN])
    memory.shards[0].edit_ids[:] = ["mill"]
    for shard in memory.shards[1:]:
        shard.edit_ids.clear()
    memory.shards[5].edit_ids.append("tower")  # its prompt goes to another one
    patch(bare, memory)
    return bare
