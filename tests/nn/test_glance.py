"""A look at a route that waits for nobody; the GPU's part is played by stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wise_ext.nn import Glance


class Event:
    """A CUDA event that has not been reached until it is told so."""

    reached = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.reached


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda as far as a Glance needs it; `capturing` and `reached` are the test's to set."""
    world = SimpleNamespace(capturing=False)
    Event.reached = False
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: world.capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kw: empty(*size, **kw))
    return world


class OnGpu:
    """A route that says it lies on a GPU."""

    device = torch.device("cuda")

    def __init__(self, *values: int) -> None:
        self.values = torch.tensor(values)

    def __ge__(self, other: int) -> torch.Tensor:
        return self.values >= other


@pytest.mark.parametrize(("values", "routed"), [((-1, -1), False), ((-1, 0), True), ((), False)])
def test_on_the_cpu_the_answer_is_there(values: tuple[int, ...], routed: bool) -> None:
    assert Glance(torch.tensor(values, dtype=torch.int32)).routed() is routed


@pytest.mark.parametrize("routed", [True, False])
def test_until_the_answer_arrives_rows_count_as_routed(gpu: SimpleNamespace, routed: bool) -> None:
    glance = Glance(OnGpu(-1, 0 if routed else -1))  # type: ignore[arg-type]
    assert glance.routed()
    Event.reached = True
    assert glance.routed() is routed


def test_a_captured_graph_always_contains_the_side_memory(gpu: SimpleNamespace) -> None:
    glance = Glance(OnGpu(-1))  # type: ignore[arg-type]
    Event.reached = True
    assert not glance.routed()
    gpu.capturing = True
    assert glance.routed()
    assert Glance(OnGpu(-1)).routed()  # type: ignore[arg-type]
    gpu.capturing = False
    assert not glance.routed()


def test_other_devices_are_not_looked_at() -> None:
    assert Glance(torch.zeros(2, dtype=torch.int32, device="meta")).routed()
