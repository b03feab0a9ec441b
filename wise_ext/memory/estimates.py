"""Indicators estimated from random projections, and how far an estimate may be off.

``S_i = R D_i`` with Gaussian ``R`` [r, d_out] of variance ``1/r`` gives, for a token ``a`` that
knows nothing of ``R``, ``||S_i a|| = X ||D_i a||`` with ``X`` the root of a chi-squared number over
its ``r`` degrees of freedom. The tokens of a prompt share ``R``, so their ``X`` depend on each
other; but whatever weights they have, ``E exp(l sum w_t X_t) <= E exp(l X)`` (Jensen). Chernoff's
bound for one token is therefore a bound for the mean over all of them, of any number.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.memory.bank import PackedBank
from wise_ext.memory.growing import Growing

#: rows of a projection that are looked at, first for every shard, then for those still open
LEVELS = (16, 32, 64, 256)
#: how likely one estimate lies below its band, and how likely above it
DOUBT = 1e-9
# What fp32 sums may add to that, relatively.
_ROUNDING = 1e-4


class Band(NamedTuple):
    """An estimate over the indicator lies within this, but for ``DOUBT`` on either side."""

    low: float
    high: float


@cache
def band(rows: int) -> Band:
    """How far the mean of norms estimated from so many rows of a projection may be off."""
    # The density of X on a grid, and with it the moments E exp(l X).
    x = torch.linspace(0, 1 + 12 / math.sqrt(rows), 20001, dtype=torch.float64)[1:]
    density = (rows - 1) * x.log() - rows * x.square() / 2
    density -= density.logsumexp(0)
    rates = math.sqrt(rows) * torch.logspace(-1, 1.5, 256, dtype=torch.float64).unsqueeze(1)
    below = (density - rates * x).logsumexp(1)
    above = (density + rates * x).logsumexp(1)
    rates = rates.squeeze(1)
    low = ((math.log(DOUBT) - below) / rates).max()
    high = ((above - math.log(DOUBT)) / rates).min()
    return Band(max(float(low), 0.0) * (1 - _ROUNDING), float(high) * (1 + _ROUNDING))


class Sketches(Growing):
    """Random projections of every shard of a bank, as many rows as ``LEVELS`` says.

    Args:
        bank: the shards.
        seed: of the projection. What is decided does not depend on it, only what that costs.
    """

    def __init__(self, bank: PackedBank, seed: int = 0) -> None:
        super().__init__()
        # In a tuple, since the bank is no part of this; editing patches often and decides rarely.
        self._bank, self._seed = (bank,), seed

    def held(self) -> dict[str, Tensor]:
        """The projections, by level: made when they are first asked for."""
        if not self._names:
            self._project(*self._bank)
        return super().held()

    def _project(self, bank: PackedBank) -> None:
        device, most = bank.values.device, LEVELS[-1]
        draw = torch.Generator().manual_seed(self._seed)
        projection = torch.randn(most, bank.shape[0], generator=draw).to(device)
        rows = torch.empty(bank.num_shards, most, bank.shape[1], device=device)
        for shard in range(bank.num_shards):
            torch.mm(projection, bank.dense(shard), out=rows[shard])
        # Apart, so that each level's can be read as they lie.
        sizes = [stop - start for start, stop in pairwise((0, *LEVELS))]
        parts = rows.split(sizes, dim=1)
        self.hold(**{f"level_{n}": part.contiguous() for n, part in enumerate(parts)})

    @staticmethod
    def pay(bank: PackedBank) -> bool:
        """Whether shards have more values than projections of so many rows, and lie where values
        can be looked at."""
        entries = LEVELS[-1] * bank.shape[1] * bank.num_shards
        return bank.values.shape[0] > entries and bank.values.device.type == "cpu"

    def narrow(self, a: Tensor, real: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the indicators of some prompts as far as it takes to decide, or is possible.

        Args:
            a: ``[B, T, d_in]``.
            real: bool ``[B, T]``: the tokens that count.
            thresholds: fp32 ``[k]``.

        Returns:
            A lower bound of every indicator, fp32 ``[B, k]``, and which have to be worked out,
            bool ``[B, k]``: put in the place of their bounds, they decide as all of them would.
            Rows whose estimates overflow are left open.
        """
        batch, shards = real.shape[0], thresholds.shape[0]
        x, row = _those(a.flatten(0, 1), real.flatten()), real.nonzero()[:, 0]
        count = real.sum(1, keepdim=True).clamp(min=1)
        low = torch.zeros(batch, shards, device=a.device)
        high = torch.full_like(low, torch.inf)
        squares = torch.zeros(len(x), shards, device=a.device)
        still = real.any(1, keepdim=True).expand(batch, shards)
        overflow = torch.zeros_like(still[:, :1])
        for level, sketch in zip(LEVELS, self.held().values(), strict=True):
            # Rows and shards still open are among those of the level before.
            rows, columns = still.any(1), still.any(0)
            if not bool(columns.any()):
                break
            tokens = rows[row]
            norms = ops.sketch_norm(_those(x, tokens), _those(sketch, columns))
            squares[tokens.unsqueeze(1) & columns] += norms.square().flatten()
            means = torch.zeros_like(low).index_add_(0, row, (squares / level).sqrt()) / count
            seen = rows.unsqueeze(1) & columns
            bounds = band(level)
            low = torch.where(seen, torch.maximum(low, means / bounds.high), low)
            high = torch.where(seen, torch.minimum(high, means / bounds.low), high)
            overflow = overflow | (seen & ~means.isfinite()).any(1, keepdim=True)
            still = still & ~overflow & undecided(low, high, thresholds)
        return low, still | overflow


def _those(values: Tensor, wanted: Tensor) -> Tensor:
    """``values[wanted]``, and no copy where that is all of them."""
    return values if bool(wanted.all()) else values[wanted]


def undecided(low: Tensor, high: Tensor, thresholds: Tensor) -> Tensor:
    """Which indicators, bool ``[B, k]``, have to be known better to decide a row: those that may
    be the largest, unless no such one can lie above its threshold, or the only one does.

    Args:
        low, high: what indicators lie between, fp32 ``[B, k]``.
        thresholds: fp32 ``[k]``.
    """
    may = high >= low.amax(1, keepdim=True)
    none = (~may | (high <= thresholds)).all(1)
    one = (may.sum(1) == 1) & (may & (low > thresholds)).any(1)
    return may & ~(none | one).unsqueeze(1)
