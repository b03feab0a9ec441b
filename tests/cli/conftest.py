"""A tiny random Llama with a tokenizer of its own, on disk, and the command line around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from wise_ext.cli.app import app
from wise_ext.editing.edits import demo_edits
from wise_ext.editing.prompts import neutral_prompts

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("edit", ...)``: a command in this process, its output in plain wide text."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    texts = [text for e in demo_edits() for text in (e.prompt, e.target_new)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*texts, *neutral_prompts()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def edits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four facts; the last one with nothing but its prompt and target."""
    path = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    lines = [
        {
            "id": edit.id,
            "subject": edit.subject,
            "prompt": edit.prompt,
            "target_new": edit.target_new,
            "rephrase_prompt": edit.rephrase_prompt,
            "locality_prompt": edit.locality_prompt,
            "locality_ground_truth": edit.locality_ground_truth,
        }
        for edit in demo_edits()[:3]
    ]
    lines.append({"id": "bare", "prompt": "The colour of Ardo is", "target_new": "grey"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
