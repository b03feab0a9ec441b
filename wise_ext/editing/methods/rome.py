"""ROME: one association of one layer is rewritten, by a change of rank one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wise_ext.editing.methods.base import (
    Lesson,
    Method,
    MethodConfig,
    MethodOutcome,
    Stopwatch,
    weight_of,
)
from wise_ext.editing.methods.moments import key_moments
from wise_ext.editing.methods.observing import observe
from wise_ext.editing.methods.seeking import Seeker, SeekingConfig
from wise_ext.editing.solving import rank_one
from wise_ext.editing.statistics import KeyStatistics
from wise_ext.models.table import get_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# EasyEdit edits layer 5 of Llama-3-8B's 32.
_DEPTH = 6 / 32


@dataclass(frozen=True)
class RomeConfig(SeekingConfig):
    """Settings of ROME: the paper's, as EasyEdit has them for Llama-3-8B.

    Attributes:
        layer: ``"auto"`` is as deep as block 5 of Llama-3-8B's 32.
        statistics: file of the keys' second moments; None collects them once a model.
        chat, in_half, steps, step, clamp, stop_loss, contexts, context_tokens, essence, decay,
            seed: see :class:`SeekingConfig`. The paper has twenty contexts, half of them of five
            tokens.
    """

    contexts: int = 20
    statistics: str | None = None


class Rome(Method[RomeConfig]):
    """ROME (Meng et al. 2022, arXiv 2202.05262).

    k* is the mean key of the subject's last token over contexts (Eq. 3), v* what the projection has
    to put out there (Eq. 4), and the weight changes by Eq. 2, so that it maps k* to v*.

    Args:
        model, tokenizer, config: see :class:`Method`.
        statistics: the keys' second moments, in place of a file of them.
    """

    name = "rome"
    depth = _DEPTH
    config_type: ClassVar[type[MethodConfig]] = RomeConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RomeConfig | None = None,
        statistics: KeyStatistics | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config)
        weight_of(get_module(model, self.layer), self.layer)
        self._seeker = Seeker(self._engine, tokenizer, self.config, at_subject=True)
        self._given = statistics or self.config.statistics
        self._moment: Tensor | None = None

    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        (lesson,) = batch
        clock = Stopwatch()
        with clock.stage("statistics"):
            if self._moment is None:
                found = key_moments(self.model, self.tokenizer, [self.layer], self._given)
                self._moment = found[self.layer].to(self._engine.device)
        with clock.stage("seek"):
            (wish,) = self._seeker.wishes([lesson])
        with clock.stage("keys"):
            pairs = zip(wish.texts, wish.places, strict=True)
            keys = [observe(self._engine, self.layer, text)[0][at] for text, at in pairs]
        with clock.stage("solve"):
            delta = rank_one(torch.cat(keys).mean(0), wish.values[0], self._moment)
        with clock.stage("write"):
            self._add(self.layer, delta)
        return [MethodOutcome(lesson.edit.id, wish.rounds, wish.loss, clock.seconds)]
