"""Losses against their formulas, worked by hand."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from wise_ext.editing.losses import Margins, greedy_by, label_loss, margin_loss
from wise_ext.editing.rows import SuffixOutput


def _output(logits: list[list[float]], row: list[int], labels: list[int]) -> SuffixOutput:
    rows = max(row) + 1
    return SuffixOutput(
        torch.tensor(logits), torch.tensor(row), torch.tensor(labels), torch.zeros(rows)
    )


def test_label_loss_averages_over_a_rows_labels() -> None:
    logits = [[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]]
    output = _output(logits, [0, 0, 1], [0, 2, 1])
    logp = torch.tensor(logits).log_softmax(-1)
    expected = torch.stack([-(logp[0, 0] + logp[1, 2]) / 2, -logp[2, 1]])
    assert_close(label_loss(output, 2), expected)


def test_margin_loss_is_equation_5() -> None:
    margins = Margins(alpha=5.0, beta=20.0, gamma=10.0)
    edit = torch.tensor([25.0, 18.0, 6.0])
    unrelated = torch.tensor([4.0, 9.0, 6.0])
    # (0 + 0 + 0), (4 + 2 + 1), (1 + 14 + 10)
    assert margin_loss(edit, unrelated, margins).tolist() == [0.0, 7.0, 25.0]


def test_greedy_by_needs_every_label_ahead() -> None:
    logits = [[2.0, 0.0], [0.5, 0.0], [0.0, 3.0]]
    output = _output(logits, [0, 1, 1], [0, 0, 1])
    assert greedy_by(output, torch.tensor([1.0, 1.0])).tolist() == [True, False]
    assert greedy_by(output, torch.tensor([1.0, 0.5])).tolist() == [True, True]
    assert greedy_by(output, torch.tensor([2.5, 0.5])).tolist() == [False, True]
