"""Captured rows: what training needs of a prompt and its target, and the grid they are replayed in.

A grid is [rows, width]; rows of fewer tokens are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Row:
    """One captured sequence of ``t`` tokens: a prompt, and the target's labels if it has any.

    ``activation`` [t, d_ff] enters the edited projection. ``base`` [t, d_model] is what the side
    memory's output is added to: block L's output, or (``inputs`` [t, d_model] given) the
    projection's, where block L does more than add it to the residual stream.
    ``labels`` are the token ids predicted from position ``prompt_length - 1`` onwards.
    ``cue`` [d_ff] enters the side memory with every token, besides its activation.
    """

    activation: Tensor
    base: Tensor
    inputs: Tensor | None
    prompt_length: int
    labels: Tensor
    cue: Tensor | None = None

    def __len__(self) -> int:
        return self.activation.shape[0]

    def entering(self) -> Tensor:
        """What enters the side memory [t, d_ff]."""
        return self.activation if self.cue is None else self.activation + self.cue


@dataclass(frozen=True)
class SuffixOutput:
    """Logits [n, vocabulary] at the label positions of all rows in order, the row each belongs to
    [n], its label [n], and each row's indicator [rows] (Eq. 3, mean over its prompt tokens)."""

    logits: Tensor
    row: Tensor
    labels: Tensor
    indicator: Tensor


class Replayed(NamedTuple):
    """What the suffix computes up to the output layer: ``hidden`` [n, d_model] at the label
    positions, ready for ``SuffixEngine.logits``; the rest as in ``SuffixOutput``."""

    hidden: Tensor
    row: Tensor
    labels: Tensor
    indicator: Tensor


def places_on_grid(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Flat positions [tokens] in a [rows, width] grid of the rows' real tokens, in order."""
    return torch.cat([torch.arange(n, device=device) + i * width for i, n in enumerate(lengths)])


def on_grid(tokens: Tensor, index: Tensor, rows: int, width: int) -> Tensor:
    """[tokens, d] into a zero-padded [rows, width, d]."""
    grid = tokens.new_zeros(rows * width, tokens.shape[-1])
    return grid.index_copy(0, index, tokens).view(rows, width, -1)


def label_positions(rows: Sequence[Row], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat grid positions [n] that predict a label, and the row each belongs to [n]."""
    flat = [
        torch.arange(len(r.labels), device=device) + i * width + r.prompt_length - 1
        for i, r in enumerate(rows)
    ]
    row = [torch.full((len(r.labels),), i, device=device) for i, r in enumerate(rows)]
    return torch.cat(flat), torch.cat(row)


def prompt_mean(rows: Sequence[Row], norms: Tensor) -> Tensor:
    """Mean of ``norms`` [tokens] over each row's prompt tokens -> [rows]."""
    parts = torch.split(norms, [len(r) for r in rows])
    return torch.stack([p[: r.prompt_length].mean() for p, r in zip(parts, rows, strict=True)])
