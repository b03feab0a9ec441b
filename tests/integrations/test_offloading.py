"""Models whose weights Accelerate keeps elsewhere: on disk, or on a CPU beside a device.

A CPU stands for the device that computes here; weights are placeholders until a module runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import wise_ext
from tests.editing.facts import EDITS, QUICK, answer
from wise_ext import Editor, WiseConfig
from wise_ext.models import fingerprint, get_module, last_route, patch, unload

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def to_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def to_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def by_map(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(
        model,
        places(model),
        offload_dir=folder,
        main_device="cpu",
        force_hooks=True,
    )


def from_checkpoint(model: Any, folder: Path) -> Any:
    """transformers' own `device_map`: weights on disk stay in the checkpoint."""
    model.save_pretrained(folder / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", device_map=places(model), offload_folder=folder / "offloaded"
    )
    return loaded.eval()


def places(model: Any) -> dict[str, str]:
    """Some modules here, the upper blocks on disk."""
    depth = len(model.model.layers)
    blocks = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(depth)}
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return blocks | dict.fromkeys(others, "cpu")


@pytest.fixture(params=[to_disk, to_cpu, by_map, from_checkpoint])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    return lambda model: request.param(model, tmp_path / "weights")


@pytest.mark.parametrize("router", ["key", "indicator"])
@torch.no_grad()
@pytest.mark.engine("Accelerate offload to CPU and disk", "generate")
def test_the_answers_of_a_model_that_lies_in_one_place(
    offload: Callable[[Any], Any], router: str, lab: SimpleNamespace
) -> None:
    model, known = lab.make_model("llama"), lab.prompts(5, 9)
    memory = getattr(lab, f"{router}_memory")(model, known)
    batch, mark = lab.padded([*known, *lab.prompts(7, seed=3)]), fingerprint(model)
    plain = model(**batch).logits
    patch(model, memory)
    tokens, logits, route = (
        model.generate(**batch, **GREEDY),
        model(**batch).logits,
        last_route(model),
    )
    unload(model)

    offloaded = offload(model)
    base = get_module(offloaded, memory.layer)
    assert base.weight.is_meta
    assert fingerprint(offloaded) == mark
    patch(offloaded, memory)
    assert fingerprint(offloaded) == mark
    assert torch.equal(offloaded.generate(**batch, **GREEDY), tokens)
    assert torch.equal(offloaded(**batch).logits, logits)
    assert last_route(offloaded).tolist() == route.tolist()
    assert base.weight.is_meta
    with wise_ext.disabled(offloaded):
        assert torch.equal(offloaded(**batch).logits, plain)
    unload(offloaded)
    assert get_module(offloaded, memory.layer) is base
    assert torch.equal(offloaded(**batch).logits, plain)


@pytest.mark.engine("Accelerate offload to CPU and disk", "edit")
def test_edited_where_it_lies(
    offload: Callable[[Any], Any], model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = offload(AutoModelForCausalLM.from_pretrained(model_dir).eval())
    before = answer(model, tokenizer, EDITS[0].prompt)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), tmp_path / "memory")
    assert editor.edit(EDITS[:2], progress=False).unconverged == []
    told = [edit.target_new for edit in EDITS[:2]]
    assert [answer(model, tokenizer, edit.prompt) for edit in EDITS[:2]] == told
    editor.undo("b")
    assert answer(model, tokenizer, EDITS[0].prompt) == told[0]
    unload(model)
    assert answer(model, tokenizer, EDITS[0].prompt) == before

    whole = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    wise_ext.load_memory(whole, tmp_path / "memory")
    assert answer(whole, tokenizer, EDITS[0].prompt) == told[0]
