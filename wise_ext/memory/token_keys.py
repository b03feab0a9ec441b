"""Token keys: what a prompt is recognised by, token by token.

The FFN activation of an early layer says which token stands there and little else. Standardised by
what neutral text shows, two of them have a cosine near one when they stand for the same word. A key
is such a token with a hint of the one before it: the digits of a number, scattered over a table,
are not that number. Keys are kept apart and never averaged: in a long prompt a mean drowns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from wise_ext.memory.randomness import BitStream

#: A prompt is recognised by its last tokens: the question is at its end, whatever came before.
WINDOW = 64
# What the token before counts in a key (measured; docs/architecture.md).
_BEFORE = 0.5


class TokenKeys(NamedTuple):
    """The tokens that a prompt is recognised by: ids int64 ``[t]``, activations fp32 ``[t, d]``,
    and, where it is known, which of them name the subject, bool ``[t]``."""

    ids: Tensor
    activation: Tensor
    subject: Tensor | None = None

    def named(self) -> Tensor:
        """Which tokens name the subject, bool ``[t]``; none where that is not known."""
        if self.subject is None:
            return torch.zeros(len(self.ids), dtype=torch.bool)
        return self.subject

    def last(self) -> TokenKeys:
        """The last ``WINDOW`` of them."""
        subject = None if self.subject is None else self.subject[-WINDOW:]
        return TokenKeys(self.ids[-WINDOW:], self.activation[-WINDOW:], subject)


class TokenMap(NamedTuple):
    """Activations to keys: standardise each coordinate, add the token before, project."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    signs: Tensor  # [2 d, width]; [2 d, 0] where keys are not projected

    def apply(self, activation: Tensor, real: Tensor) -> Tensor:
        """Keys fp32 ``[B, t, width]``, of length 1, of consecutive tokens.

        Args:
            activation: ``[B, t, d]``.
            real: bool ``[B, t]``; the others have zero keys, whatever they hold.
        """
        return self.keys(self.tokens(activation, real), real)

    def tokens(self, activation: Tensor, real: Tensor) -> Tensor:
        """Standardised tokens, fp32 ``[B, t, d]`` of length 1; arguments as for ``apply``."""
        x = torch.where(real.unsqueeze(-1), activation.float() - self.mean, 0.0) * self.scale
        return normalize(x, dim=-1)

    def keys(self, tokens: Tensor, real: Tensor) -> Tensor:
        """The keys of standardised tokens; see ``apply``."""
        if not self.signs.shape[1]:
            before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
            key = torch.cat([tokens, _BEFORE * before], dim=-1)
        else:  # the token before is moved when it is short
            own, other = self.signs.split(tokens.shape[-1])
            before = _BEFORE * (tokens @ other)
            key = tokens @ own
            key[:, 1:] += before[:, :-1]
        return normalize(torch.where(real.unsqueeze(-1), key, 0.0), dim=-1)


def standardise(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and one over the standard deviation of each coordinate of ``[m, d]``, fp32 ``[d]``.

    A coordinate that hardly varies is not blown up, and without at least two rows nothing is done.
    """
    d = activation.shape[1]
    if len(activation) < 2:
        return torch.zeros(d), torch.ones(d)
    wide = activation.double()
    deviation = wide.std(0, correction=0)
    floor = 1e-3 * float(deviation.square().mean().sqrt())
    if floor == 0.0:
        return wide.mean(0).float(), torch.ones(d)
    return wide.mean(0).float(), deviation.clamp(min=floor).reciprocal().float()


def random_signs(dim: int, width: int, seed: int) -> Tensor:
    """Random signs over ``sqrt(width)``, fp32 ``[dim, width]``: lengths keep their mean.

    ``[dim, 0]`` where ``width`` would not make keys shorter.
    """
    if width >= dim:
        return torch.zeros(dim, 0)
    positive = torch.from_numpy(BitStream(seed).bernoulli(dim * width, 0.5)).view(dim, width)
    return torch.where(positive, 1.0, -1.0) / math.sqrt(width)


def last_tokens(activation: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the last ``WINDOW`` real tokens of each row, in tensor operations alone.

    Args:
        activation: ``[B, T, d]``.
        real: bool ``[B, T]``; pads may stand anywhere.

    Returns:
        ``[B, w, d]`` in order, with ``w = min(T, WINDOW)``, and which of them there are, bool
        ``[B, w]``.
    """
    tokens = real.shape[1]
    places = torch.where(real, torch.arange(tokens, device=real.device), -1)
    chosen = places.topk(min(tokens, WINDOW), dim=1).values.flip(1)
    index = chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, activation.shape[-1])
    return activation.gather(1, index), chosen >= 0
