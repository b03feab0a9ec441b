"""Comparing prompts with stored edits: tensor operations alone, every row for itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.memory import looks
from wise_ext.memory.relations import RelationMap, around
from wise_ext.memory.token_keys import TokenMap

# Scores closer than fp32 can tell apart are ties, and the latest edit wins them.
_TIE = 1e-5
# A token of a query with this cosine to one of a subject's name is that name (measured: from .3 to
# .7 it makes no difference).
_SAME_WORD = 0.5
# An edit may be passed over for another relation; so many of the best entries are looked at.
_CANDIDATES = 6
# A question that is like nothing that is known is doubted, too: this share of the likeness to the
# edit's own relation counts once more (measured; docs/architecture.md).
_LIKENESS = 0.5
# Of edits that a query may ask for (of one subject, say) the one that asks the likest thing: what
# that likeness counts beside the score.
_PREFERENCE = 0.1


class PreparedKeys(NamedTuple):
    """All that a comparison needs, as tensors."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    signs: Tensor  # [2 d, width]
    centre: Tensor  # [d]
    project: Tensor  # [d, r]
    known: Tensor  # [R, r]
    keys: Tensor  # int8 [M, width]
    scales: Tensor  # [M], which make keys of length 1 of them
    places: Tensor  # int32 [n, m]: an edit's keys, the heaviest first; -1 where it has fewer
    weights: Tensor  # [n, m], each edit's sum to 1
    named: Tensor  # bool [n, m]: the tokens of the subject's name
    asked: Tensor  # [n, r], of length 1, or zero where it is not known what an edit asks
    shards: Tensor  # int32 [n]
    numbers: Tensor  # int64 [n], of each edit's cue

    def match(self, activation: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best of ``n >= 1`` stored edits by its token keys, whatever it asks.

        Args:
            activation: of the query's tokens, ``[B, w, d]``.
            real: bool ``[B, w]``; the others count for nothing.

        Returns:
            The score, fp32 ``[B]`` in [0, 1], and the stored row, int64 ``[B]`` (of equally good
            ones the one stored last).
        """
        return _last_of_best(self.scores(activation, real))

    def find(self, activation: Tensor, real: Tensor, radius: float, lead: float) -> Tensor:
        """Find the stored edit that each query asks for.

        Args:
            activation, real: as for ``match``.
            radius: score that an edit must exceed.
            lead: an edit is passed over if the cosine of the query's wording to another known
                relation, less one and a half times that to the edit's own, is more than this.

        Returns:
            The stored row, int64 ``[B]``, or -1 where there is none. Of several the one with the
            best score, its likeness to what is asked counting along.
        """
        map_ = TokenMap(self.mean, self.scale, self.signs)
        tokens = map_.tokens(activation, real)
        query = map_.keys(tokens, real)
        # an edit at the radius may tie with one above it
        floor = radius - _TIE
        scores = self._scores(query, floor)
        stored, candidates = torch.arange(scores.shape[1], device=scores.device), _CANDIDATES
        if looks.at_hand(scores):
            stored = (scores > floor).any(0).nonzero().squeeze(1)
            if not len(stored):
                return stored.new_full((len(scores),), -1)
            scores, candidates = scores[:, stored], min(candidates, len(stored))
        bests, rows = [], []
        for _ in range(candidates):  # of fewer, some are looked at again, in vain
            best, place = _last_of_best(scores)
            bests.append(best)
            rows.append(stored[place])
            scores = scores.scatter(1, place.unsqueeze(1), -1.0)
        others, likenesses = self._asked(tokens, query, real, torch.stack(rows, 1))
        found = torch.full_like(rows[0], -1)
        standing = torch.full_like(bests[0], -torch.inf)
        told = zip(bests, rows, others.unbind(1), likenesses.unbind(1), strict=True)
        for best, row, other, likeness in told:
            rank = best + _PREFERENCE * likeness
            fits = (best > radius) & (other - (1 + _LIKENESS) * likeness <= lead)
            fits &= rank > standing + _TIE
            found = torch.where(fits, row, found)
            standing = torch.where(fits, rank, standing)
        return found

    def scores(self, activation: Tensor, real: Tensor, floor: float = -1.0) -> Tensor:
        """The score of every stored edit, fp32 ``[B, n]``, or 0 where it is not above ``floor``;
        arguments as for ``match``."""
        map_ = TokenMap(self.mean, self.scale, self.signs)
        return self._scores(map_.apply(activation, real), floor)

    def keys_of(self, rows: Tensor) -> Tensor:
        """The keys of stored edits, int64 ``[...]``: fp32 ``[..., m, width]``, of length 1, or zero
        where an edit has fewer."""
        places = self.places[rows]
        scales = torch.where(places >= 0, self.scales[places.clamp(min=0)], 0.0)
        return self.keys[places.clamp(min=0)].float() * scales.unsqueeze(-1)

    def _scores(self, query: Tensor, floor: float) -> Tensor:
        """The same, by the query's keys ``[B, w, width]``."""
        return ops.max_sim(query, self.keys, self.scales, self.places, self.weights, floor)

    def _asked(
        self, tokens: Tensor, query: Tensor, real: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How like what is asked is to another known relation, at best, and to that of the stored
        ``rows`` [B, c]: cosines, fp32 ``[B, c]``; minus infinity and 0 where that cannot be told.
        """
        if not self.known.shape[0]:
            nothing = torch.zeros_like(rows, dtype=query.dtype)
            return torch.full_like(nothing, -torch.inf), nothing
        batch, count = rows.shape
        cosines = query.unsqueeze(1) @ self.keys_of(rows).transpose(2, 3)
        named = (cosines * self.named[rows].unsqueeze(2)).amax(-1) > _SAME_WORD
        each = real.repeat_interleave(count, 0)
        kept = around(named.flatten(0, 1), each).view(batch, count, -1)
        asks = RelationMap(self.centre, self.project, self.known).apply(tokens, kept)
        own = self.asked[rows]
        likeness = (asks * own).sum(-1)
        other = (asks @ self.known.T).amax(-1)
        told = kept.any(-1) & (own != 0).any(-1)
        return torch.where(told, other, -torch.inf), torch.where(told, likeness, 0.0)


def _last_of_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of ``[B, n]``, and the last place where it stands."""
    best = scores.amax(-1)
    order = torch.arange(scores.shape[1], device=scores.device)
    near = torch.where(scores >= best.unsqueeze(-1) - _TIE, order, 0)
    return best, near.amax(-1)
