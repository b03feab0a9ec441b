"""The file of key statistics, and runs that are interrupted on the way to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

from tests.editing.keys import LAYERS, TEXTS, gather, same
from wise_ext.editing import statistics, triangles
from wise_ext.editing.corpus import Corpus
from wise_ext.editing.statistics import KeyStatistics, checkpoint_path, collect
from wise_ext.editing.triangles import folded, unfolded
from wise_ext.errors import StorageError
from wise_ext.models import fingerprint


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def model(lab: SimpleNamespace, tokenizer: Any) -> Any:
    return lab.make_model("llama", vocab_size=len(tokenizer))


# -- the file ------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 2**16))
def test_a_triangle_is_the_whole(width: int, seed: int) -> None:
    half = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    assert folded(matrix).shape == (width * (width + 1) // 2,)
    assert torch.equal(unfolded(folded(matrix)), matrix)


@pytest.fixture(scope="module")
def saved(lab: SimpleNamespace, tokenizer: Any, tmp_path_factory: Any) -> Any:
    """Statistics of the tiny model, their file, and the model's fingerprint."""
    model = lab.make_model("llama", vocab_size=len(tokenizer))
    path = tmp_path_factory.mktemp("saved") / "keys.safetensors"
    found = gather(model, tokenizer, path=path)
    return SimpleNamespace(found=found, path=path, fingerprint=fingerprint(model))


def test_saved_and_loaded(saved: Any, tmp_path: Path) -> None:
    assert list(saved.path.parent.iterdir()) == [saved.path]
    assert same(KeyStatistics.load(saved.path), saved.found)
    assert same(KeyStatistics.load(saved.path, saved.fingerprint, LAYERS[::-1]), saved.found)
    one = KeyStatistics.load(saved.path, saved.fingerprint, LAYERS[1:])
    assert list(one.moments) == LAYERS[1:]
    saved.found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.path.read_bytes()
    # Half a matrix, and a header.
    width = len(saved.found.moments[LAYERS[0]])
    assert saved.path.stat().st_size < 2 * 4 * width * (width + 1) // 2 + 2500


def refusal(path: Path, *args: Any) -> str:
    with pytest.raises(StorageError) as caught:
        KeyStatistics.load(path, *args)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def rewrite(saved: Any, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A copy of the file with another header, its checksum right."""
    tensors = safetensors.torch.load_file(saved.path)
    with safe_open(saved.path, "pt") as file:
        header = json.loads(file.metadata()["wise-ext"])
    header.pop("checksum")
    change(header)
    header["checksum"] = triangles.sha256(triangles.canonical(header))
    safetensors.torch.save_file(tensors, path, {"wise-ext": json.dumps(header)})


def test_what_is_not_loaded(saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert "No such file" in refusal(path)
    assert "[other]: collect statistics of this model" in refusal(saved.path, "other")
    message = refusal(saved.path, None, [*LAYERS, "model.layers.1.mlp.down_proj"])
    assert f"has nothing of model.layers.1.mlp.down_proj, only of {LAYERS[0]}, " in message
    rewrite(saved, path, lambda header: header.update(format_version=9))
    assert "has format version 9, this wise-ext" in refusal(path)
    rewrite(saved, path, lambda header: header.update(format="something"))
    assert "holds something: name a file of key statistics" in refusal(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    assert "was not written by wise-ext" in refusal(path)
    path.write_text("[1, 2]")
    assert "is not a whole safetensors file" in refusal(path)


def test_every_bit_is_vouched_for(saved: Any, tmp_path: Path) -> None:
    path, data = tmp_path / "x.safetensors", saved.path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, begin, 7), begin, (begin + len(data)) // 2, len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            assert same(KeyStatistics.load(path), saved.found), place  # white space, say
        except StorageError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    damaged[-1] ^= 2
    path.write_bytes(damaged)
    assert f"{LAYERS[1]} in {path} was altered" in refusal(path)
    # What is not asked for is not read.
    assert list(KeyStatistics.load(path, None, LAYERS[:1]).moments) == LAYERS[:1]
    for size in (0, 5, begin - 1, begin, len(data) - 1):
        path.write_bytes(data[:size])
        assert "is not a whole safetensors file" in refusal(path)


def test_a_disk_that_fails_leaves_the_old_file_or_the_new(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.safetensors"
    path.write_bytes(b"old")
    for name, left in (("write", b"old"), ("fsync", b"old"), ("replace", b"old")):

        def full(*args: Any) -> None:
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StorageError, match="no space is left") as caught:
                saved.found.save(path)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == left
        assert list(tmp_path.iterdir()) == [path]
    saved.found.save(path)
    assert path.read_bytes() == saved.path.read_bytes()


# -- interrupted runs ----------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few texts, and a checkpoint after every second one."""
    monkeypatch.setattr(statistics, "_CHUNK", 60)
    monkeypatch.setattr(statistics, "_CHECKPOINT", 100)


class Killed(BaseException):
    """As sudden as Ctrl-C."""


def stop_at(tokens: int) -> Callable[[int, int], None]:
    def move(done: int, total: int) -> None:
        if done >= tokens:
            raise Killed

    return move


@pytest.fixture
def whole(small_steps: None, model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """The file of an unbroken run."""
    path = tmp_path / "whole.safetensors"
    gather(model, tokenizer, path=path, tokens=400)
    assert list(tmp_path.iterdir()) == [path]
    return path


def test_resumed_anywhere_gives_the_same_bits(
    whole: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path, resumed_at = tmp_path / "keys.safetensors", set()
    for tokens in range(10, 400, 30):
        args = {"path": path, "tokens": 400}
        with pytest.raises(Killed):
            collect(model, tokenizer, [0, 2], TEXTS, progress=stop_at(tokens), **args)
        assert not path.exists()
        if not checkpoint_path(path).exists():
            assert tokens < 200
            continue
        begun: list[int] = []
        collect(
            *(model, tokenizer, [0, 2], TEXTS),
            **args,
            resume=True,
            progress=lambda done, total: begun.append(done),  # noqa: B023
        )
        assert 100 <= begun[0] <= tokens
        resumed_at.add(begun[0])
        assert path.read_bytes() == whole.read_bytes()
        path.unlink()
        assert list(tmp_path.iterdir()) == [whole]
    assert len(resumed_at) >= 2


def test_killed_again_and_again(whole: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    for tokens in (150, 260, 390):
        with pytest.raises(Killed):
            collect(
                *(model, tokenizer, [0, 2], TEXTS),
                **{"path": path, "tokens": 400, "resume": tokens > 150},
                progress=stop_at(tokens),
            )
    gather(model, tokenizer, path=path, tokens=400, resume=True)
    assert path.read_bytes() == whole.read_bytes()


@pytest.fixture
def broken(small_steps: None, model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """The path of a run that was killed."""
    path = tmp_path / "keys.safetensors"
    with pytest.raises(Killed):
        collect(model, tokenizer, [0, 2], TEXTS, tokens=400, path=path, progress=stop_at(250))
    return path


def test_what_is_not_resumed(
    broken: Path, lab: SimpleNamespace, model: Any, tokenizer: Any
) -> None:
    part = checkpoint_path(broken)
    data = part.read_bytes()

    def refused(other: Any = model, texts: Any = TEXTS, **more: Any) -> str:
        settings = {"path": broken, "tokens": 400, "resume": True} | more
        with pytest.raises(StorageError) as caught:
            gather(other, tokenizer, texts, **settings)
        assert part.read_bytes() == data
        assert str(part) in str(caught.value)
        return str(caught.value)

    other = lab.make_model("llama", seed=1, vocab_size=len(tokenizer))
    assert "was made for 'LlamaForCausalLM' [" in refused(other)
    assert "was begun with tokens 400, not 500: give the same" in refused(tokens=500)
    assert "was begun with window 128, not 9" in refused(window=9)
    assert "was begun with batch_tokens 4096, not 60" in refused(batch_tokens=60)
    assert f"was begun with layers {LAYERS}, not {LAYERS[:1]}" in refused(layers=[0])
    assert "was begun with dtype float32, not bfloat16" in refused(
        lab.make_model("llama", vocab_size=len(tokenizer), dtype=torch.bfloat16)
    )
    for texts in (TEXTS[::-1], TEXTS[:3], []):
        named = Corpus("another", lambda texts=texts: iter(texts))
        assert "was begun with other texts (texts) than another: give" in refused(texts=named)
    assert "holds an unfinished run: go on with --resume, or remove it" in refused(resume=False)
    part.write_bytes(data[:-1])
    data = data[:-1]
    assert "is not a whole safetensors file" in refused()
    assert "holds key statistics" not in refused()


def test_nothing_to_resume(saved: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no unfinished run .*: start without --resume"):
        gather(model, tokenizer, path=tmp_path / "x", resume=True)
    # Whole statistics are no unfinished ones, and the other way round.
    checkpoint_path(tmp_path / "x").write_bytes(saved.path.read_bytes())
    with pytest.raises(StorageError, match="holds key statistics: name a file of unfinished"):
        gather(model, tokenizer, path=tmp_path / "x", resume=True)


def test_places_are_looked_at_first(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("read too early")
        yield

    for path, message in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "no" / "x", "there is no folder for it: create it first"),
    ):
        with pytest.raises(StorageError, match=message):
            gather(model, tokenizer, never(), path=path)


def test_a_full_disk_costs_no_checkpoint(
    whole: Path, broken: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = checkpoint_path(broken)
    before = part.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space is left"):
            gather(model, tokenizer, path=broken, tokens=400, resume=True)
    assert part.read_bytes() == before
    gather(model, tokenizer, path=broken, tokens=400, resume=True)
    assert broken.read_bytes() == whole.read_bytes()
