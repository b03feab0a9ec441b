"""What a stored token counts: rare ones much, and of an edit that names its subject, the name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tokens of an edit that are compared: its subject's, then the rarest.
_COMPARED = 8
# Rarity, in [0, 1], is taken to this power; this share of the score looks at all tokens alike and
# tells the edits of one subject apart. Both measured (docs/architecture.md).
_POWER, _EVEN = 3, 0.15
_LEAST_RARITY = 0.02


def rarity(tokens: Tensor, edit: Tensor, common: Tensor, texts: int) -> Tensor:
    """How rare each stored token is, fp32 ``[M]`` in [0.02, 1]: one minus log of the texts that
    hold it over log of all texts. An edit's own prompt does not make its tokens common.

    Args:
        tokens: their ids, integers ``[M]``.
        edit: the number of the edit that each belongs to, int64 ``[M]``, from 0 without gaps;
            every edit counts as one text, in however many wordings.
        common: int64 ``[u, 2]``: token ids of the neutral texts, and how many of these hold each.
        texts: neutral texts in all.
    """
    edits = int(edit.max()) + 1 if len(edit) else 0
    each = torch.unique(tokens.long() * edits + edit) // max(edits, 1)  # one number a pair
    seen = torch.cat([each, common[:, 0].repeat_interleave(common[:, 1])])
    token, count = torch.unique(seen, return_counts=True)
    holding = count[torch.searchsorted(token, tokens.long())]
    rare: Tensor = 1 - holding.float().log() / math.log(max(2, texts + edits))
    return rare.clamp(min=_LEAST_RARITY)


def weigh(rare: Tensor, named: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of each entry are compared, and what they count.

    Args:
        rare: fp32 ``[n, m]``, zero where there is no token.
        named: bool ``[n, m]``: tokens of the subject's name; an entry without any weighs all.
        there: bool ``[n, m]``.

    Returns:
        Their places in the entry, int64 ``[n, k]``, and their weights, fp32 ``[n, k]``, which sum
        to 1 in every entry.
    """
    telling = (named | ~named.any(1, keepdim=True)).float()
    order = (telling + rare).argsort(stable=True, dim=1, descending=True)[:, :_COMPARED]
    weights, even = (telling * rare**_POWER).gather(1, order), there.gather(1, order)
    weights = (1 - _EVEN) * weights / weights.sum(1, keepdim=True)
    return order, weights + _EVEN * even / even.sum(1, keepdim=True)
