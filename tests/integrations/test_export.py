"""Exports compute what routing forced to the same shard does, and say what they lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from wise_ext.editing.edits import Edit
from wise_ext.editing.prompts import encode_prompt
from wise_ext.errors import ConfigError, ModelError, StorageError
from wise_ext.integrations.export.baking import bake, delta_of, is_transposed
from wise_ext.integrations.export.fidelity import Fidelity
from wise_ext.integrations.export.weights import export_weights
from wise_ext.memory import LowRankShard, SideMemory, merge
from wise_ext.models import force_route, get_module, patch, unload
from wise_ext.storage import load_memory_dir

pytest.importorskip("peft", reason='needs pip install "wise-ext[export]"')

from peft import PeftModel

from wise_ext.integrations.export.adapters import export_adapters

Save = Callable[[SideMemory, Path], Path]
Run = Callable[..., Result]


def logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([row]), use_cache=False).logits for row in rows]


def without_cue(model: Any, memory: SideMemory, shard: int, rows: list[list[int]]) -> Any:
    """What a patched model says where every row goes to one shard."""
    patch(model, memory)
    with force_route(model, shard):
        found = logits(model, rows)
    unload(model)
    return found


@pytest.mark.engine("plain weights", "export: {architecture}")
def test_baked_weights_are_a_forced_route(lab: Any, architecture: str) -> None:
    model = lab.make_model(architecture)
    rows = lab.prompts(4, 7, 9)
    memory = lab.key_memory(model, rows[:2])
    expected = without_cue(model, memory, 1, rows)
    assert bake(model, memory.layer, delta_of(memory, [1], None, 1.0)) < 1e-5
    for ours, theirs in zip(logits(model, rows), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.engine("PEFT", "low-rank shards: {architecture}")
def test_an_adapter_is_a_forced_route(lab: Any, architecture: str, tmp_path: Path) -> None:
    model = lab.make_model(architecture)
    rows = lab.prompts(4, 7, 9)
    memory = lab.key_memory(model, rows[:2])
    left, right = (torch.randn(3, size) for size in memory.shape)
    shard = LowRankShard.of(left, right, torch.bfloat16)
    shard.edit_ids = list(memory.shards[1].edit_ids)
    memory.replace_shard(1, shard)
    expected = without_cue(model, memory, 1, rows)
    plain = logits(model, rows)

    stored = _Stored(memory)
    transposed = is_transposed(get_module(model, memory.layer))
    assert transposed == (architecture == "gpt2")
    export_adapters(stored, transposed, tmp_path / "out", shards=[1])  # type: ignore[arg-type]
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "shard-1")
    for ours, theirs, base in zip(logits(adapted, rows), expected, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert (ours - base).abs().max() > 0.01
    with adapted.disable_adapter():
        assert all(map(torch.equal, logits(adapted, rows), plain))


class _Stored:
    """A stored memory of a model without a tokenizer."""

    def __init__(self, memory: SideMemory) -> None:
        self.memory = memory
        self.base = {"name": "tiny", "fingerprint": "0" * 64}
        self.checksum, self.ledger = "1" * 64, []  # type: ignore[var-annotated]


def test_several_shards_are_merged_by_an_existing_method(memory: SideMemory) -> None:
    deltas = [shard.dense() for shard in memory.shards]
    assert torch.equal(delta_of(memory, [0, 2], "ties", 0.5), merge(deltas[::2], density=0.5))
    with pytest.raises(ConfigError, match="there are 2 shards and one weight: choose one"):
        delta_of(memory, [0, 2], None, 1.0)
    with pytest.raises(ConfigError, match="unknown merge method 'mean'"):
        delta_of(memory, [0, 2], "mean", 1.0)


def test_rounding_to_a_coarse_dtype_is_told(lab: Any) -> None:
    model = lab.make_model("llama", dtype=torch.bfloat16)
    memory = lab.key_memory(model, lab.prompts(5))
    assert 1e-4 < bake(model, memory.layer, memory.shards[0].dense()) < 0.1
    assert get_module(model, memory.layer).weight.dtype == torch.bfloat16


def test_a_quantised_projection_cannot_be_baked(lab: Any) -> None:
    model = lab.make_model("llama")
    memory = lab.key_memory(model, lab.prompts(5))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    with pytest.raises(ModelError, match="no plain weight in fp32, bf16 or fp16"):
        bake(quantised, memory.layer, memory.shards[0].dense())


def test_the_exported_model_is_a_plain_one_with_a_report(
    run: Run, model_dir: Path, memory: SideMemory, saved: Save, facts: list[Edit], tmp_path: Path,
    bare: Any, tokenizer: Any,
) -> None:  # fmt: skip
    directory = saved(memory, tmp_path / "memory")
    out = tmp_path / "deep" / "out"
    answer = run("export", model_dir, "--memory", directory, "--out", out, "--shard", 1)
    assert answer.exit_code == 0, answer.output
    assert "the router is lost" in answer.stderr and "cues" in answer.stderr
    rows = [encode_prompt(tokenizer, fact.prompt) for fact in facts]
    expected = without_cue(bare, memory, 1, rows)
    model = AutoModelForCausalLM.from_pretrained(out)
    for ours, theirs in zip(logits(model, rows), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out)(facts[0].prompt)["input_ids"] == rows[0]

    report = json.loads((out / "wise_ext.json").read_text())
    assert (report["shards"], report["edits"], report["cue"]) == ([1], 1, memory.cue)
    assert report["base"] == load_memory_dir(directory).base
    # Routed, what is unrelated is untouched; a random delta for every prompt is not.
    before, after = report["before"]["unrelated"], report["after"]["unrelated"]
    assert before["prompts"] > 200 and before["same_tokens"] == before["same_answers"] == 1.0
    assert after["same_tokens"] < 1.0
    card = (out / "README.md").read_text("utf-8")
    assert "There is no router any more" in card and facts[1].prompt in card
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_fidelity_counts_what_has_changed(
    bare: Any, tokenizer: Any, memory: SideMemory, facts: list[Edit]
) -> None:
    patch(bare, memory)
    texts = ["Which river?", "The sun rises in the", "Bread is baked in an"]
    fidelity = Fidelity(bare, tokenizer, facts, unrelated=texts)
    assert fidelity.measure()["unrelated"] == {
        "prompts": 3, "same_tokens": 1.0, "same_answers": 1.0
    }  # fmt: skip
    unload(bare)
    bake(bare, memory.layer, memory.shards[0].dense() * 50)
    assert fidelity.measure()["unrelated"]["same_tokens"] < 0.5


def test_adapters_by_the_command(
    run: Run, model_dir: Path, low_rank: SideMemory, saved: Save, tmp_path: Path
) -> None:
    directory = saved(low_rank, tmp_path / "memory")
    out = tmp_path / "out"
    answer = run("export", model_dir, "--memory", directory, "--out", out, "--format", "peft")
    assert answer.exit_code == 0, answer.output
    folders = [f"shard-{place}" for place in range(4)]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", *folders, "wise_ext.json"]
    ranks = [json.loads((out / f / "adapter_config.json").read_text())["r"] for f in folders]
    assert ranks == [1, 2, 3, 4]


@pytest.mark.engine("PEFT", "masked shards", possible=False)
def test_what_cannot_be_exported_costs_one_line_and_leaves_nothing(
    run: Run, model_dir: Path, memory: SideMemory, saved: Save, tmp_path: Path
) -> None:
    directory, out = saved(memory, tmp_path / "memory"), tmp_path / "out"
    common = ("export", model_dir, "--memory", directory, "--out", out)
    for more, message in (
        ((), "there are 4 shards and one weight"),
        (("--shard", 9), "there is no shard 9: the memory has 4"),
        (("--merge", "mean"), "unknown merge method"),
        (("--format", "peft"), "LoRA cannot hold it"),
        (("--format", "peft", "--merge", "ties"), "--merge is of --format weights"),
    ):
        answer = run(*common, *more)
        assert answer.exit_code == 2 and message in answer.stderr, answer.output
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    answer = run(*common, "--shard", 0)
    assert answer.exit_code == 2 and "is not empty" in answer.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_another_model_is_refused(
    run: Run, lab: Any, model_dir: Path, low_rank: SideMemory, saved: Save, tmp_path: Path
) -> None:
    directory = saved(low_rank, tmp_path / "memory")
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        other.lm_head.weight += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "other")
    for kind in ("weights", "peft"):
        answer = run(
            "export", tmp_path / "other", "--memory", directory, "--out", tmp_path / "out",
            "--format", kind, "--shard", 0,
        )  # fmt: skip
        assert answer.exit_code == 2 and "load the memory's own base model" in answer.stderr


def test_an_export_that_fails_leaves_nothing(
    bare: Any, tokenizer: Any, memory: SideMemory, saved: Save, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stored = load_memory_dir(saved(memory, tmp_path / "memory"))
    patch(bare, memory)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(StorageError, match="no space is left"):
        export_weights(bare, tokenizer, stored, tmp_path / "new" / "out", shards=[0])
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named(
    run: Run, model_dir: Path, memory: SideMemory, saved: Save, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory = saved(memory, tmp_path / "memory")
    monkeypatch.setattr("wise_ext.integrations.packages.find_spec", lambda name: None)
    answer = run(
        "export", model_dir, "--memory", directory, "--out", tmp_path / "o", "--format", "peft"
    )
    assert answer.exit_code == 2 and 'pip install "wise-ext[export]"' in answer.stderr
    answer = run("lm-eval", model_dir, "--memory", directory)
    assert answer.exit_code == 2 and 'pip install "wise-ext[lm-eval]"' in answer.stderr
