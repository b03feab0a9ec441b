"""Fine-tuning of one down projection on an edit: within a norm (FT-L), or elastically (FT-EWC).

Everything below the projection stays as it is, so it runs once an edit; the steps run the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from wise_ext.editing.losses import label_loss
from wise_ext.editing.methods.base import (
    Lesson,
    Method,
    MethodConfig,
    MethodOutcome,
    Stopwatch,
    weight_of,
)
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.editing.rows import Row
from wise_ext.memory import bool_to_bits
from wise_ext.models.table import get_module, projection_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Neutral texts run at a time.
_CHUNK = 16


@dataclass(frozen=True)
class FineTuningConfig(MethodConfig):
    """What both kinds of fine-tuning are set by.

    Attributes:
        layer, chat, in_half: see :class:`MethodConfig`.
        steps: at most this many steps of Adam a batch.
        learning_rate: Adam's.
        stop_loss: in nats a token; a batch ends when its mean loss is below it, 0 never.
        batch_size: edits of one call that are trained together.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 25
    learning_rate: float = 5e-4
    stop_loss: float = 1e-2
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps")
        self._check_count("batch_size")
        self._check_number("learning_rate")
        self._check_number("stop_loss", zero=True)


ConfigT = TypeVar("ConfigT", bound=FineTuningConfig)


class _FineTuning(Method[ConfigT]):
    """Adam on a delta of one projection's weight, which is added when its batch is done."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ConfigT | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config)
        projection = get_module(model, self.layer)
        weight_of(projection, self.layer)
        self._shape = projection_shape(projection)
        # The engine trains masked deltas; here the mask holds everything.
        everything = torch.ones(self._shape, dtype=torch.bool)
        self._mask = bool_to_bits(everything).to(self._engine.device)

    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        clock = Stopwatch()
        self._prepare(clock)
        with clock.stage("capture"):
            rows = self._engine.capture([x.prompt for x in batch], [x.target for x in batch])
        with clock.stage("optimise"):
            delta, losses, steps = self._optimise(rows)
        with clock.stage("write"):
            self._add(self.layer, delta)
        self._consolidate(rows, delta, clock)
        seconds = clock.share(len(batch))
        return [
            MethodOutcome(lesson.edit.id, steps, float(loss), dict(seconds))
            for lesson, loss in zip(batch, losses, strict=True)
        ]

    def _optimise(self, rows: list[Row]) -> tuple[Tensor, Tensor, int]:
        """The delta fp32 [d_out, d_in], its loss on each row, and how many steps it took."""
        c = self.config
        delta = torch.zeros(self._shape, device=self._engine.device, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=c.learning_rate)
        steps = 0
        while True:
            losses = self._losses(rows, delta)
            loss = losses.mean()
            if steps == c.steps or loss < c.stop_loss:
                return delta.detach(), losses.detach(), steps
            optimizer.zero_grad()
            (loss + self._penalty(delta)).backward()
            optimizer.step()
            self._constrain(delta)
            steps += 1

    def _losses(self, rows: Sequence[Row], delta: Tensor) -> Tensor:
        """-log p(target | prompt) a token of each row, with ``delta`` on the weight."""
        return label_loss(self._engine.run(rows, delta, self._mask), len(rows))

    def _prepare(self, clock: Stopwatch) -> None:
        """What has to be known before a batch."""

    def _penalty(self, delta: Tensor) -> Tensor | float:
        """Added to a batch's loss."""
        return 0.0

    def _constrain(self, delta: Tensor) -> None:
        """Bring a delta back to where it may be, in place."""

    def _consolidate(self, rows: list[Row], delta: Tensor, clock: Stopwatch) -> None:
        """What is to be remembered of a batch that has been written."""


@dataclass(frozen=True)
class ConstrainedConfig(FineTuningConfig):
    """Settings of FT-L: those of the baseline in ROME's and EasyEdit's code for GPT-2 XL.

    Attributes:
        layer, chat, in_half, steps, learning_rate, stop_loss, batch_size: see
            :class:`FineTuningConfig`.
        norm_constraint: by how much a batch may change an entry; None or 0 for any amount.
    """

    norm_constraint: float | None = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_constraint is not None:
            self._check_number("norm_constraint", zero=True)


class ConstrainedFineTuning(_FineTuning[ConstrainedConfig]):
    """FT-L: fine-tuning within an L-infinity norm (Zhu et al. 2020, arXiv 2012.00363).

    Minimises the target's loss over one layer's down projection W, subject to
    ``||W - W0||_inf <= norm_constraint``, by projecting onto the bounds after each step of Adam.
    W0 is the weight at the start of each batch of edits, as in ROME's and EasyEdit's code: the
    bound is not one on a sequence of edits, after n of which W may be n times as far away. (The
    paper has one batch of all facts, so it draws no such distinction.) A weight of 16 bits keeps
    the bounds up to its own rounding.

    The loss is that of the whole target given the prompt, not (as in ROME's code) that of all its
    tokens at the prompt's last one, which can teach no more than one token.
    """

    name = "ft-l"
    config_type: ClassVar[type[MethodConfig]] = ConstrainedConfig

    @torch.no_grad()
    def _constrain(self, delta: Tensor) -> None:
        bound = self.config.norm_constraint
        if bound:
            delta.clamp_(-bound, bound)


@dataclass(frozen=True)
class ElasticConfig(FineTuningConfig):
    """Settings of FT-EWC: those of GRACE's comparisons, in its code (arXiv 2211.11031).

    Attributes:
        layer, chat, in_half, steps, learning_rate, stop_loss, batch_size: see
            :class:`FineTuningConfig`.
        elasticity: lambda of Eq. 3. GRACE's code has 0.1 and leaves out Eq. 3's factor of a half.
        memory: about how many of the latest edits count in the Fisher information.
    """

    steps: int = 100
    learning_rate: float = 1e-2
    elasticity: float = 0.2
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("elasticity", zero=True)
        self._check_count("memory")


class ElasticFineTuning(_FineTuning[ElasticConfig]):
    """FT-EWC: fine-tuning with elastic weight consolidation (Kirkpatrick et al. 2017, PNAS, Eq. 3).

    Minimises the target's loss plus ``sum_i lambda / 2 * F_i * (W_i - W*_i)^2`` over one layer's
    down projection W. W* is the weight at the start of each batch of edits, as in GRACE's code.

    F is the diagonal empirical Fisher information of the unedited model on neutral text, worked out
    once, plus that of the latest edits: ``E <- (1 - 1/memory) E + F_batch / memory`` after each
    batch, at the weights it left behind (as in online EWC, Schwarz et al. 2018, arXiv 1805.06370).
    GRACE's code takes the sum over the last ten edits divided by ten instead, and no neutral text;
    the fading sum gives the newest edit the same weight and needs neither the old edits nor ten
    backward passes an edit, and the neutral text, which is what to keep, does not fade.
    """

    name = "ft-ewc"
    config_type: ClassVar[type[MethodConfig]] = ElasticConfig

    _neutral: Tensor | None = None
    _edits: Tensor | None = None

    @property
    def fisher(self) -> Tensor | None:
        """F as it is now, fp32 [d_out, d_in]; None before the first edit."""
        if self._neutral is None or self._edits is None:
            return self._neutral
        return self._neutral + self._edits

    def reset(self) -> None:
        """Undo every edit, and forget what was remembered of it."""
        super().reset()
        self._edits = None

    def _prepare(self, clock: Stopwatch) -> None:
        if self._neutral is not None:
            return
        with clock.stage("fisher"):
            texts = [encode_prompt(self.tokenizer, text) for text in neutral_prompts()]
            texts = [ids for ids in texts if len(ids) > 1]
            unedited = torch.zeros(self._shape, device=self._engine.device)
            total = torch.zeros_like(unedited)
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                rows = self._engine.capture([x[:1] for x in chunk], [x[1:] for x in chunk])
                total += self._fisher(rows, unedited) * len(rows)
            self._neutral = total / len(texts)

    def _penalty(self, delta: Tensor) -> Tensor:
        fisher = self.fisher
        assert fisher is not None
        return elastic_penalty(delta, fisher, self.config.elasticity)

    def _consolidate(self, rows: list[Row], delta: Tensor, clock: Stopwatch) -> None:
        with clock.stage("fisher"):
            newest = self._fisher(rows, delta) / self.config.memory
            fading = 1 - 1 / self.config.memory
            self._edits = newest if self._edits is None else fading * self._edits + newest

    def _fisher(self, rows: Sequence[Row], delta: Tensor) -> Tensor:
        """The diagonal empirical Fisher information [d_out, d_in]: the mean over rows of the
        squared gradient of a row's loss, the mean over its tokens (as in GRACE's code, whose
        lambda goes with that)."""
        total = torch.zeros_like(delta)
        for row in rows:
            leaf = delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._losses([row], leaf).sum(), leaf)
            total += gradient.square()
        return total / len(rows)


def elastic_penalty(delta: Tensor, fisher: Tensor, elasticity: float) -> Tensor:
    """Eq. 3's second term, ``sum_i elasticity / 2 * fisher_i * delta_i^2``, a scalar.

    Args:
        delta: by how far the weight is from what it was, any shape.
        fisher: of the same shape, not negative.
        elasticity: lambda.
    """
    return elasticity / 2 * (fisher * delta.square()).sum()
