"""Cues: a fixed random direction that stands for one edit, whatever words it is asked in.

A side memory learns its edits from activations, which say how a question is put as much as what it
asks: an answer practised after a statement is not found by a question. Where the router knows which
edit is asked for, that edit's cue enters the side memory with every token of the row, in training
as in use: ``D (a + s c)``. What ``D`` learns of ``c`` holds in any wording. No vector is stored: a
cue is made of a number, by whole-number arithmetic that is the same on every device.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_PRIME = 2**31 - 1
#: The number of no cue.
NO_CUE = 0


class Cues(NamedTuple):
    """How numbers become cues: random signs times ``size``, ``width`` of them."""

    size: float
    width: int

    def vectors(self, numbers: Tensor) -> Tensor:
        """The cues of these numbers.

        Args:
            numbers: int64 ``[B]`` in [0, 2^62); 0 for none.

        Returns:
            fp32 ``[B, width]``: each entry ``size`` or ``-size``; all 0 for number 0.
        """
        # A cubic over a prime field, cubed once more; no product leaves 62 bits.
        place = torch.arange(1, self.width + 1, device=numbers.device)
        low, high = numbers.unsqueeze(1) % _PRIME, numbers.unsqueeze(1) // _PRIME
        x = _cube((low * place + high) % _PRIME)
        x = _cube((x + high * place) % _PRIME)
        signs = torch.where(x < _PRIME // 2, self.size, -self.size)
        return torch.where(numbers.unsqueeze(1) == NO_CUE, 0.0, signs)


def cue_number(prompt: str) -> int:
    """The number, in [1, 2^62), of an edit with this prompt: one that answers the prompt anew takes
    the cue over."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return max(1, int.from_bytes(digest[:8], "big") >> 2)


def _cube(x: Tensor) -> Tensor:
    return x * x % _PRIME * x % _PRIME
