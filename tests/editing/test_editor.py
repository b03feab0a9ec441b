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
from transformers import AutoModelForCausalLM, AutoTokenizer

import wise_ext
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.errors import ConfigError, DataError, StorageError

FILES = ("wise_config.json", "side_memory.safetensors", "edits.jsonl")
QUICK: dict[str, Any] = {
    "contexts": 1,
    "contexts_per_edit": 1,
    "context_tokens": 4,
    "learning_rate": 0.05,
    "stop_margin": 1.0,
    "layer": 2,
}
EDITS = [
    Edit("a", "The river through Lumo is", "the Senna"),
    Edit("b", "Who runs the Ardo bakery?", "Ines Hult"),
    Edit("c", "The colour of the Pell flag is", "grey"),
    Edit("d", "Where is the Quist tower?", "Varno"),
    Edit("e", "The first mayor of Telm was", "Jon Aker"),
]
# Of a's subject: their prompts could be taken for a's.
A2 = Edit("a2", "The river through Lumo flows to", "Orla")
A3 = Edit("a3", "The river through Lumo was named by", "Brix")


@pytest.fixture
def load(model_dir: Path) -> Any:
    """A fresh copy of the tiny model and its tokenizer at each call."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return lambda: (AutoModelForCausalLM.from_pretrained(model_dir).eval(), tokenizer)


def _same(one: Path, two: Path) -> bool:
    return all(filecmp.cmp(one / name, two / name, shallow=False) for name in FILES)


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def test_edits_take_and_survive_a_day(load: Any, tmp_path: Path) -> None:
    """The issue's own example: edit, generate, save, load into another copy, unload."""
    model, tokenizer = load()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    unedited = [_answer(model, tokenizer, e.prompt) for e in EDITS]
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    calls: list[tuple[int, int]] = []
    report = editor.edit(EDITS, progress=lambda done, total: calls.append((done, total)))
    assert (report.edits, report.shards, report.unconverged) == (5, 1, [])
    assert calls[0] == (0, 5) and calls[-1] == (5, 5)
    assert {done for done, _ in calls[:-1]} <= {0, 1, 2, 3, 4}
    assert [_answer(model, tokenizer, e.prompt) for e in EDITS] == [e.target_new for e in EDITS]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    editor.save(tmp_path / "memory")

    other, _ = load()
    wise_ext.load_memory(other, tmp_path / "memory")
    assert [_answer(other, tokenizer, e.prompt) for e in EDITS] == [e.target_new for e in EDITS]
    wise_ext.unload(other)
    assert [_answer(other, tokenizer, e.prompt) for e in EDITS] == unedited


@pytest.mark.parametrize("batch_size", [1, 2])
def test_same_seed_same_bytes_and_another_seed_others(
    load: Any, tmp_path: Path, batch_size: int
) -> None:
    config = WiseConfig(batch_size=batch_size, shard_size=2, **QUICK)
    for name, changed in (("one", config), ("two", config), ("three", config.replace(seed=1))):
        Editor(*load(), changed, tmp_path / name).edit(EDITS[:3], progress=False)
    assert _same(tmp_path / "one", tmp_path / "two")
    assert not filecmp.cmp(
        tmp_path / "one" / FILES[1], tmp_path / "three" / FILES[1], shallow=False
    )


def test_one_at_a_time_each_is_effective_before_the_next(load: Any) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    for number, edit in enumerate(EDITS[:3], 1):
        editor.edit([edit], progress=False)
        told = EDITS[:number]
        assert [_answer(model, tokenizer, e.prompt) for e in told] == [e.target_new for e in told]


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
    assert _same(tmp_path / "whole", tmp_path / "parts")
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
        assert _same(folder / "undone", folder / "never")


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
    unedited = _answer(model, tokenizer, EDITS[0].prompt)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK))
    editor.edit(EDITS[:1], progress=False)
    editor.undo("a")
    assert editor.memory.shards == [] and editor.ledger == []
    assert _answer(model, tokenizer, EDITS[0].prompt) == unedited


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
    assert _answer(model, tokenizer, EDITS[4].prompt) == EDITS[4].target_new
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
    assert _answer(model, tokenizer, prompt) == "the Orla"
    report = editor.edit([Edit("a3", prompt, "the Brix")], progress=False)
    assert ("a2", "a3") in report.conflicts
    assert _answer(model, tokenizer, prompt) == "the Brix"
    assert _answer(model, tokenizer, EDITS[1].prompt) == EDITS[1].target_new
    editor.undo("a3")
    assert _answer(model, tokenizer, prompt) == "the Orla"


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
    assert [_answer(model, tokenizer, e.prompt) for e in EDITS[:2]] == ["the Senna", "Ines Hult"]
    _answer(model, tokenizer, unrelated)
    route = wise_ext.last_route(model)
    assert route is not None and route.tolist() == [-1]


def _of(names: str) -> list[Edit]:
    """Edits by their ids."""
    known = {edit.id: edit for edit in (*EDITS, A2, A3)}
    return [known[name] for name in names.split()]


def _agrees(editor: Editor, homes: dict[str, int]) -> None:
    """Ledger, shards and keys name the same shard of every edit, and it alone."""
    assert {e["id"]: e["shard"] for e in editor.ledger} == homes
    index = editor.memory.key_index
    assert index is not None
    assert dict(zip(index.ids, index.shards.tolist(), strict=True)) == homes
    for place, shard in enumerate(editor.memory.shards):
        assert shard.edit_ids == [name for name, home in homes.items() if home == place]


def test_a_later_edit_of_a_subject_brings_the_earlier_one_along(load: Any, tmp_path: Path) -> None:
    model, tokenizer = load()
    told = [*_of("a b c"), A2, EDITS[3], EDITS[4]]
    config = WiseConfig(shard_size=3, batch_size=1, **QUICK)
    editor = Editor(model, tokenizer, config, tmp_path / "m")
    assert editor.edit(told, progress=False).unconverged == []
    assert {e["id"]: e["guests"] for e in editor.ledger if e["guests"]} == {"a2": ["a"]}
    # A guest takes up room: part 1 was full before e.
    _agrees(editor, {"a": 1, "b": 0, "c": 0, "a2": 1, "d": 1, "e": 2})
    assert {e["id"]: e["part"] for e in editor.ledger}["a"] == 0
    assert [_answer(model, tokenizer, e.prompt) for e in told] == [e.target_new for e in told]
    for edit in (told[0], A2):
        _answer(model, tokenizer, edit.prompt)
        route = wise_ext.last_route(model)
        assert route is not None and route.tolist() == [1]
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    again = Editor.open(*load(), tmp_path / "m")
    _agrees(again, {"a": 1, "b": 0, "c": 0, "a2": 1, "d": 1, "e": 2})


def test_editing_on_beside_a_guest(load: Any, tmp_path: Path) -> None:
    """A part with a guest in it, taken up by another editor = never put down."""
    config = WiseConfig(shard_size=4, **QUICK)
    first, second = _of("a b c e a2"), _of("d a3")
    whole = Editor(*load(), config, tmp_path / "whole")
    whole.edit(first, progress=False)
    whole.edit(second, progress=False)
    Editor(*load(), config, tmp_path / "parts").edit(first, progress=False)
    Editor.open(*load(), tmp_path / "parts").edit(second, progress=False)
    assert _same(tmp_path / "whole", tmp_path / "parts")


def test_undo_of_a_host_sends_its_guest_home(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(_of("a b c e a2 d"), progress=False)
    assert editor.memory.shard_of("a") == 1
    full = editor.memory.shards[0].values.clone()
    editor.undo("a2")
    assert torch.equal(editor.memory.shards[0].values, full)
    Editor(*load(), config, tmp_path / "never").edit(_of("a b c e d"), progress=False)
    assert _same(tmp_path / "undone", tmp_path / "never")
    _agrees(editor, {"a": 0, "b": 0, "c": 0, "e": 0, "d": 1})
    assert _answer(editor.model, load()[1], EDITS[0].prompt) == EDITS[0].target_new


def test_undo_of_a_host_leaves_the_guest_to_the_next(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(_of("a b c e a2 a3"), progress=False)
    assert editor.memory.shards[1].edit_ids == ["a", "a2", "a3"]
    editor.undo("a2")
    Editor(*load(), config, tmp_path / "never").edit(_of("a b c e a3"), progress=False)
    assert _same(tmp_path / "undone", tmp_path / "never")
    _agrees(editor, {"a": 1, "b": 0, "c": 0, "e": 0, "a3": 1})


def test_undo_of_an_only_host_drops_its_shard(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=3, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(_of("a b c a2"), progress=False)
    assert len(editor.memory.shards) == 2
    editor.undo("a2")
    Editor(*load(), config, tmp_path / "never").edit(_of("a b c"), progress=False)
    assert _same(tmp_path / "undone", tmp_path / "never")
    editor.edit([EDITS[3]], progress=False)
    _agrees(editor, {"a": 0, "b": 0, "c": 0, "d": 1})


def test_undo_of_a_guest_trains_both_of_its_shards_again(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(_of("a b c e a2 d"), progress=False)
    before = [shard.values.clone() for shard in editor.memory.shards]
    editor.undo("a")
    after = [shard.values for shard in editor.memory.shards]
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    _agrees(editor, {"b": 0, "c": 0, "e": 0, "a2": 1, "d": 1})
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "undone"))
    assert all(entry["guests"] == [] for entry in editor.ledger)
    # A full shard stays one when it loses an edit; so does a full one of three.
    smaller = Editor(*load(), config.replace(shard_size=3), tmp_path / "never")
    smaller.edit(_of("b c e a2 d"), progress=False)
    for name in FILES[1:]:
        assert filecmp.cmp(tmp_path / "undone" / name, tmp_path / "never" / name, shallow=False)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_new_answer_to_a_prompt_of_a_full_shard(
    load: Any, tmp_path: Path, batch_size: int
) -> None:
    """What was replaced is not trained again, but nothing leads to it any more, either."""
    model, tokenizer = load()
    config = WiseConfig(shard_size=2, batch_size=batch_size, **QUICK)
    editor = Editor(model, tokenizer, config, tmp_path / "m")
    editor.edit(_of("a b"), progress=False)
    newer = Edit("a9", EDITS[0].prompt, "the Brix")
    report = editor.edit([newer, EDITS[2]], progress=False)
    assert report.conflicts == [("a", "a9")]
    # Two edits fill their shard: the replaced one takes no room.
    assert [len(e.edits) if (e := editor._open) else 0, len(editor.memory.shards)] == [0, 2]
    _agrees(editor, {"a": 1, "b": 0, "a9": 1, "c": 1})
    assert _answer(model, tokenizer, newer.prompt) == "the Brix"
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    editor.undo("a9")
    _agrees(editor, {"a": 0, "b": 0, "c": 1})
    assert _answer(model, tokenizer, newer.prompt) == EDITS[0].target_new


@pytest.mark.parametrize(
    "merging",
    [{"shards_per_merge": 2}, {"variant": "merge"}, {"router": "indicator", "margins": True}],
)
def test_only_shards_that_stay_apart_and_are_found_by_key_invite(
    load: Any, merging: dict[str, Any]
) -> None:
    config = WiseConfig(shard_size=1, batch_size=1, iterations=2, **merging, **QUICK)
    editor = Editor(*load(), config)
    editor.edit(_of("a c a2"), progress=False)
    assert [entry["guests"] for entry in editor.ledger] == [[], [], []]


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
    told = _of(names)
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
    assert _same(tmp_path / "whole", tmp_path / "cut")


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
