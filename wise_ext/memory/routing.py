"""Routers: which shard, if any, answers a prompt.

A router sees the activation entering the down projection of *its* layer and gives each row of the
batch a route: a shard, or -1 for main memory. Rows never influence one another, and ``decide``
consists of tensor operations, so that ``torch.compile`` can trace it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from wise_ext.memory import looks
from wise_ext.memory.bank import PackedBank
from wise_ext.memory.column_bank import ColumnBank
from wise_ext.memory.cues import NO_CUE, Cues
from wise_ext.memory.estimates import Sketches
from wise_ext.memory.growing import Growing
from wise_ext.memory.key_index import KeyIndex
from wise_ext.memory.matching import PreparedKeys
from wise_ext.memory.relations import RelationMap
from wise_ext.memory.token_keys import TokenMap, last_tokens

MAIN = -1


class Decision(NamedTuple):
    """Where rows go: ``route`` int32 ``[B]``, a shard, or -1 for main memory; and the number of the
    cue that enters the shard with them, ``cue`` int64 ``[B]``, ``NO_CUE`` for none."""

    route: Tensor
    cue: Tensor


@runtime_checkable
class Router(Protocol):
    """What a patched model asks of a router.

    Attributes:
        layer: module path of the down projection whose input decides.
        cues: what the numbers of cues stand for; None where it knows shards only, not edits.
    """

    layer: str
    cues: Cues | None

    def decide(self, a: Tensor, real: Tensor) -> Decision:
        """Return the route of each row.

        Args:
            a: activation entering ``layer``, fp32, bf16 or fp16 ``[B, T, d_in]``.
            real: bool ``[B, T]``: the tokens that decide (the prompt's, pads left out).

        Returns:
            A row without a real token goes to main memory.
        """
        ...

    def become(self, other: Any) -> None:
        """Know what another router of the same kind knows, and nothing else."""
        ...


class IndicatorRouter(Growing):
    """The paper's router (Eq. 3, 6): the shard with the largest indicator, if above its threshold.

    The indicator of shard ``i`` is the mean over the real tokens of ``||D_i a_t||_2``. Of equal
    indicators the first shard counts; an indicator equal to the threshold goes to main memory.

    Where a decision may look at values, indicators are estimated first, and only those worked out
    that the estimates leave open (``Sketches``, also for how sure that is): the decision is the
    same.

    Args:
        layer: module path of the edited down projection.
        bank: the shards; it may be the very bank that the patched layer uses.
        thresholds: one a shard, ``act_ratio`` included.
        estimate: whether to; by default where shards are so large that it pays.

    Attributes:
        pairs: prompts' tokens times shards that were to be decided about.
        exact: of these, those whose norm was worked out.

    Raises:
        ValueError: the number of thresholds is not the number of shards.
    """

    thresholds: Tensor
    cues: Cues | None = None

    def __init__(
        self,
        layer: str,
        bank: PackedBank | ColumnBank,
        thresholds: Sequence[float],
        estimate: bool | None = None,
    ) -> None:
        super().__init__()
        if len(thresholds) != bank.num_shards:
            raise ValueError(f"{bank.num_shards} shards need as many thresholds")
        self.layer = layer
        self.bank = bank
        values = torch.tensor(list(thresholds), dtype=torch.float32, device=bank.values.device)
        self.hold(thresholds=values)
        self.sketches = None
        if isinstance(bank, PackedBank) and (Sketches.pay(bank) if estimate is None else estimate):
            self.sketches = Sketches(bank)
        self.pairs = self.exact = 0

    def become(self, other: Any) -> None:
        """See ``Growing.become``."""
        super().become(other)
        self.sketches = other.sketches

    def indicators(self, a: Tensor, real: Tensor) -> Tensor:
        """Return every shard's indicator, fp32 ``[B, k]``; arguments as for ``decide``."""
        batch, tokens, width = a.shape
        count = self.bank.num_shards
        device = a.device
        rows = torch.arange(batch * tokens, dtype=torch.int32, device=device)
        shards = torch.arange(count, dtype=torch.int32, device=device)
        norms = self.bank.side_norm(
            a.reshape(batch * tokens, width),
            rows.repeat_interleave(count),
            shards.repeat(batch * tokens),
        )
        return _mean(norms.view(batch, tokens, count), real)

    def decide(self, a: Tensor, real: Tensor) -> Decision:
        """See ``Router.decide``."""
        if self.bank.num_shards == 0:
            return _all_main(a)
        if self.thresholds.device != a.device:
            self.to(a.device)
        if self.sketches is not None and looks.at_hand(a):
            indicators = self._estimated(a, real, self.sketches)
        else:
            indicators = self.indicators(a, real)
        best = indicators.argmax(-1)
        largest = indicators.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        inside = (largest > self.thresholds[best]) & real.any(-1)
        return uncued(torch.where(inside, best, MAIN).to(torch.int32))

    def _estimated(self, a: Tensor, real: Tensor, sketches: Sketches) -> Tensor:
        """What decides as the indicators do: those that matter, and lower bounds of the others."""
        low, still = sketches.narrow(a, real, self.thresholds)
        pairs = (real.unsqueeze(-1) & still.unsqueeze(1)).nonzero()
        self.pairs += int(real.sum()) * self.bank.num_shards
        self.exact += len(pairs)
        row, token, shard = pairs.unbind(1)
        place = (row * a.shape[1] + token).to(torch.int32)
        norms = torch.zeros(*real.shape, self.bank.num_shards, device=a.device)
        norms[row, token, shard] = self.bank.side_norm(
            a.flatten(0, 1), place, shard.to(torch.int32)
        )
        return torch.where(still, _mean(norms, real), low)


class KeyRouter(Growing):
    """The key index as a router: the shard of the stored edit that is asked for, if any is.

    A prompt is recognised by its last ``WINDOW`` tokens.

    Holds a copy of what the index knows when the router is made; a later change of the index
    needs a new router.

    Args:
        layer: module path of the down projection whose input is the key.
        index: the stored keys.
        radius: score above which a prompt may belong to an edit; equal goes to main.
        lead: an edit is passed over where another relation is nearer to the prompt's wording than
            its own by more than this; see ``PreparedKeys.find``. 3 passes over none.
        cues: what the index's numbers stand for; None gives no cues.
    """

    fixed = frozenset((*TokenMap._fields, *RelationMap._fields))
    shards: Tensor
    keys: Tensor
    places: Tensor
    numbers: Tensor

    def __init__(
        self,
        layer: str,
        index: KeyIndex,
        radius: float,
        lead: float = 3.0,
        cues: Cues | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.cues = cues
        self.radius, self.lead = float(radius), float(lead)
        self.hold(**index.prepare()._asdict())

    @property
    def prepared(self) -> PreparedKeys:
        """What prompts are compared with."""
        return PreparedKeys(*(getattr(self, name) for name in PreparedKeys._fields))

    def become(self, other: Any) -> None:
        """See ``Growing.become``."""
        super().become(other)
        self.radius, self.lead, self.cues = other.radius, other.lead, other.cues

    def nearest(self, a: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best edit's score, fp32 ``[B]``, and its row in the index, int64 ``[B]``,
        whatever the prompt asks."""
        return self.prepared.match(*last_tokens(a, real))

    def decide(self, a: Tensor, real: Tensor) -> Decision:
        """See ``Router.decide``."""
        if self.places.shape[0] == 0:
            return _all_main(a)
        if self.keys.device != a.device:
            self.to(a.device)
        row = self.prepared.find(*last_tokens(a, real), self.radius, self.lead)
        inside = (row >= 0) & real.any(-1)
        row = row.clamp(min=0)
        route = torch.where(inside, self.shards[row], MAIN).to(torch.int32)
        if self.cues is None:
            return uncued(route)
        return Decision(route, torch.where(inside, self.numbers[row], NO_CUE))


def _mean(norms: Tensor, real: Tensor) -> Tensor:
    """The mean of ``[B, T, k]`` over the real tokens ``[B, T]``."""
    kept = torch.where(real.unsqueeze(-1), norms, 0.0)
    return kept.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def _all_main(a: Tensor) -> Decision:
    return uncued(torch.full((a.shape[0],), MAIN, dtype=torch.int32, device=a.device))


def uncued(route: Tensor) -> Decision:
    """These routes, int32 ``[B]``, without cues."""
    return Decision(route, torch.full_like(route, NO_CUE, dtype=torch.int64))
