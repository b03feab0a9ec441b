"""Comparing prompts with stored edits: tensor operations alone, every row for itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext.memory.relations import RelationMap, around
from wise_ext.memory.token_keys import TokenMap

# Scores closer than fp32 can tell apart are ties, and the latest edit wins them.
_TIE = 1e-5
# Stored keys compared at a time, so that long prompts stay small.
_CHUNK = 4096
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
    keys: Tensor  # [n, m, width], of length 1, or zero where an edit has fewer tokens
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
        scores = self._scores(query)
        found = torch.full_like(scores[:, 0], -1, dtype=torch.int64)
        standing = torch.full_like(scores[:, 0], -torch.inf)
        for _ in range(min(_CANDIDATES, self.keys.shape[0])):
            best, row = _last_of_best(scores)
            other, likeness = self._asked(tokens, query, real, row)
            rank = best + _PREFERENCE * likeness
            fits = (best > radius) & (other - (1 + _LIKENESS) * likeness <= lead)
            fits &= rank > standing + _TIE
            found = torch.where(fits, row, found)
            standing = torch.where(fits, rank, standing)
            scores = scores.scatter(1, row.unsqueeze(1), -1.0)
        return found

    def scores(self, activation: Tensor, real: Tensor) -> Tensor:
        """The score of every stored edit, fp32 ``[B, n]``; arguments as for ``match``."""
        return self._scores(TokenMap(self.mean, self.scale, self.signs).apply(activation, real))

    def _scores(self, query: Tensor) -> Tensor:
        """The same, by the query's keys ``[B, w, width]``."""
        # A zero key has cosine 0 with everything, which is where cosines are cut off.
        batch, tokens, width = query.shape
        query = query.reshape(batch * tokens, width)
        n, m, _ = self.keys.shape
        step = max(1, _CHUNK // m)
        parts = []
        for start in range(0, n, step):
            keys = self.keys[start : start + step]
            cosines = query @ keys.reshape(-1, width).T
            best = cosines.view(batch, tokens, -1).amax(1).clamp(min=0)
            best = best.view(batch, keys.shape[0], m)
            parts.append((best * self.weights[start : start + step]).sum(-1))
        return torch.cat(parts, dim=1)

    def _asked(
        self, tokens: Tensor, query: Tensor, real: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How like what is asked is to another known relation, at best, and to that of the stored
        ``row``: cosines, fp32 ``[B]``; minus infinity and 0 where that cannot be told."""
        if not self.known.shape[0]:
            return torch.full_like(query[:, 0, 0], -torch.inf), torch.zeros_like(query[:, 0, 0])
        cosines = query @ self.keys[row].transpose(1, 2)
        named = (cosines * self.named[row].unsqueeze(1)).amax(-1) > _SAME_WORD
        kept = around(named, real)
        asks = RelationMap(self.centre, self.project, self.known).apply(tokens, kept)
        own = self.asked[row]
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
