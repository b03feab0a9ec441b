"""Driving a clone of EasyEdit, and its own edit computed our way: the same weights.

A small stand-in for the clone serves; a real one is used where WISE_EXT_EASYEDIT names its folder.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peer_easyedit, peers, same_settings
from bench.peer_easyedit import PeerError
from tests.bench import fake_easyedit
from wise_ext import load_model
from wise_ext.editing.edits import Edit, demo_edits

REAL = os.environ.get("WISE_EXT_EASYEDIT", "")
TEMPLATES = ["{}", *(f"{text} {{}}" for text in ("I think that", "You may. Because", "So it is"))]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return fake_easyedit.write(tmp_path / "EasyEdit")


# -- loading -----------------------------------------------------------------------------------


def test_a_folder_that_is_no_clone_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"has no easyeditor.models.wise.WISE\.py: name") as error:
        peer_easyedit.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_clone_without_the_hyperparameters_is_refused(clone: Path) -> None:
    (clone / "hparams/WISE/llama-7b.yaml").unlink()
    with pytest.raises(PeerError, match=r"llama-7b\.yaml: check out"):
        peer_easyedit.load(clone)


def test_a_clone_that_has_changed_is_refused(clone: Path) -> None:
    path = clone / "easyeditor/models/wise/wise_main.py"
    path.write_text(path.read_text().replace("apply_wise_to_model", "apply"))
    with pytest.raises(PeerError, match=r"has no apply_wise_to_model: EasyEdit has changed"):
        peer_easyedit.load(clone)


def test_a_clone_that_does_not_import_is_refused_with_its_first_line(clone: Path) -> None:
    path = clone / "easyeditor/models/wise/utils.py"
    path.write_text("import a_package_nobody_has\n")
    with pytest.raises(PeerError, match=r"utils\.py of .*: ModuleNotFoundError: No module") as e:
        peer_easyedit.load(clone)
    assert "\n" not in str(e.value)


def test_loading_runs_no_package_around_it_and_leaves_the_clone_as_it_was(clone: Path) -> None:
    before = sorted(clone.rglob("*"))
    code = peer_easyedit.load(clone)
    # The packages' own __init__ raise: that they were entered and not run is why this passes.
    assert code.settings == clone / "hparams/WISE/llama-7b.yaml"
    assert "easyeditor" not in sys.modules
    assert sorted(clone.rglob("*")) == before


def test_two_clones_one_after_the_other_are_not_mixed_up(clone: Path, tmp_path: Path) -> None:
    other = fake_easyedit.write(tmp_path / "other")
    path = other / "easyeditor/models/wise/utils.py"
    path.write_text(path.read_text() + "MARK = 1\n")
    assert not hasattr(peer_easyedit.load(clone).utils, "MARK")
    assert peer_easyedit.load(other).utils.MARK == 1


# -- driving -----------------------------------------------------------------------------------


def _peer(clone: Path, folder: Path, **more: Any) -> tuple[peer_easyedit.Peer, Any, str]:
    model, tokenizer = load_model(folder)
    layer = "model.layers.2.mlp.down_proj"
    return (
        peer_easyedit.Peer(peer_easyedit.load(clone), model, tokenizer, layer, **more),
        model,
        layer,
    )


def test_the_peer_is_in_the_model_only_while_attached(
    clone: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, model, layer = _peer(clone, model_dir)
    base = model.get_submodule(layer)
    start = peer.weight
    cost = peer.edit(demo_edits()[0], "Rain fell on the harbour.")
    assert cost.iterations == 12 and cost.cpu > 0 and cost.wall > 0
    assert capsys.readouterr().out == ""
    assert model.get_submodule(layer) is base and torch.equal(base.weight, start)
    assert not torch.equal(peer.weight, start)
    with peer.attached():
        assert torch.equal(model.get_submodule(layer).new_weight, peer.weight)
    assert model.get_submodule(layer) is base


def test_an_edit_that_fails_leaves_the_model_as_it_was(clone: Path, model_dir: Path) -> None:
    peer, model, layer = _peer(clone, model_dir, changes={"n_iter": "many"})
    base = model.get_submodule(layer)
    with pytest.raises(TypeError):
        peer.edit(demo_edits()[0], "Rain fell on the harbour.")
    assert model.get_submodule(layer) is base


def test_an_unrelated_text_out_of_the_prompt_is_refused(clone: Path, model_dir: Path) -> None:
    peer, _, _ = _peer(clone, model_dir)
    edit = demo_edits()[0]
    with pytest.raises(PeerError, match="occurs in the edit's own prompt"):
        peer.batch(edit, edit.prompt[:5])


# -- the same settings -------------------------------------------------------------------------


def _same(peer: peer_easyedit.Peer, model: Any, layer: str, edits: list[Edit]) -> list[float]:
    """max|dW| between the peer's weight and ours after each edit, over how far it went."""
    found = []
    for edit in edits:
        start, unrelated = peer.weight, "Rain fell on the harbour all through the long night."
        batch = peer.batch(edit, unrelated)
        cost = peer.edit(edit, unrelated)
        recipe = same_settings.Recipe.of(peer.hparams, model)
        ours = same_settings.train(model, layer, batch, start, peer.mask, recipe)
        assert ours.iterations == cost.iterations
        moved = (peer.weight - start).abs().max()
        assert moved > 0.01
        found.append(float((ours.weight - peer.weight).abs().max() / moved))
    return found


def test_the_replay_trains_what_the_whole_model_trains(clone: Path, model_dir: Path) -> None:
    # The batch has pads, rows of different lengths and an unrelated row.
    peer, model, layer = _peer(clone, model_dir)
    assert max(_same(peer, model, layer, demo_edits()[:2])) <= peers.SAME_WEIGHTS


def test_something_left_out_of_the_recipe_shows(
    clone: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that guards the speed sees each part of the objective."""
    # So small a model does not reach the margin by itself.
    peer, model, layer = _peer(clone, model_dir, changes={"alpha": 0.1})
    edit, unrelated, start = demo_edits()[0], "Rain fell on the harbour.", peer.weight
    batch = peer.batch(edit, unrelated)
    peer.edit(edit, unrelated)
    moved = (peer.weight - start).abs().max()
    right = same_settings.Recipe.of(peer.hparams, model)

    def difference(recipe: same_settings.Recipe) -> float:
        ours = same_settings.train(model, layer, batch, start, peer.mask, recipe)
        return float((ours.weight - peer.weight).abs().max() / moved)

    assert difference(right) <= peers.SAME_WEIGHTS
    for name, value in {
        "alpha": 50.0,
        "beta": 5.0,
        "gamma": 1.0,
        "learning_rate": 0.9,
        "iterations": 11,
        "activation": torch.tanh,
        "bound": 0.1,
    }.items():
        assert difference(replace(right, **{name: value})) > peers.SAME_WEIGHTS, name
    monkeypatch.setattr(same_settings, "WEIGHT_DECAY", 0.0)
    assert difference(right) > peers.SAME_WEIGHTS


def test_the_unedited_model_is_left_without_hooks_and_gradients(
    clone: Path, model_dir: Path
) -> None:
    peer, model, layer = _peer(clone, model_dir, changes={"n_iter": 2})
    batch = peer.batch(demo_edits()[0], "Rain fell on the harbour.")
    recipe = same_settings.Recipe.of(peer.hparams, model)
    before = model.get_submodule(layer).weight.clone()
    mask = torch.ones(before.numel(), dtype=torch.int64)
    same_settings.train(model, layer, batch, before, mask, recipe)
    assert torch.equal(model.get_submodule(layer).weight, before)
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(a or b for a, b in hooks)
    assert all(p.grad is None for p in model.parameters())


def test_a_projection_that_cannot_be_cut_is_refused(lab: Any) -> None:
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.ones(2, 5, dtype=torch.long),
    }
    with pytest.raises(same_settings.Unsuited, match="no linear projection without a bias"):
        same_settings.Replay(lab.make_model("gpt2"), "transformer.h.1.mlp.c_proj", batch)
    with pytest.raises(same_settings.Unsuited, match="does more with its output"):
        same_settings.Replay(lab.make_model("gemma2"), "model.layers.1.mlp.down_proj", batch)


@pytest.mark.skipif(not REAL, reason="no EasyEdit: name a clone's folder in WISE_EXT_EASYEDIT")
def test_the_real_peer_ends_with_the_same_weights(model_dir: Path) -> None:
    """70 iterations of its own settings, edit after edit into the same weight."""
    peer, model, layer = _peer(Path(REAL), model_dir, templates=TEMPLATES)
    assert peer.hparams.n_iter == 70 and peer.hparams.edit_lr == 1.0
    assert max(_same(peer, model, layer, demo_edits()[:2])) <= peers.SAME_WEIGHTS
