"""Where a look at a tensor's values is free."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wise_ext.memory import looks


def test_only_on_the_host_and_outside_of_graphs() -> None:
    seen: list[bool] = []

    def looked(x: torch.Tensor) -> torch.Tensor:
        seen.append(looks.at_hand(x))
        return x + 1 if looks.at_hand(x) else x - 1

    assert looks.at_hand(torch.zeros(1))
    with FakeTensorMode():
        assert not looks.at_hand(torch.zeros(1, device="cuda"))
    compiled = torch.compile(looked, backend="eager", fullgraph=False)
    assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))
