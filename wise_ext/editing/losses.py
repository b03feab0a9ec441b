"""What an edit is trained on: its target's labels, and the margins that routing needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.editing.rows import SuffixOutput


class Margins(NamedTuple):
    """Eq. 5's bounds on the indicator: alpha for unrelated prompts, beta for edits, gamma apart."""

    alpha: float
    beta: float
    gamma: float


def label_loss(output: SuffixOutput, rows: int) -> Tensor:
    """-log p(target | prompt; side memory) of each row [rows], averaged over its labels.

    The mean, not the sum: a long target weighs no more than a short one.
    """
    losses = F.cross_entropy(output.logits, output.labels, reduction="none")
    counts = torch.bincount(output.row, minlength=rows)
    return losses.new_zeros(rows).index_add(0, output.row, losses) / counts


def margin_loss(edit: Tensor, unrelated: Tensor, margins: Margins) -> Tensor:
    """Eq. 5 for pairs of indicators [n]: ``max(0, r(loc) - alpha) + max(0, beta - r(edit)) +
    max(0, gamma - (r(edit) - r(loc)))``, one value a pair."""
    return (
        F.relu(unrelated - margins.alpha)
        + F.relu(margins.beta - edit)
        + F.relu(margins.gamma - (edit - unrelated))
    )


def greedy_by(output: SuffixOutput, margins: Tensor) -> Tensor:
    """Which rows [rows] bool have every label ahead of all other tokens by ``margins`` [rows], in
    logits."""
    failed = output.row[leads(output.logits, output.labels) < margins[output.row]]
    done = torch.ones(len(margins), dtype=torch.bool, device=failed.device)
    done[failed] = False
    return done


def leads(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much each label [n] is ahead of every other token of ``logits`` [n, vocabulary]."""
    label = labels[:, None]
    own = logits.gather(1, label).squeeze(1)
    return own - logits.scatter(1, label, -torch.inf).amax(1)
