"""A model out of a GGUF file: quantised on disk, plain in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import wise_ext
from tests.editing.facts import EDITS, QUICK, answer
from wise_ext import Editor, WiseConfig, load_model
from wise_ext.models import fingerprint

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


def write(folder: Path, file: Path) -> None:
    """The tiny Llama, its matrices in blocks of 8-bit numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    c = model.config
    out: Any = gguf.GGUFWriter(file, "llama")
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(c.vocab_size)
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    out.add_tokenizer_model("gpt2")
    out.add_token_list([word for word, _ in words])
    special = set(tokenizer.all_special_tokens)
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    out.add_token_types([kinds[word not in special] for word, _ in words])
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        place, numbers = names.get_name(name, (".weight",)), weight.numpy().astype(np.float32)
        if numbers.ndim == 1:
            out.add_tensor(place, numbers)
        else:
            packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
            out.add_tensor(place, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.engine("GGUF file", "edit, save, load")
def test_edit_save_load(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(model_dir, file)
    model, tokenizer = load_model(file)
    mark = fingerprint(model)
    before = answer(model, tokenizer, EDITS[0].prompt)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), tmp_path / "memory")
    assert editor.edit(EDITS[:2], progress=False).unconverged == []
    told = [edit.target_new for edit in EDITS[:2]]
    assert [answer(model, tokenizer, edit.prompt) for edit in EDITS[:2]] == told
    wise_ext.unload(model)
    assert answer(model, tokenizer, EDITS[0].prompt) == before

    # The weights are plain by now: saved and read again, they are the same model.
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    for source in (file, tmp_path / "plain"):
        again, tokenizer = load_model(source)
        assert fingerprint(again) == mark
        wise_ext.load_memory(again, tmp_path / "memory")
        assert [answer(again, tokenizer, edit.prompt) for edit in EDITS[:2]] == told
    again, _ = load_model(file, dtype="bf16")
    assert fingerprint(again) == mark
