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
from torch.nn.functional import normalize, pad

from wise_ext.memory.token_keys import TokenKeys, TokenMap

# Variation that the known wordings did not show, as a share of the mean of what they did.
_UNSEEN = 0.3
# Directions weaker than this, beside the strongest, are rounding.
_RANK = 1e-5
# A question is within so many tokens of its subject's name (measured; docs/architecture.md).
_NEAR = 10


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
        """What prompts ask, fp32 ``[B, r]``, of length 1, or zero where nothing is kept.

        Args:
            tokens: standardised, ``[B, t, d]``.
            kept: bool ``[B, t]``: the tokens of each question without those of its subject; or
                ``[B, c, t]``, ``c`` such choices a question, for ``[B, c, r]``.
        """
        asked = (mean_of(tokens, kept) - self.centre) @ self.project
        return normalize(asked, dim=-1) * kept.any(-1, keepdim=True)


def fit_relations(relations: Sequence[Sequence[TokenKeys]], tokens: TokenMap) -> RelationMap:
    """The map of these relations: of each, wordings that say which tokens name their subject.

    Raises:
        ValueError: a wording says nothing but its subject.
    """
    means, labels = [], []
    for number, wordings in enumerate(relations):
        for text in wordings:
            named = text.named().unsqueeze(0)
            real = torch.ones_like(named)
            kept = around(named, real) if bool(named.any()) else real
            if not bool(kept.any()):
                raise ValueError("a wording says nothing but its subject")
            means.append(mean_of(tokens.tokens(text.activation[None], real), kept)[0])
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


def mean_of(tokens: Tensor, kept: Tensor) -> Tensor:
    """The mean ``[B, d]`` of those tokens ``[B, t, d]`` that are kept, bool ``[B, t]``, or zero; or
    means ``[B, c, d]`` of ``c`` choices, bool ``[B, c, t]``."""
    chosen = kept.float() if kept.dim() == 3 else kept.float().unsqueeze(1)
    total = (chosen @ tokens).view(*kept.shape[:-1], -1)
    return total / kept.sum(-1, keepdim=True).clamp(min=1)


def around(named: Tensor, real: Tensor) -> Tensor:
    """The real tokens near a subject's name but not of it, bool ``[B, t]``.

    Args:
        named: bool ``[B, t]``: the tokens of the name.
        real: bool ``[B, t]``.
    """
    # named tokens within the window, by differences of running counts
    window = 2 * _NEAR + 1
    count = pad(named.int(), (_NEAR + 1, _NEAR)).cumsum(-1)
    near = count[:, window:] > count[:, :-window]
    return near & real & ~named
