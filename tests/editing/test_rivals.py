from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from wise_ext.editing.losses import greedy_by
from wise_ext.editing.rivals import Rivals
from wise_ext.editing.rows import Replayed, Row, SuffixOutput

VOCABULARY, WIDTH = 500, 16


class _Engine:
    """The output layer alone, counting the logits it computes."""

    takes_tokens = True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.computed = 0

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if tokens is None else self.weight[tokens]
        self.computed += len(hidden) * len(weight)
        return F.linear(hidden, weight)


def _replayed(engine: _Engine, right: list[bool], seed: int = 1) -> Replayed:
    """Two positions a row; a row that is right points at its labels."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(len(right)).repeat_interleave(2)
    labels = torch.randint(0, VOCABULARY, (len(row),), generator=generator)
    hidden = torch.randn(len(row), WIDTH, generator=generator)
    aimed = 3 * engine.weight[labels]
    hidden = torch.where(torch.tensor(right)[row].unsqueeze(1), aimed, hidden)
    return Replayed(hidden.requires_grad_(), row, labels, torch.zeros(len(right)))


def _rows(count: int) -> list[Row]:
    return [SimpleNamespace() for _ in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(5))
def test_what_passes_passes_against_the_whole_vocabulary(seed: int) -> None:
    engine = _Engine()
    rows, rivals = _rows(6), Rivals(engine)  # type: ignore[arg-type]
    for right in ([False] * 6, [True, False] * 3, [True] * 6):
        replayed = _replayed(engine, right, seed)
        full = SuffixOutput(engine.logits(replayed.hidden), *replayed[1:])
        output, ok = rivals.look(rows, replayed, torch.ones(6))
        assert ok.tolist() == greedy_by(full, torch.ones(6)).tolist()
        assert output.logits.shape[1] < VOCABULARY and output.logits.requires_grad
        own = output.logits.gather(1, output.labels[:, None])
        assert own.equal(full.logits.gather(1, replayed.labels[:, None]))
        assert (full.logits.amax(1) == output.logits.amax(1)).all() or right != [False] * 6


def test_a_stronger_token_becomes_a_rival() -> None:
    engine = _Engine()
    rows, rivals = _rows(1), Rivals(engine)  # type: ignore[arg-type]
    rivals.look(rows, _replayed(engine, [False], 1), torch.ones(1))
    moved = _replayed(engine, [True], 2)
    with torch.no_grad():
        # Nothing knew of this token while the row was first looked at.
        engine.weight[int(moved.labels[0]) - 1] = 2 * engine.weight[int(moved.labels[0])]
    output, ok = rivals.look(rows, moved, torch.ones(1))
    assert ok.tolist() == [False]
    assert output.logits[0].argmax() != output.labels[0]


def test_few_logits_are_computed_where_nothing_passes() -> None:
    engine = _Engine()
    rows, rivals = _rows(2), Rivals(engine)  # type: ignore[arg-type]
    replayed = _replayed(engine, [False, False])
    rivals.look(rows, replayed, torch.ones(2))
    before = engine.computed
    rivals.look(rows, replayed, torch.ones(2))
    assert engine.computed - before < 2 * 4 * VOCABULARY // 2


def test_the_whole_vocabulary_where_it_is_asked_for_or_cannot_be_cut() -> None:
    engine = _Engine()
    replayed = _replayed(engine, [True, False])
    for rivals in (Rivals(engine, everything=True),):  # type: ignore[arg-type]
        output, ok = rivals.look(_rows(2), replayed, torch.ones(2))
        assert output.logits.shape == (4, VOCABULARY) and output.labels.equal(replayed.labels)
        assert ok.tolist() == [True, False]


def test_a_first_look_at_the_whole_vocabulary_is_the_only_one() -> None:
    engine = _Engine()
    rows, rivals = _rows(3), Rivals(engine)  # type: ignore[arg-type]
    replayed = _replayed(engine, [True] * 3)
    _, ok = rivals.look(rows, replayed, torch.ones(3))
    assert ok.tolist() == [True] * 3
    assert engine.computed < 2 * len(replayed.hidden) * VOCABULARY
