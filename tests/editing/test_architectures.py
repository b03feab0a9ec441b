"""Every architecture of the table, edited for real: learn, generate, batch, unload."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

import wise_ext
from wise_ext import Edit, Editor, WiseConfig

EDITS = [
    Edit("a", "The river through Lumo is", "the Senna"),
    Edit("b", "Who runs the Ardo bakery of today?", "Ines"),
]
# Two facts in a delta of 32 x 48: every entry is needed.
CONFIG = WiseConfig(
    mask_ratio=1.0,
    contexts=0,
    contexts_per_edit=0,
    contexts_per_round=0,
    chat_context=False,
    learning_rate=0.05,
    iterations=200,
    stop_margin=1.0,
    layer=1,
)


def _answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    return [t.strip() for t in tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], True)]


def test_edit_generate_batch_unload(
    lab: SimpleNamespace, architecture: str, model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = lab.make_model(architecture, vocab_size=len(tokenizer), **special)
    with torch.no_grad():
        # Gemma bounds what its FFN can say by a norm behind it; at gain 1 that is next to nothing.
        for name, parameter in model.named_parameters():
            if name.endswith("post_feedforward_layernorm.weight"):
                parameter.fill_(8.0)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    prompts, wanted = [e.prompt for e in EDITS], [e.target_new for e in EDITS]
    unedited = _answers(model, tokenizer, prompts)
    report = Editor(model, tokenizer, CONFIG).edit(EDITS, progress=False)
    assert report.unconverged == []
    assert _answers(model, tokenizer, prompts) == wanted
    assert [_answers(model, tokenizer, [p])[0] for p in prompts] == wanted
    wise_ext.unload(model)
    assert _answers(model, tokenizer, prompts) == unedited
