"""Tiny random models of every architecture, and side memories made by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from wise_ext.editing.edits import demo_edits
from wise_ext.editing.prompts import neutral_prompts
from wise_ext.memory import (
    Cues,
    KeyIndex,
    Shard,
    SideMemory,
    TokenKeys,
    bool_to_bits,
    random_mask_bits,
)
from wise_ext.models import get_module, layer_path, projection_shape

VOCABULARY = 61
STOP, PAD = 1, 0
# Of the order of the activations that enter the edited projections.
CUE = 0.3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": STOP,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": STOP,
    "pad_token_id": PAD,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON | {"mlp_bias": True}),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON),
    "gemma2": ("Gemma2Config", _COMMON | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", _COMMON | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", _COMMON),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt2": ("GPT2Config", _GPT),
    "opt": ("OPTConfig", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def make_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A random model of one architecture, in evaluation mode, its biases not zero."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(settings | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], left: bool = True) -> dict[str, Tensor]:
    """Token ids and mask of a batch."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def make_shard(shape: tuple[int, int], seed: int, scale: float, **more: Any) -> Shard:
    """A shard with a random delta under a random mask."""
    bits = random_mask_bits(*shape, 0.3, seed)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return Shard.from_delta(delta, bits, edit_ids=[f"edit-{seed}"], **more)


def activation(model: Any, path: str, row: list[int]) -> Tensor:
    """What enters a projection while the model reads one row, `[T, d_in]`."""
    seen: list[Tensor] = []
    handle = get_module(model, path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([row]), use_cache=False)
    handle.remove()
    return seen[0].reshape(len(row), -1).float()


def key_memory(
    model: Any,
    known: list[list[int]],
    layer: str | None = None,
    key_layer: str | None = None,
    scale: float = 2.0,
) -> SideMemory:
    """A memory of one shard a known prompt, found by that prompt's tokens; its first one is its
    subject, and some relations are known."""
    layer = layer or layer_path(model)
    key_layer = key_layer or layer_path(model, 0)
    shape = projection_shape(get_module(model, layer))

    def tokens(row: list[int]) -> TokenKeys:
        return TokenKeys(torch.tensor(row), activation(model, key_layer, row))

    def first(row: list[int]) -> Tensor:
        return torch.arange(len(row)) == 0

    background = [tokens(row) for row in prompts(*range(3, 9), seed=99)]
    wordings = [tokens(row)._replace(subject=first(row)) for row in prompts(*[5] * 12, seed=98)]
    index = KeyIndex(
        background[0].activation.shape[1],
        background=background,
        relations=[wordings[i : i + 3] for i in range(0, 12, 3)],
    )
    index.add(
        [tokens(row)._replace(subject=first(row)) for row in known],
        list(range(len(known))),
        [f"edit-{i + 1}" for i in range(len(known))],
    )
    # The third prompt, where there is one, has no cue.
    index.cues = torch.tensor([0 if i == 2 else 1000 + i for i in range(len(known))])
    shards = [make_shard(shape, seed=i + 1, scale=scale) for i in range(len(known))]
    return SideMemory(layer, shape, shards, "key", key_layer, index, radius=0.95, lead=1.0, cue=CUE)


def indicator_memory(model: Any, known: list[list[int]], layer: str | None = None) -> SideMemory:
    """A memory of one shard for all known prompts, routed by the indicator at the edited layer."""
    layer = layer or layer_path(model)
    shape = projection_shape(get_module(model, layer))
    # Aligned with what the known prompts put in, so that they score above other prompts.
    mean = torch.cat([activation(model, layer, row) for row in known]).mean(0)
    delta = torch.randn(shape[0], 1, generator=torch.Generator().manual_seed(5)) * mean
    shard = Shard.from_delta(delta, bool_to_bits(torch.ones(shape, dtype=torch.bool)))
    strengths = [(activation(model, layer, row) @ delta.T).norm(dim=1).mean() for row in known]
    shard.threshold = float(min(strengths)) * 0.99
    return SideMemory(layer, shape, [shard], "indicator")


def edited_copy(model: Any, memory: SideMemory, shard: int) -> Any:
    """A copy of an unpatched model with one shard added to its weight, and what the cue of the
    shard's edit adds to its output."""
    copied = copy.deepcopy(model)
    projection = get_module(copied, memory.layer)
    delta = memory.shards[shard].dense()
    with torch.no_grad():
        weight = projection.weight
        weight += (delta.T if weight.shape != delta.shape else delta).to(weight.dtype)
    if memory.key_index is not None:
        number = memory.key_index.cues[memory.key_index.shards == shard][:1]
        constant = (delta @ Cues(memory.cue, memory.shape[1]).vectors(number)[0]).to(weight.dtype)
        projection.register_forward_hook(lambda module, args, out: out + constant)
    return copied


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture of the table in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What the tests make their models, batches and memories with."""
    return SimpleNamespace(
        names=list(CONFIGS),
        make_model=make_model,
        prompts=prompts,
        padded=padded,
        make_shard=make_shard,
        activation=activation,
        key_memory=key_memory,
        indicator_memory=indicator_memory,
        edited_copy=edited_copy,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of its own, on disk."""
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


@pytest.fixture
def tokenizer(model_dir: Path) -> Any:
    """The tokenizer of the model on disk."""
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def bare(model_dir: Path) -> Any:
    """The model on disk, unpatched."""
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()
