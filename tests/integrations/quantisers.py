"""The tiny model under each quantisation that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from wise_ext.models import projection_shape

GROUP = 32


def torchao_config(name: str) -> Any:
    """torchao's weight-only configurations: int8 per row, int4 in groups."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if name == "int8":
        return quantization.Int8WeightOnlyConfig()
    granularity = quantization.PerGroup(GROUP)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def by_torchao(name: str) -> Callable[[Path, torch.dtype], Any]:
    """Quantised while loading, as transformers does it."""
    return lambda folder, dtype: load(
        folder, dtype, quantization_config=TorchAoConfig(torchao_config(name))
    )


def in_place(name: str) -> Callable[[Path, torch.dtype], Any]:
    """Quantised by torchao itself, the head as well."""

    def make(folder: Path, dtype: torch.dtype) -> Any:
        config, model = torchao_config(name), load(folder, dtype)
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, config)
        return model

    return make


def by_bitsandbytes(**options: Any) -> Callable[[Path, torch.dtype], Any]:
    def make(folder: Path, dtype: torch.dtype) -> Any:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return load(folder, dtype, quantization_config=BitsAndBytesConfig(**options))

    return make


def dynamic(folder: Path, dtype: torch.dtype) -> Any:
    """torch's own dynamic int8; it rounds activations by the largest of the whole batch."""
    model = load(folder, torch.float32)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


QUANTISERS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "torchao-int8": by_torchao("int8"),
    "torchao-int4": by_torchao("int4"),
    "torchao-int8-in-place": in_place("int8"),
    "torchao-int4-in-place": in_place("int4"),
    "bitsandbytes-int8": by_bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-fp4": by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
# What can be served with a memory, but not edited.
SERVED = QUANTISERS | {"torch-dynamic-int8": dynamic}


def linears(model: nn.Module) -> list[nn.Module]:
    """The quantised projections of a model."""
    return [m for p, m in model.named_modules() if p.endswith("_proj") and projection_shape(m)]
