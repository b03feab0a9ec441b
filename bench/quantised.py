"""`python -m bench.quantised`: demo facts in SmolLM2 under each quantisation that runs on a CPU.

For each base the facts are edited into it and measured; then the memory that was made on the model
in fp32 is loaded into it and measured again. ``kept`` is whether unrelated prompts give the same
logits to the bit, patched and unpatched.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from wise_ext import Editor, WiseConfig, load_memory, load_model, unload
from wise_ext.editing.edits import Edit, demo_edits
from wise_ext.evaluation import evaluate
from wise_ext.models.patch import is_patched

UNRELATED = (
    "Bread is made of flour, water and",
    "The largest ocean on Earth is the",
    "Water boils at a temperature of",
)


def torchao(name: str) -> Callable[[nn.Module], None]:
    """Quantise the blocks by torchao, the head left alone as transformers does."""

    def quantise(model: nn.Module) -> None:
        quantization: Any = import_module("torchao.quantization")
        config = quantization.Int8WeightOnlyConfig()
        if name == "int4":
            config = quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                granularity=quantization.PerGroup(32),
            )
        quantization.quantize_(model.model, config)

    return quantise


def bitsandbytes(name: str) -> Callable[[nn.Module], None]:
    """Put bitsandbytes' layers in the place of the blocks' linear ones."""

    def quantise(model: nn.Module) -> None:
        layers: Any = import_module("bitsandbytes.nn")
        blocks: Any = model.model
        for path, old in list(blocks.named_modules()):
            if type(old) is not nn.Linear:
                continue
            has_bias, (d_out, d_in) = old.bias is not None, old.weight.shape
            if name == "int8":
                new = layers.Linear8bitLt(d_in, d_out, has_bias, has_fp16_weights=False)
            else:
                new = layers.Linear4bit(d_in, d_out, has_bias, torch.float32, quant_type=name)
            new.load_state_dict(old.state_dict())
            parent, _, child = path.rpartition(".")
            setattr(blocks.get_submodule(parent), child, new.to("cpu"))
        model.eval()

    return quantise


BASES: dict[str, Callable[[nn.Module], None]] = {
    "fp32": lambda model: None,
    "torchao int8": torchao("int8"),
    "torchao int4": torchao("int4"),
    "bitsandbytes int8": bitsandbytes("int8"),
    "bitsandbytes nf4": bitsandbytes("nf4"),
    "bitsandbytes fp4": bitsandbytes("fp4"),
}


@torch.no_grad()
def unrelated_logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """One pass a prompt."""
    return [model(**tokenizer(text, return_tensors="pt")).logits for text in UNRELATED]


def measured(model: Any, tokenizer: Any, edits: list[Edit]) -> dict[str, Any]:
    """What the demo prints, in a row, and whether unrelated logits are the bare model's."""
    result = evaluate(model, tokenizer, edits, progress=False)
    patched = unrelated_logits(model, tokenizer)
    unload(model)
    bare = unrelated_logits(model, tokenizer)
    return {
        "reliability": result["reliability"],
        "generalization": result["generalization"],
        "locality": result["locality"],
        "generated": result["generation"]["reliability"],
        "generated_rephrased": result["generation"]["generalization"],
        "kept": all(torch.equal(a, b) for a, b in zip(patched, bare, strict=True)),
    }


def rows_of(name: str, edits: list[Edit], full: Path) -> list[dict[str, Any]]:
    """Edited where it is, and served with the memory made in fp32 (the first base makes it)."""
    model, tokenizer = load_model("smollm2", dtype="fp32", device="cpu")
    BASES[name](model)
    start = time.process_time()
    editor = Editor(model, tokenizer, WiseConfig())
    report = editor.edit(edits, progress=False)
    cpu = time.process_time() - start
    edited = {
        "base": name,
        "memory": "its own",
        "unconverged": len(report.unconverged),
        "cpu_seconds": round(cpu, 1),
    } | measured(model, tokenizer, edits)
    if name == "fp32":
        editor.save(full)
        return [edited]
    assert not is_patched(model)
    load_memory(model, full, check="name")
    return [edited, {"base": name, "memory": "fp32's"} | measured(model, tokenizer, edits)]


def main(
    edits: Annotated[int, typer.Option(help="How many of the demo's facts.")] = 10,
    out: Annotated[Path | None, typer.Option("--json", help="Append rows here.")] = None,
) -> None:
    """Edit quantised SmolLM2s and measure them."""
    facts = demo_edits()[:edits]
    with tempfile.TemporaryDirectory() as folder:
        for name in BASES:
            for row in rows_of(name, facts, Path(folder) / "full"):
                line = json.dumps(row | {"edits": len(facts), "model": "SmolLM2-135M-Instruct"})
                typer.echo(line)
                if out is not None:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
