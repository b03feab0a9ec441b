"""Where a patched model's time goes: every architecture, parts that add up, nothing left behind."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from wise_ext.errors import DataError, ModelError
from wise_ext.evaluation import profile, profiling
from wise_ext.evaluation.profile_plot import draw
from wise_ext.evaluation.profiling import EMBEDDING, OUTPUT, REST, ROUTING, SIDE
from wise_ext.models import patch
from wise_ext.models.installed import patch_of


@pytest.fixture
def patched(lab: SimpleNamespace, architecture: str) -> tuple[Any, torch.Tensor]:
    model, known = lab.make_model(architecture), lab.prompts(6, 8)
    patch(model, lab.key_memory(model, known))
    return model, torch.tensor(known[:1])


def test_every_part_is_there_and_they_add_up(patched: tuple[Any, torch.Tensor]) -> None:
    model, ids = patched
    found = profile(model, ids, repeats=3, new_tokens=2)
    names = [part.name for part in found.parts]
    blocks = [name for name in names if name.startswith("block")]
    assert blocks == [f"block {n}" for n in range(len(blocks))] and len(blocks) >= 2
    assert {ROUTING, SIDE, REST} <= set(names) <= {*blocks, ROUTING, SIDE, REST, EMBEDDING, OUTPUT}
    assert found.route == 0 and found.tokens == 6
    by_name = {part.name: part for part in found.parts}
    assert by_name[ROUTING].block == 0 and by_name[ROUTING].prefill > 0
    assert by_name[ROUTING].decode == 0  # held
    assert by_name[SIDE].prefill > 0 and by_name[SIDE].decode > 0
    assert all(part.prefill >= 0 and part.decode >= 0 for part in found.parts)
    assert sum(part.prefill for part in found.parts) < 10 * found.prefill
    assert found.prefill_ratio > 0 and found.decode_ratio > 0


def test_what_a_part_takes_is_its_own(
    patched: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that takes its time is slow; the block that it runs in is not."""
    model, ids = patched
    spent = 0.0

    def now(device: torch.device) -> float:
        """A clock on which a look takes 1 ms, and a decision 30."""
        nonlocal spent
        spent += 1
        return spent

    router = patch_of(model).routing.router
    decide = type(router).decide

    def slow_decide(self: Any, *given: Any) -> Any:
        nonlocal spent
        spent += 30
        return decide(self, *given)

    monkeypatch.setattr(profiling, "_now", now)
    monkeypatch.setattr(type(router), "decide", slow_decide)
    found = profile(model, ids, repeats=3, new_tokens=1)
    parts = {part.name: part for part in found.parts}
    assert parts[ROUTING].prefill == 31  # the decision, and the look at the clock behind it
    assert parts["block 0"].prefill < 10 and parts["block 1"].prefill < 10
    assert (found.prefill, found.prefill_ratio) == (31, 31)


def test_nothing_is_left_behind(patched: tuple[Any, torch.Tensor]) -> None:
    model, ids = patched
    before = model(input_ids=ids).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    profile(model, ids, repeats=3, new_tokens=1)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    installed = patch_of(model)
    assert after == hooks
    assert "decide" not in vars(installed.routing.router)
    assert "add_side_" not in vars(installed.dual.bank)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_unrouted_prompts_never_reach_the_side_memory(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    patch(model, lab.key_memory(model, lab.prompts(6, 8)))
    found = profile(model, torch.tensor(lab.prompts(9, seed=7)), repeats=3, new_tokens=1)
    assert found.route == -1
    assert not [part for part in found.parts if part.name == SIDE]


def test_what_cannot_be_profiled_is_refused(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    with pytest.raises(ModelError, match="has no side memory"):
        profile(model, torch.tensor([[1]]))
    patch(model, lab.key_memory(model, lab.prompts(6, 8)))
    with pytest.raises(DataError, match="the prompt has no tokens"):
        profile(model, torch.zeros(1, 0, dtype=torch.int64))


def test_the_picture_shows_routing_and_side_memory(lab: SimpleNamespace) -> None:
    model, known = lab.make_model("llama"), lab.prompts(6, 8)
    patch(model, lab.key_memory(model, known))
    found = profile(model, torch.tensor(known[:1]), repeats=3, new_tokens=1)
    # so that their colours are there to be seen
    found = replace(found, parts=tuple(replace(p, prefill=1.0, decode=1.0) for p in found.parts))
    pixels = (imread(io.BytesIO(draw(found, "tiny")))[..., :3] * 255).round()
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (pixels == colour).all(-1).sum() > 500
