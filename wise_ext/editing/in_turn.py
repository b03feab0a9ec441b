"""Shifts of key tokens, chunk after chunk: AnyEdit's own schedule (arXiv 2502.05628, Sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.chunks import Chunk
from wise_ext.editing.losses import leads
from wise_ext.editing.rows import Row
from wise_ext.editing.shifts import Shifts, clamp_, label_weights, scales
from wise_ext.editing.upper import Prefix, Stretch, UpperModel


def seek_in_turn(
    upper: UpperModel,
    rows: Sequence[Row],
    chunks: Sequence[Sequence[Chunk]],
    config: AnyEditConfig,
) -> list[Shifts]:
    """Seek the shifts of several answers, the n-th chunks of all of them together.

    What comes before a chunk's key token is run once, with the shifts of earlier chunks in place.
    Where chunks overlap, a chunk's tokens that come again count in both, and in the end as the
    later one's shift makes them. No row has a part in another's shifts.

    Args:
        upper: the model above the edited projection.
        rows: captured, one an edit.
        chunks: of each row's answer, at least one each, which cover it.
        config: settings; ``steps`` are of each chunk.
    """
    answers = [Answer(row, of) for row, of in zip(rows, chunks, strict=True)]
    going = answers
    prefix = Prefix.empty(len(rows), rows[0].base.device)
    prefix = upper.extended(prefix, _stretch(going, [0] * len(going), [a.key for a in going]))
    while going:
        _say(upper, going, prefix, config)
        keys = [answer.key for answer in going]
        left = [i for i, answer in enumerate(going) if answer.goes_on()]
        going = [going[i] for i in left]
        if going:
            # The next key token is in its own chunk's stretch, and what overlaps it, too.
            ends = [answer.key for answer in going]
            part = _stretch(going, [keys[i] for i in left], ends)
            prefix = upper.extended(prefix.keep(left), part)
    return [answer.shifts() for answer in answers]


class Answer:
    """A row on its way through its chunks.

    Attributes:
        row: captured.
        moved: the row's ``base`` with the shifts so far [t, d_model].
    """

    def __init__(self, row: Row, chunks: Sequence[Chunk]) -> None:
        self.row = row
        self.moved = row.base.clone()
        self.norms, self.unit = scales(row)
        self._chunks = list(chunks)
        self._number = 0
        self._values: list[Tensor] = []
        self._losses = torch.zeros(len(row.labels), device=row.base.device)
        self._rounds = 0

    @property
    def chunk(self) -> Chunk:
        """The one at hand."""
        return self._chunks[self._number]

    @property
    def key(self) -> int:
        """The key token of the chunk at hand."""
        return self._place(self.chunk)

    @property
    def labels(self) -> Tensor:
        """Of the chunk at hand, int64 [n]."""
        return self.row.labels[self.chunk.begin : self.chunk.end]

    def outputs(self, shift: Tensor) -> Tensor:
        """What the chunk's labels are predicted from [n, d_model], the key token's shift
        [d_model], in units, in place."""
        n = len(self.labels)
        states = self.moved[self.key : self.key + n]
        return torch.cat([states[:1] + (shift * self.unit).to(states.dtype), states[1:]])

    def settle(self, shift: Tensor, losses: Tensor, rounds: int) -> None:
        """The chunk's shift [d_model], in units, is found: its labels' losses [n] are known."""
        value = shift.detach() * self.unit
        self.moved[self.key] += value.to(self.moved.dtype)
        self._values.append(value)
        self._losses[self.chunk.begin : self.chunk.end] = losses.detach()
        self._rounds += rounds

    def goes_on(self) -> bool:
        """Go to the next chunk, if there is one."""
        self._number += 1
        return self._number < len(self._chunks)

    def shifts(self) -> Shifts:
        """All of them, once there is no chunk left."""
        places = torch.tensor([self._place(c) for c in self._chunks], device=self.moved.device)
        loss = float(self._losses.mean())
        return Shifts(places, torch.stack(self._values), self._rounds, loss)

    def _place(self, chunk: Chunk) -> int:
        return self.row.prompt_length - 1 + chunk.begin


def _say(
    upper: UpperModel, answers: Sequence[Answer], prefix: Prefix, config: AnyEditConfig
) -> None:
    """Settle the chunk at hand of each answer; those that are said wait for the others."""
    # One parameter an answer: the optimiser leaves alone what has no gradient.
    shifts = [torch.zeros_like(a.moved[0], dtype=a.norms.dtype) for a in answers]
    adam = torch.optim.Adam(shifts, lr=config.step, betas=(0.9, 0.99))
    active = list(range(len(answers)))
    for rounds in range(config.steps + 1):
        trying = [shifts[i].requires_grad_() for i in active]
        losses, ahead = chunk_losses(upper, [answers[i] for i in active], trying, prefix)
        failing = [rounds < config.steps and bool((a < config.margin).any()) for a in ahead]
        for i, loss, fails in zip(active, losses, failing, strict=True):
            if not fails:
                answers[i].settle(shifts[i], loss, rounds)
        if not any(failing):
            return
        total = (torch.cat(losses) * label_weights(torch.cat(ahead), config.margin)).sum()
        adam.zero_grad()
        if not all(failing):
            prefix = prefix.keep([n for n, fails in enumerate(failing) if fails])
            active = [i for i, fails in zip(active, failing, strict=True) if fails]
        trying = [shifts[i] for i in active]
        for shift, slope in zip(trying, torch.autograd.grad(total, trying), strict=True):
            shift.grad = slope
        adam.step()
        for i in active:
            answer = answers[i]
            clamp_(shifts[i], answer.norms[answer.chunk.begin], answer.unit, config.clamp)


def chunk_losses(
    upper: UpperModel, answers: Sequence[Answer], shifts: Sequence[Tensor], prefix: Prefix
) -> tuple[list[Tensor], list[Tensor]]:
    """How well each answer's chunk at hand is said with a shift [d_model], in units, at its key.

    Returns:
        For each answer the negative log likelihood of its chunk's labels [n], differentiable, and
        by how many logits each label leads [n].
    """
    outputs = [a.outputs(shift) for a, shift in zip(answers, shifts, strict=True)]
    part = Stretch.of([a.row for a in answers], [a.key for a in answers], outputs)
    logits = upper.logits(part, prefix)[part.real]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = torch.cat([a.labels for a in answers])
    losses = F.cross_entropy(logits, labels, reduction="none")
    sizes = [len(a.labels) for a in answers]
    return list(losses.split(sizes)), list(leads(logits.detach(), labels).split(sizes))


def _stretch(answers: Sequence[Answer], begins: Sequence[int], ends: Sequence[int]) -> Stretch:
    """Tokens of each answer, the shifts so far in place."""
    parts = [a.moved[i:j] for a, i, j in zip(answers, begins, ends, strict=True)]
    return Stretch.of([a.row for a in answers], begins, parts)
