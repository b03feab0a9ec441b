"""Patched models on a card say what they say on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wise_ext.models import last_route, patch


@pytest.fixture(autouse=True)
def cpu_by_default(device: str) -> None:
    """Models and memories are made on the CPU and moved."""
    torch.set_default_device("cpu")


@pytest.mark.parametrize("kind", ["key_memory", "indicator_memory"])
@torch.no_grad()
def test_generation(provider: str, architecture: str, lab: SimpleNamespace, kind: str) -> None:
    known = lab.prompts(5, 8)
    batch = lab.padded([*known, *lab.prompts(6, seed=7)])
    said = []
    for device in ("cpu", "cuda"):
        model = lab.make_model(architecture)
        memory = getattr(lab, kind)(model, known)
        model.to(device)
        patch(model, memory)
        given = {name: value.to(device) for name, value in batch.items()}
        tokens = model.generate(**given, max_new_tokens=8, do_sample=False)
        routes = last_route(model)
        assert routes is not None
        said.append((tokens.tolist(), routes.tolist()))
    assert said[0] == said[1]


@torch.no_grad()
def test_decoding_does_not_wait(provider: str, lab: SimpleNamespace) -> None:
    if provider == "reference":
        pytest.skip("the reference reads the routes back")
    model = lab.make_model("llama").to("cuda")
    known = lab.prompts(8, 8)
    patch(model, lab.key_memory(model.cpu(), known))
    model.to("cuda")
    ids = torch.tensor(known, device="cuda")
    out = model(ids, use_cache=True)
    step = ids[:, :1]
    model(step, past_key_values=out.past_key_values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(step, past_key_values=out.past_key_values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
