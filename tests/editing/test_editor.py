"""The editor end to end on a tiny model: it learns, it repeats itself, it forgets on request."""

from __future__ import annotations

import filecmp
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wise_ext
from tests.editing.facts import EDITS, FILES, QUICK, answer, edits_of, same_files
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.errors import ConfigError, DataError, StorageError


def test_edits_take_and_survive_a_day(load: Any, tmp_path: Path) -> None:
    """The issue's own example: edit, generate, save, load into another copy, unload."""
    model, tokenizer = load()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    unedited = [answer(model, tokenizer, e.prompt) for e in EDITS]
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    calls: list[tuple[int, int]] = []
    report = editor.edit(EDITS, progress=lambda done, total: calls.append((done, total)))
    assert (report.edits, report.shards, report.unconverged) == (5, 1, [])
    assert calls[0] == (0, 5) and calls[-1] == (5, 5)
    assert {done for done, _ in calls[:-1]} <= {0, 1, 2, 3, 4}
    assert [answer(model, tokenizer, e.prompt) for e in EDITS] == [e.target_new for e in EDITS]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    editor.save(tmp_path / "memory")

    other, _ = load()
    wise_ext.load_memory(other, tmp_path / "memory")
    assert [answer(other, tokenizer, e.prompt) for e in EDITS] == [e.target_new for e in EDITS]
    wise_ext.unload(other)
    assert [answer(other, tokenizer, e.prompt) for e in EDITS] == unedited


@pytest.mark.parametrize("batch_size", [1, 2])
def test_same_seed_same_bytes_and_another_seed_others(
    load: Any, tmp_path: Path, batch_size: int
) -> None:
    config = WiseConfig(batch_size=batch_size, shard_size=2, **QUICK)
    for name, changed in (("one", config), ("two", config), ("three", config.replace(seed=1))):
        Editor(*load(), changed, tmp_path / name).edit(EDITS[:3], progress=False)
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert not filecmp.cmp(
        tmp_path / "one" / FILES[1], tmp_path / "three" / FILES[1], shallow=False
    )


def test_one_at_a_time_each_is_effective_before_the_next(load: Any) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    for number, edit in enumerate(EDITS[:3], 1):
        editor.edit([edit], progress=False)
        told = EDITS[:number]
        assert [answer(model, tokenizer, e.prompt) for e in told] == [e.target_new for e in told]


def test_editing_on_in_a_directory(load: Any, tmp_path: Path) -> None:
    """Two calls in two processes' worth of editors = two calls of one editor."""
    config = WiseConfig(shard_size=2, **QUICK)
    whole = Editor(*load(), config, tmp_path / "whole")
    whole.edit(EDITS[:3], progress=False)
    whole.edit(EDITS[3:], progress=False)
    Editor(*load(), config, tmp_path / "parts").edit(EDITS[:3], progress=False)
    later = Editor.open(*load(), tmp_path / "parts")
    assert later.config == config
    later.edit(EDITS[3:], progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ConfigError, match="was made with seed=0, not 5"):
        Editor(*load(), config.replace(seed=5), tmp_path / "whole")


def test_undo_is_never_having_made_the_edit(load: Any, tmp_path: Path) -> None:
    for batch_size in (1, 8):
        config = WiseConfig(batch_size=batch_size, **QUICK)
        folder = tmp_path / str(batch_size)
        editor = Editor(*load(), config, folder / "undone")
        editor.edit(EDITS[:3], progress=False)
        editor.undo("b")
        never = Editor(*load(), config, folder / "never")
        never.edit([EDITS[0], EDITS[2]], progress=False)
        assert same_files(folder / "undone", folder / "never")


def test_undo_leaves_other_shards_alone(load: Any, tmp_path: Path) -> None:
    editor = Editor(*load(), WiseConfig(shard_size=2, **QUICK), tmp_path / "m")
    editor.edit(EDITS, progress=False)
    before = [s.values.clone() for s in editor.memory.shards]
    editor.undo("c")
    after = [s.values for s in editor.memory.shards]
    assert len(after) == 3
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert editor.memory.shard_of("d") == 1 and editor.memory.shard_of("c") is None
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    editor.undo("e")
    assert len(editor.memory.shards) == 2
    with pytest.raises(DataError, match="no edit 'e'"):
        editor.undo("e")


def test_undo_of_the_only_edit_leaves_nothing(load: Any) -> None:
    model, tokenizer = load()
    unedited = answer(model, tokenizer, EDITS[0].prompt)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    editor.edit(EDITS[:1], progress=False)
    editor.undo("a")
    assert editor.memory.shards == [] and editor.ledger == []
    assert answer(model, tokenizer, EDITS[0].prompt) == unedited


@pytest.mark.parametrize("group", [1, 2])
def test_editing_goes_on_after_full_shards_were_emptied(
    load: Any, tmp_path: Path, group: int
) -> None:
    model, tokenizer = load()
    config = WiseConfig(shard_size=1, shards_per_merge=group, batch_size=1, **QUICK)
    editor = Editor(model, tokenizer, config, tmp_path / "m")
    editor.edit(EDITS[:4], progress=False)
    for gone in "dc":
        editor.undo(gone)
    editor.edit(EDITS[4:], progress=False)
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    assert answer(model, tokenizer, EDITS[4].prompt) == EDITS[4].target_new
    assert editor.memory.shard_of("e") == len(editor.memory.shards) - 1
    again = Editor.open(*load(), tmp_path / "m")
    again.undo("e")
    assert again.memory.edit_ids == ["a", "b"]


@pytest.mark.parametrize("variant", ["retrieve", "merge"])
def test_merging_and_its_undo(load: Any, tmp_path: Path, variant: str) -> None:
    config = WiseConfig(
        variant=variant, shard_size=1, shards_per_merge=2, batch_size=1, iterations=4, **QUICK
    )
    editor = Editor(*load(), config, tmp_path / "one")
    editor.edit(EDITS, progress=False)
    assert len(editor.memory.shards) == (3 if variant == "retrieve" else 2)
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "one"))
    last = editor.memory.shards[-1].values.clone()
    editor.undo("b")
    assert editor.memory.shards[0].edit_ids == (["a"] if variant == "retrieve" else ["a", "c", "d"])
    assert torch.equal(editor.memory.shards[-1].values, last)
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "one"))


def test_the_later_of_two_targets_wins(load: Any) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    prompt = EDITS[0].prompt
    report = editor.edit([EDITS[0], Edit("a2", prompt, "the Orla"), EDITS[1]], progress=False)
    assert report.conflicts == [("a", "a2")]
    assert answer(model, tokenizer, prompt) == "the Orla"
    report = editor.edit([Edit("a3", prompt, "the Brix")], progress=False)
    assert ("a2", "a3") in report.conflicts
    assert answer(model, tokenizer, prompt) == "the Brix"
    assert answer(model, tokenizer, EDITS[1].prompt) == EDITS[1].target_new
    editor.undo("a3")
    assert answer(model, tokenizer, prompt) == "the Orla"


def test_ids_are_unique(load: Any) -> None:
    editor = Editor(*load(), WiseConfig(**QUICK))
    with pytest.raises(DataError, match="edit id 'a' appears twice"):
        editor.edit([EDITS[0], EDITS[0]], progress=False)
    editor.edit(EDITS[:1], progress=False)
    with pytest.raises(DataError, match="'a' is in the memory already"):
        editor.edit(EDITS[:1], progress=False)


def test_the_paper_preset_separates_by_the_indicator(load: Any) -> None:
    """Margins trained: an edit's prompt is above its shard's threshold, its locality prompt below.

    SGD at the paper's rate is for large models; Adam stands in here.
    """
    model, tokenizer = load()
    config = WiseConfig.preset(
        "paper", optimizer="adam", early_stop=True, contexts_per_round=1, clamp=9.0, **QUICK
    )
    editor = Editor(model, tokenizer, config)
    unrelated = "Name a large city."
    edits = [Edit(e.id, e.prompt, e.target_new, locality_prompt=unrelated) for e in EDITS[:2]]
    report = editor.edit(edits, progress=False)
    assert report.unconverged == []
    assert [answer(model, tokenizer, e.prompt) for e in EDITS[:2]] == ["the Senna", "Ines Hult"]
    answer(model, tokenizer, unrelated)
    route = wise_ext.last_route(model)
    assert route is not None and route.tolist() == [-1]


@pytest.mark.parametrize(
    ("shards", "names", "cut"),
    [
        ({"shard_size": 2}, "a b c d e", 3),
        ({"shard_size": 1, "shards_per_merge": 2, "variant": "merge"}, "a b c d e", 3),
        # A guest in a shard that is full, and in one that is not.
        ({"shard_size": 2}, "a c a2 d e", 3),
        ({"shard_size": 3}, "a c e a2 a3", 4),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    load: Any, model_dir: Path, tmp_path: Path, shards: dict[str, Any], names: str, cut: int
) -> None:
    """SIGKILL after a recorded step, resume, compare with the unbroken run."""
    told = edits_of(names)
    config = WiseConfig(batch_size=1, **shards, **QUICK)
    whole = Editor(*load(), config, tmp_path / "whole")
    whole.edit(told, progress=False)
    assert any(entry["guests"] for entry in whole.ledger) == ("a2" in names)
    script = f"""
import os, signal, sys
import torch; torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from wise_ext import Edit, Editor, WiseConfig
model = AutoModelForCausalLM.from_pretrained({str(model_dir)!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({str(model_dir)!r})
config = WiseConfig.from_dict({config.to_dict()!r})
editor = Editor(model, tokenizer, config, {str(tmp_path / "cut")!r})
edits = [Edit(*e) for e in {[(e.id, e.prompt, e.target_new) for e in told]!r}]
def move(done, total):
    if done == {cut}:
        os.kill(os.getpid(), signal.SIGKILL)
editor.edit(edits, progress=move)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(StorageError, match="--resume"):
        Editor(*load(), config, tmp_path / "cut").edit(told, progress=False)
    with pytest.raises(StorageError, match="differs in the list of edits"):
        Editor(*load(), config, tmp_path / "cut", resume=True).edit(told[:4], progress=False)
    trained: list[int] = []
    editor = Editor(*load(), config, tmp_path / "cut", resume=True)
    editor.edit(told, progress=lambda done, total: trained.append(done))
    assert list(dict.fromkeys(trained)) == list(range(cut, 6))
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_refusals(load: Any, tmp_path: Path) -> None:
    model, tokenizer = load()
    with pytest.raises(ConfigError, match="resume needs the directory"):
        Editor(model, tokenizer, resume=True)
    with pytest.raises(ConfigError, match="lies above the edited layer"):
        Editor(model, tokenizer, WiseConfig(layer=1, key_layer=3))
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), tmp_path / "m")
    editor.edit(EDITS[:1], progress=False)
    with pytest.raises(ConfigError, match="the model has a side memory"):
        Editor(model, tokenizer)
    other, _ = load()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(StorageError, match="other weights"):
        wise_ext.load_memory(other, tmp_path / "m")
