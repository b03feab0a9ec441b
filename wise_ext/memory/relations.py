"""Relations: what is asked about a subject, in whatever words and of whomever.

Two questions about one subject share its name, which is most of what a token key goes by. Here the
rest is compared: the mean over a prompt's tokens, those of its subject left out. How that mean
varies among wordings of one relation is whitened away (within-class covariance normalisation, as
speakers are told apart by, Hatch et al., 2006); what is kept are the directions in which relations
differ (Fisher, 1936). Both are measured, in closed form, on wordings of known relations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from wise_ext.memory.token_keys import TokenKeys, TokenMap

# Variation that the known wordings did not show, as a share of the mean of what they did.
_UNSEEN = 0.3
# Directions weaker than this, beside the strongest, are rounding.
_RANK = 1e-5
#: A question is within so many tokens of its subject's name. Templates and talk around it dilute
#: the mean, so of a query the likest of these neighbourhoods counts.
NEAR = (12, 6, 3)


class RelationMap(NamedTuple):
    """From the mean token of a wording to its relation: a direction in ``r`` dimensions.

    An empty map (``r == 0``) knows no relation and tells none apart.
    """

    centre: Tensor  # [d]
    project: Tensor  # [d, r]
    known: Tensor  # [R, r], of length 1: the relations it was fitted on

    @classmethod
    def empty(cls, dim: int) -> RelationMap:
        """The map that knows no relation."""
        return cls(torch.zeros(dim), torch.zeros(dim, 0), torch.zeros(0, 0))

    @classmethod
    def fit(cls, wordings: Tensor, labels: Tensor) -> RelationMap:
        """Fit on the mean tokens of wordings.

        Never forms a ``d x d`` matrix, so wide models cost no more than narrow ones.

        Args:
            wordings: ``[m, d]``, fp32 or fp64.
            labels: int64 ``[m]``, the relation of each, from 0 without gaps.

        Returns:
            The map; empty where there are fewer than two relations or nothing varies.
        """
        x, dim = wordings.double(), wordings.shape[1]
        count = torch.bincount(labels)
        if len(count) < 2:
            return cls.empty(dim)
        means = torch.zeros(len(count), dim, dtype=x.dtype).index_add_(0, labels, x)
        means = means / count.unsqueeze(1)
        centre = x.mean(0)
        within = x - means[labels]
        unseen = _UNSEEN * float(within.square().sum()) / (len(x) * dim)
        if unseen == 0.0:
            unseen = 1.0
        # within^T within / m = V diag(spread) V^T, by way of the small matrix of the rows.
        spread, rows = torch.linalg.eigh(within @ within.T / len(x))
        seen = spread > _RANK * spread[-1].clamp(min=1e-300)
        spread = spread[seen]
        axes = within.T @ rows[:, seen] / (len(x) * spread).sqrt()
        shrink = (unseen / (unseen + spread)).sqrt() - 1

        def whiten(y: Tensor) -> Tensor:
            white: Tensor = (y + ((y @ axes) * shrink) @ axes.T) / unseen**0.5
            return white

        apart = whiten(means - centre)
        # An orthonormal basis of what tells relations apart, one relation after another: unlike
        # singular vectors it hardly moves where rounding does.
        directions, part = torch.linalg.qr(apart.T)
        size = part.diagonal()
        kept = size.abs() > _RANK * size.abs().amax().clamp(min=1e-300)
        if not bool(kept.any()):
            return cls.empty(dim)
        # the whitening is symmetric: whitened directions project as whitened tokens would be
        project = whiten((directions * size.sign())[:, kept].T).T
        known = normalize((means - centre) @ project, dim=-1)
        return cls(centre.float(), _eleven_bits(project), _eleven_bits(known))

    def apply(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """What prompts ask, fp32 ``[B, q, r]``, of length 1, or zero where nothing is kept.

        Args:
            tokens: standardised, ``[B, t, d]``.
            kept: bool ``[B, q, t]``: the tokens of each question without those of its subject.
        """
        total = kept.float() @ tokens
        count = kept.sum(-1, keepdim=True)
        asked = (total / count.clamp(min=1) - self.centre) @ self.project
        return normalize(asked, dim=-1) * (count > 0)


def fit_relations(relations: Sequence[Sequence[TokenKeys]], tokens: TokenMap) -> RelationMap:
    """The map of these relations: of each, wordings that say which tokens name their subject.

    Raises:
        ValueError: a wording says nothing but its subject.
    """
    means, labels = [], []
    for number, wordings in enumerate(relations):
        for text in wordings:
            rest = text.activation[~text.named()]
            if not len(rest):
                raise ValueError("a wording says nothing but its subject")
            real = torch.ones(1, len(rest), dtype=torch.bool)
            means.append(tokens.tokens(rest[None], real)[0].mean(0))
            labels.append(number)
    if not means:
        return RelationMap.empty(len(tokens.mean))
    return RelationMap.fit(torch.stack(means), torch.tensor(labels))


def _eleven_bits(x: Tensor) -> Tensor:
    """fp32 with fp16's digits: the last bits of a factorisation differ from run to run, and a
    resumed run is to end in the same bytes."""
    scale = x.abs().amax().clamp(min=1e-300)
    # + 0.0: a zero has no sign to differ in
    return ((x / scale).half().float() * scale.float() + 0.0).contiguous()


def around(named: Tensor, real: Tensor) -> Tensor:
    """The real tokens near a subject's name but not of it, bool ``[B, len(NEAR), t]``.

    Args:
        named: bool ``[B, t]``: the tokens of the name.
        real: bool ``[B, t]``.
    """
    name = named.float().unsqueeze(1)
    near = [max_pool1d(name, 2 * n + 1, stride=1, padding=n) > 0 for n in NEAR]
    return torch.cat(near, dim=1) & (real & ~named).unsqueeze(1)
