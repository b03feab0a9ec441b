"""Whether a decision may depend on what a tensor holds."""

from __future__ import annotations

import torch
from torch import Tensor


def at_hand(values: Tensor) -> bool:
    """Whether a look at them costs nothing: they lie on the host, and no graph is being traced.

    What is decided may never depend on it, only how much is worked out.
    """
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
