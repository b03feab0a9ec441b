"""The settings that ours and the composites share."""

from __future__ import annotations

from typing import NamedTuple


class Adam(NamedTuple):
    """Of masked_update_ and of torch's optimizers; `step` is the one to take, from 1."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    step: int = 3


ADAM = Adam()
TIES_DENSITY = 0.2
