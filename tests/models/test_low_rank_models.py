"""Patched models whose memory holds low-rank shards beside packed ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wise_ext.memory import LowRankShard, MixedBank, SideMemory
from wise_ext.models import last_route, patch, unload
from wise_ext.models.installed import patch_of


def mixed_memory(lab: SimpleNamespace, model: Any, known: list[list[int]]) -> SideMemory:
    """The memory of ``lab``, its second shard as the product of two factors."""
    memory: SideMemory = lab.key_memory(model, known)
    u, size, v = torch.linalg.svd(memory.shards[1].dense(), full_matrices=False)
    low = LowRankShard((u * size).T.contiguous(), v.contiguous(), memory.shards[1].edit_ids)
    memory.replace_shard(1, low)
    return memory


@torch.no_grad()
def test_each_row_takes_its_own_shard(architecture: str, lab: SimpleNamespace) -> None:
    """A row of a mixed batch gives what the packed form of its shard gave, and main memory's stays
    what it was to the bit."""
    model, known = lab.make_model(architecture), lab.prompts(5, 9)
    batch = lab.padded([known[0], known[1], lab.prompts(9, seed=3)[0]], left=False)
    plain = model(**batch, use_cache=False).logits
    packed = lab.key_memory(model, known)
    patch(model, packed)
    expected = model(**batch, use_cache=False).logits
    patch(model, mixed_memory(lab, model, known))
    assert isinstance(patch_of(model).dual.bank, MixedBank)
    found = model(**batch, use_cache=False).logits
    assert last_route(model).tolist() == [0, 1, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    real = batch["attention_mask"].bool()
    assert torch.equal(found[2][real[2]], plain[2][real[2]])
    unload(model)
    assert torch.equal(model(**batch, use_cache=False).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_the_models_own_dtype(lab: SimpleNamespace, dtype: torch.dtype) -> None:
    model, known = lab.make_model("llama", dtype=dtype), lab.prompts(5, 9)
    memory = mixed_memory(lab, model, known)
    patch(model, memory)
    bank = patch_of(model).dual.bank
    assert isinstance(bank, MixedBank) and bank.low.left.dtype == dtype
    assert model(**lab.padded(known, left=True)).logits.dtype == dtype


@torch.no_grad()
def test_compiled_whole_and_not_anew_for_other_routes(lab: SimpleNamespace) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    patch(model, mixed_memory(lab, model, known))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in ([known[0], known[1]], [known[1], known[1]], [known[0], lab.prompts(9, seed=3)[0]]):
        batch = lab.padded(rows, left=False)
        eager = model(**batch, use_cache=False).logits
        torch.testing.assert_close(
            compiled(**batch, use_cache=False).logits, eager, rtol=1e-4, atol=1e-4
        )
    assert len(graphs) <= 2  # one for each width of prompts
    torch._dynamo.reset()


@torch.no_grad()
def test_more_passages_take_the_place_of_fewer(lab: SimpleNamespace) -> None:
    """The same installed module goes on to be used, as with packed shards."""
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    memory = mixed_memory(lab, model, known)
    patch(model, memory)
    dual = patch_of(model).dual
    memory.add_shard(
        LowRankShard(*(f.flip(0) for f in (memory.shards[1].left, memory.shards[1].right)))
    )
    patch(model, memory)
    assert patch_of(model).dual is dual and dual.bank.num_shards == 3
    batch = lab.padded([known[1]], left=True)
    before = model(**batch).logits
    patch(model, lab.key_memory(model, known))
    assert patch_of(model).dual is not dual  # packed shards alone: another kind of bank
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
