"""Tensors that move like buffers and are not saved."""

from __future__ import annotations

import copy

import torch
from torch import nn

from wise_ext.memory.growing import Growing


def test_moved_but_not_saved() -> None:
    held = Growing()
    held.hold(values=torch.randn(4), places=torch.arange(3))
    model = nn.Sequential(nn.Linear(2, 2), held)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model.to(torch.bfloat16)
    assert held.values.dtype == torch.bfloat16 and held.places.dtype == torch.int64
    model.to("meta")
    assert held.values.device.type == held.places.device.type == "meta"


def test_one_becomes_another_and_a_copy_is_its_own() -> None:
    one, other = Growing(), Growing()
    one.hold(values=torch.zeros(3))
    other.hold(values=torch.ones(5))
    copied = copy.deepcopy(one)
    one.become(other)
    assert one.held()["values"] is other.values
    assert copied.values.equal(torch.zeros(3))
    copied.hold(values=torch.ones(1), more=torch.zeros(2))
    assert list(copied.held()) == ["values", "more"] and list(one.held()) == ["values"]


def test_only_what_grows_is_left_open() -> None:
    class Half(Growing):
        fixed = frozenset({"mean"})

    half = Half()
    half.hold(mean=torch.zeros(3), keys=torch.zeros(5, 3))
    assert half.keys._dynamo_weak_dynamic_indices == {0}  # type: ignore[attr-defined]
    assert not hasattr(half.mean, "_dynamo_weak_dynamic_indices")
