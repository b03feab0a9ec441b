"""Where parts go: against a brute-force simulation of merging."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.parts import Parts, count_parts, steps_of
from wise_ext.memory import Shard, SideMemory, random_mask_bits

SHAPE = (2, 40)


def _shard(part: int) -> Shard:
    bits = random_mask_bits(*SHAPE, 0.3, part)
    return Shard.from_delta(torch.randn(SHAPE), bits, edit_ids=[f"edit-{part}"])


@given(group=st.integers(1, 3), single=st.booleans(), total=st.integers(0, 7))
def test_slots_follow_the_merges(group: int, single: bool, total: int) -> None:
    config = WiseConfig(shards_per_merge=group, variant="merge" if single else "retrieve")
    memory = SideMemory("layer", SHAPE, routing="indicator")
    parts = Parts.of(config)
    for part in range(total):
        assert parts.slot(part) == memory.add_shard(_shard(part))
        parts.close(memory, config, lambda m, place: float(place))
    for part in range(total):
        assert memory.shard_of(f"edit-{part}") == parts.slot(part)
        together = memory.shards[parts.slot(part)].edit_ids
        assert [f"edit-{p}" for p in parts.beside(part, total)] == together


def test_merged_shards_get_a_threshold_of_their_own() -> None:
    config = WiseConfig(shards_per_merge=2)
    memory = SideMemory("layer", SHAPE, routing="indicator")
    parts = Parts.of(config)
    for part in range(2):
        memory.add_shard(_shard(part))
        parts.close(memory, config, lambda m, place: 7.0)
    assert [s.threshold for s in memory.shards] == [7.0]


def test_steps_of_a_part() -> None:
    ledger = [{"id": i, "part": p, "step": s} for i, p, s in ("a00", "b00", "c01", "d12")]
    ledger = [{**e, "part": int(e["part"]), "step": int(e["step"])} for e in ledger]
    assert [(s, [e["id"] for e in es]) for s, es in steps_of(ledger, 0)] == [
        (0, ["a", "b"]),
        (1, ["c"]),
    ]
    assert count_parts(ledger) == 2 and count_parts([]) == 0
