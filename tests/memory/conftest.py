"""Small shards and banks for the tests of the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wise_ext.memory import Shard, bits_to_bool, random_mask_bits


def _shard(
    seed: int = 0,
    shape: tuple[int, int] = (6, 40),
    ratio: float = 0.3,
    threshold: float = 0.0,
    ids: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Shard:
    bits = random_mask_bits(*shape, ratio, seed)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    masked = delta * bits_to_bool(bits, shape[1])
    return Shard.from_delta(masked.to(dtype), bits, threshold, ids or [f"edit-{seed}"], seed)


@pytest.fixture
def make_shard() -> Callable[..., Shard]:
    return _shard


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Random numbers of a shape, the same for the same seed."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make
