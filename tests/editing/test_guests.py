"""Guests: edits that a prompt could confuse share a shard, through undo and new answers."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch

import wise_ext
from tests.editing.facts import A2, EDITS, FILES, QUICK, answer, edits_of, same_files
from wise_ext import Edit, Editor, WiseConfig


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
    told = [*edits_of("a b c"), A2, EDITS[3], EDITS[4]]
    config = WiseConfig(shard_size=3, batch_size=1, **QUICK)
    editor = Editor(model, tokenizer, config, tmp_path / "m")
    assert editor.edit(told, progress=False).unconverged == []
    assert {e["id"]: e["guests"] for e in editor.ledger if e["guests"]} == {"a2": ["a"]}
    # A guest takes up room: part 1 was full before e.
    _agrees(editor, {"a": 1, "b": 0, "c": 0, "a2": 1, "d": 1, "e": 2})
    assert {e["id"]: e["part"] for e in editor.ledger}["a"] == 0
    assert [answer(model, tokenizer, e.prompt) for e in told] == [e.target_new for e in told]
    for edit in (told[0], A2):
        answer(model, tokenizer, edit.prompt)
        route = wise_ext.last_route(model)
        assert route is not None and route.tolist() == [1]
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    again = Editor.open(*load(), tmp_path / "m")
    _agrees(again, {"a": 1, "b": 0, "c": 0, "a2": 1, "d": 1, "e": 2})


def test_editing_on_beside_a_guest(load: Any, tmp_path: Path) -> None:
    """A part with a guest in it, taken up by another editor = never put down."""
    config = WiseConfig(shard_size=4, **QUICK)
    first, second = edits_of("a b c e a2"), edits_of("d a3")
    whole = Editor(*load(), config, tmp_path / "whole")
    whole.edit(first, progress=False)
    whole.edit(second, progress=False)
    Editor(*load(), config, tmp_path / "parts").edit(first, progress=False)
    Editor.open(*load(), tmp_path / "parts").edit(second, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "parts")


def test_undo_of_a_host_sends_its_guest_home(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(edits_of("a b c e a2 d"), progress=False)
    assert editor.memory.shard_of("a") == 1
    full = editor.memory.shards[0].values.clone()
    editor.undo("a2")
    assert torch.equal(editor.memory.shards[0].values, full)
    Editor(*load(), config, tmp_path / "never").edit(edits_of("a b c e d"), progress=False)
    assert same_files(tmp_path / "undone", tmp_path / "never")
    _agrees(editor, {"a": 0, "b": 0, "c": 0, "e": 0, "d": 1})
    assert answer(editor.model, load()[1], EDITS[0].prompt) == EDITS[0].target_new


def test_undo_of_a_host_leaves_the_guest_to_the_next(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(edits_of("a b c e a2 a3"), progress=False)
    assert editor.memory.shards[1].edit_ids == ["a", "a2", "a3"]
    editor.undo("a2")
    Editor(*load(), config, tmp_path / "never").edit(edits_of("a b c e a3"), progress=False)
    assert same_files(tmp_path / "undone", tmp_path / "never")
    _agrees(editor, {"a": 1, "b": 0, "c": 0, "e": 0, "a3": 1})


def test_undo_of_an_only_host_drops_its_shard(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=3, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(edits_of("a b c a2"), progress=False)
    assert len(editor.memory.shards) == 2
    editor.undo("a2")
    Editor(*load(), config, tmp_path / "never").edit(edits_of("a b c"), progress=False)
    assert same_files(tmp_path / "undone", tmp_path / "never")
    editor.edit([EDITS[3]], progress=False)
    _agrees(editor, {"a": 0, "b": 0, "c": 0, "d": 1})


def test_undo_of_a_guest_trains_both_of_its_shards_again(load: Any, tmp_path: Path) -> None:
    config = WiseConfig(shard_size=4, batch_size=1, **QUICK)
    editor = Editor(*load(), config, tmp_path / "undone")
    editor.edit(edits_of("a b c e a2 d"), progress=False)
    before = [shard.values.clone() for shard in editor.memory.shards]
    editor.undo("a")
    after = [shard.values for shard in editor.memory.shards]
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    _agrees(editor, {"b": 0, "c": 0, "e": 0, "a2": 1, "d": 1})
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "undone"))
    assert all(entry["guests"] == [] for entry in editor.ledger)
    # A full shard stays one when it loses an edit; so does a full one of three.
    smaller = Editor(*load(), config.replace(shard_size=3), tmp_path / "never")
    smaller.edit(edits_of("b c e a2 d"), progress=False)
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
    editor.edit(edits_of("a b"), progress=False)
    newer = Edit("a9", EDITS[0].prompt, "the Brix")
    report = editor.edit([newer, EDITS[2]], progress=False)
    assert report.conflicts == [("a", "a9")]
    # Two edits fill their shard: the replaced one takes no room.
    assert (editor._builder._open, len(editor.memory.shards)) == (None, 2)
    _agrees(editor, {"a": 1, "b": 0, "a9": 1, "c": 1})
    assert answer(model, tokenizer, newer.prompt) == "the Brix"
    assert all(check.ok for check in wise_ext.storage.verify(tmp_path / "m"))
    editor.undo("a9")
    _agrees(editor, {"a": 0, "b": 0, "c": 1})
    assert answer(model, tokenizer, newer.prompt) == EDITS[0].target_new


@pytest.mark.parametrize(
    "merging",
    [{"shards_per_merge": 2}, {"variant": "merge"}, {"router": "indicator", "margins": True}],
)
def test_only_shards_that_stay_apart_and_are_found_by_key_invite(
    load: Any, merging: dict[str, Any]
) -> None:
    config = WiseConfig(shard_size=1, batch_size=1, iterations=2, **merging, **QUICK)
    editor = Editor(*load(), config)
    editor.edit(edits_of("a c a2"), progress=False)
    assert [entry["guests"] for entry in editor.ledger] == [[], [], []]
