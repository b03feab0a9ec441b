"""The inference path never waits for a GPU: a patched model runs on fake tensors.

A fake tensor has a shape but no values: reading one (`.item()`, `bool`, `tolist`, a shape that
depends on values) raises. So this shows on any machine where a card would have to be waited for.
The places that may look do so through a Glance, which has its own tests, or where
`memory.looks.at_hand` says that nothing is waited for.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from wise_ext.memory import Decision
from wise_ext.memory.growing import Growing
from wise_ext.models import disabled, force_route, last_route, patch, prompt_lengths
from wise_ext.models.installed import patch_of
from wise_ext.nn import Course


class Unlooked:
    """Stands in for a glance that has not arrived yet."""

    def __init__(self, route: torch.Tensor) -> None:
        pass

    def routed(self) -> bool:
        return True


def forget_values(mode: FakeTensorMode, *modules: nn.Module) -> None:
    for part in (part for module in modules for part in module.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = mode.from_tensor(parameter)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = mode.from_tensor(buffer)
        if isinstance(part, Growing):
            part.hold(**{name: mode.from_tensor(held) for name, held in part.held().items()})


def test_reading_a_fake_tensor_raises() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool((torch.zeros(2) >= 0).any())


@pytest.mark.parametrize("kind", ["key_memory", "indicator_memory"])
@torch.no_grad()
def test_prefill_decode_and_scoring(
    architecture: str, lab: SimpleNamespace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lab.make_model(architecture)
    known = lab.prompts(5, 8)
    patch(model, getattr(lab, kind)(model, known))
    monkeypatch.setattr("wise_ext.nn.route_state.Glance", Unlooked)
    monkeypatch.setattr("wise_ext.memory.looks.at_hand", lambda values: False)
    router = patch_of(model).routing.router
    assert isinstance(router, nn.Module)
    ids, mask = lab.padded(known).values()
    with prompt_lengths(model, [4, 6]), FakeTensorMode() as mode:
        forget_values(mode, model, router)
        state = patch_of(model).routing.state
        assert state.limits is not None
        state.limits = mode.from_tensor(state.limits)
        ids, mask = mode.from_tensor(ids), mode.from_tensor(mask)
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        decided = last_route(model)
        assert decided is not None and decided.shape == (2,)
        more = torch.cat([mask, mask[:, :1]], 1)
        model(input_ids=ids[:, :1], attention_mask=more, past_key_values=out.past_key_values)
        with disabled(model):
            model(input_ids=ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_a_forced_route_is_not_read(lab: SimpleNamespace) -> None:
    model = lab.make_model("llama")
    known = lab.prompts(5, 8)
    patch(model, lab.key_memory(model, known))
    ids = torch.tensor(known[:1])
    with force_route(model, 1), FakeTensorMode() as mode, pytest.MonkeyPatch.context() as patched:
        patched.setattr("wise_ext.nn.route_state.Glance", Unlooked)
        forget_values(mode, model)
        state = patch_of(model).routing.state
        assert state.forced is not None
        decision, cue = state.forced
        assert cue is not None
        decision = Decision(*(mode.from_tensor(values) for values in decision))
        state.forced = Course(decision, mode.from_tensor(cue))
        model(input_ids=mode.from_tensor(ids), use_cache=False)
