"""Shifts of key tokens: what has to be added to hidden states so that an answer is said.

AnyEdit (arXiv 2502.05628, Sec. 4): the state that the edited layer puts out at a chunk's key token
is moved until the model says the chunk. Weights are then solved for that produce the moved states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.chunks import Chunk, sentences, windows
from wise_ext.editing.losses import leads
from wise_ext.editing.rows import Row
from wise_ext.editing.suffix import SuffixEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a label counts that is settled: enough to stay so.
_SETTLED = 0.1
# Rounds after which chunks that are not said yet are cut.
_PATIENCE = 10
# Labels whose logits are there at a time.
_SLICE = 128


@dataclass(frozen=True)
class Shifts:
    """What is added to the output of the edited projection at the key tokens of one row.

    Attributes:
        places: int64 [n]: the key tokens, counted from the row's first, ascending.
        values: fp32 [n, d_model].
        rounds: steps of the optimiser.
        loss: mean negative log likelihood of the labels with the shifts in place, in nats.
    """

    places: Tensor
    values: Tensor
    rounds: int
    loss: float


def cut(row: Row, tokenizer: PreTrainedTokenizerBase, config: AnyEditConfig) -> list[Chunk]:
    """The chunks of a row's answer; none for ``"needed"``, which are found on the way.

    Raises:
        ConfigError: sentences are wanted and the splitter is not installed.
    """
    if config.chunks == "windows":
        return windows(len(row.labels), config.size, config.overlap)
    if config.chunks == "sentences":
        return sentences(tokenizer, row.labels.tolist(), config.size, config.language)
    return []


def seek_together(
    engine: SuffixEngine, row: Row, chunks: Sequence[Chunk], config: AnyEditConfig
) -> Shifts:
    """Seek the shifts of all chunks of one answer at once.

    Every label's gradient reaches every shift before it, so an early shift also helps later chunks;
    and the whole answer is one batch. A chunk that is not said after some rounds is cut where it
    fails.

    Args:
        engine: its projection is the edited one.
        row: captured.
        chunks: where to begin; none lets a chunk begin at each label that is not said.
        config: settings.
    """
    count, device = len(row.labels), row.base.device
    keys = torch.arange(count, device=device) + row.prompt_length - 1
    norms, unit = scales(row)
    begun = torch.zeros(count, dtype=torch.bool, device=device)
    begun[[chunk.begin for chunk in chunks]] = True
    shifts = torch.zeros(count, row.base.shape[-1], device=device, requires_grad=True)
    adam = torch.optim.Adam([shifts], lr=config.step, betas=(0.9, 0.99))
    for rounds in range(config.steps + 1):
        moved = row.base.index_add(0, keys, (shifts * unit).to(row.base.dtype))
        hidden, _, labels = engine.above([row], moved)
        gradients, ahead, loss = slopes(engine, hidden, labels, config.margin)
        failing = ahead < config.margin
        if not bool(failing.any()) or rounds == config.steps:
            break
        begun |= _due(failing, begun, config.size, rounds)
        (gradient,) = torch.autograd.grad(hidden, shifts, gradients)
        shifts.grad = gradient * begun.unsqueeze(1)  # the others stay zero
        adam.step()
        clamp_(shifts, norms, unit, config.clamp)
    values = (shifts.detach() * unit)[begun]
    return Shifts(keys[begun], values, rounds, loss)


def label_leads(engine: SuffixEngine, row: Row, outputs: Tensor) -> Tensor:
    """By how many logits each label of a row leads, fp32 [n], where ``outputs`` [t, d_model] stand
    for its ``base``."""
    with torch.no_grad():
        hidden, _, labels = engine.above([row], outputs)
        return torch.cat([leads(engine.logits(hidden[p]), labels[p]) for p in _slices(labels)])


def scales(row: Row) -> tuple[Tensor, Tensor]:
    """What a row's shifts are measured by: the norms of the states that predict its labels, fp32
    [n, 1], and a scalar, the root mean square of the entries of a state of median norm."""
    states = row.base[row.prompt_length - 1 :].float()
    norms = states.norm(dim=-1, keepdim=True)
    return norms, norms.median() / math.sqrt(states.shape[-1])


@torch.no_grad()
def clamp_(shifts: Tensor, norms: Tensor, unit: Tensor, clamp: float) -> None:
    """Shorten shifts [..., d_model] in place, measured in ``unit``, to ``clamp`` times the norms
    [..., 1] of the states they are added to."""
    length = shifts.norm(dim=-1, keepdim=True) * unit
    shifts.mul_((clamp * norms / length.clamp(min=1e-30)).clamp(max=1))


def label_weights(ahead: Tensor, margin: float) -> Tensor:
    """What each label counts that leads by ``ahead`` [n] logits."""
    return torch.where(ahead < margin, 1.0, _SETTLED)


def _due(failing: Tensor, begun: Tensor, size: int, rounds: int) -> Tensor:
    """Labels [n] bool at which a chunk begins this round: each that fails where chunks have one
    token; else at first where one fails and no chunk of ``size`` reaches, and later, now and then,
    the first that fails of each chunk."""
    if size == 1:
        return failing
    due = torch.zeros_like(failing)
    if bool(begun.any()):
        if rounds % _PATIENCE == 0 and rounds:
            chunk = begun.long().cumsum(0)
            fresh = failing & ~begun
            firsts = {int(chunk[i]): i for i in reversed(fresh.nonzero().flatten().tolist())}
            due[list(firsts.values())] = True
        return due
    end = 0
    for place in failing.nonzero().flatten().tolist():
        if place >= end:
            due[place] = True
            end = place + size
    return due


def slopes(
    engine: SuffixEngine, hidden: Tensor, labels: Tensor, margin: float
) -> tuple[Tensor, Tensor, float]:
    """How a loss rises with hidden states; the logits of a long answer are never all there at once.

    Args:
        engine: whose ``above`` gave the states.
        hidden: [n, d_model].
        labels: int64 [n].
        margin: in logits; a label that leads by it counts a tenth.

    Returns:
        The gradient [n, d_model] of the labels' summed negative log likelihood, how far each label
        leads [n], and the mean negative log likelihood in nats.
    """
    gradient, ahead, total = torch.empty_like(hidden), [], 0.0
    for part in _slices(labels):
        label = labels[part, None]
        states = hidden[part].detach().requires_grad_()
        logits = engine.logits(states)
        # One buffer: log-probabilities, without the labels', then the loss's slope in the logits.
        buffer = logits.detach().log_softmax(-1)
        own = buffer.gather(1, label)
        total -= float(own.sum())
        ahead.append((own - buffer.scatter_(1, label, -torch.inf).amax(1, keepdim=True))[:, 0])
        slope = buffer.exp_().scatter_(1, label, own.expm1())
        (gradient[part],) = torch.autograd.grad(logits, states, slope)
        gradient[part] *= label_weights(ahead[-1], margin)[:, None]
    return gradient, torch.cat(ahead), total / len(labels)


def _slices(labels: Tensor) -> Iterator[slice]:
    for begin in range(0, len(labels), _SLICE):
        yield slice(begin, begin + _SLICE)
