"""MEMIT and AlphaEdit: weights of several layers solved for in closed form.

For a triple there is one shift, at the last token of its subject. With ``chunks`` set the answer is
a long one, with a shift before each chunk: AnyEdit (arXiv 2502.05628) on top of either.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

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
from wise_ext.editing.methods.observing import around_block, observe
from wise_ext.editing.methods.seeking import ChunkedConfig, Needed, Seeker, Wish
from wise_ext.editing.solving import alphaedit_delta, memit_delta, null_space
from wise_ext.editing.statistics import KeyStatistics
from wise_ext.errors import ConfigError
from wise_ext.models.table import get_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The papers edit layers 4 to 8 of Llama-3-8B's 32.
_LAST = 9 / 32
_SHARE = 5 / 32
# MEMIT's lambda for it, whose keys are so wide.
_WEIGHT, _WIDTH = 15_000, 14_336


@dataclass(frozen=True)
class LeastSquaresConfig(ChunkedConfig):
    """What MEMIT and AlphaEdit are both set by.

    Attributes:
        layer: the last one that is edited, where shifts are sought; ``"auto"`` is as deep as block
            8 of Llama-3-8B's 32, the papers'.
        spread: over how many blocks an edit is spread, ``layer``'s the last; 0 takes as large a
            share of them as the papers (5 of 32). Where a block does more than add its projection's
            output (Gemma's), one block's projection is all that can be solved for: 1.
        batch_size: edits of one call that are written together.
        statistics: file of the keys' second moments; None collects them once a model.
        chat, in_half, steps, step, clamp, stop_loss, contexts, context_tokens, essence, decay,
            seed, chunks, window, overlap, language, schedule, margin: see :class:`ChunkedConfig`.

    Raises:
        ConfigError: a value is out of range.
    """

    step: float = 0.1
    clamp: float = 0.75
    decay: float = 0.5
    spread: int = 0
    batch_size: int = 100
    statistics: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("spread", 0)
        self._check_count("batch_size")


ConfigT = TypeVar("ConfigT", bound=LeastSquaresConfig)


class _LeastSquares(Method[ConfigT]):
    """Shifts are sought at the last layer; each layer in turn makes its share of what is missing.

    Args:
        model, tokenizer, config: see :class:`Method`.
        statistics: the keys' second moments, in place of a file of them.
    """

    depth = _LAST

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ConfigT | None = None,
        statistics: KeyStatistics | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config)
        self.layers = self._spread()
        for layer in self.layers:
            weight_of(get_module(model, layer), layer)
        self._seeker = Seeker(self._engine, tokenizer, self.config, at_subject=True)
        self._given: KeyStatistics | str | Path | None = statistics or self.config.statistics
        self._moments: dict[str, Tensor] = {}

    def _spread(self) -> list[str]:
        """The paths of the layers to edit, from the lowest up."""
        engine, last = self._engine, self._engine.index
        count = self.config.spread or int(len(engine.blocks) * _SHARE + 0.5) or 1
        if not engine.additive:
            if self.config.spread > 1:
                raise ConfigError(
                    f"spread is {count}: blocks of {type(self.model).__name__} do more than add "
                    "their projection's output, so one layer can be solved for: use spread=1"
                )
            count = 1
        before, _, after = around_block(self.layer)
        return [f"{before}.{n}.{after}" for n in range(max(last + 1 - count, 0), last + 1)]

    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        clock = Stopwatch()
        with clock.stage("statistics"):
            self._prepare()
        with clock.stage("seek"):
            wishes = self._seeker.wishes(batch)
        goals = None
        for done, layer in enumerate(self.layers):
            with clock.stage("keys"):
                keys, states = self._observed(wishes, layer)
            if goals is None:
                goals = states + torch.cat([wish.values for wish in wishes])
            with clock.stage("solve"):
                residuals = torch.zeros(len(keys), states.shape[1], device=states.device)
                residuals[: len(states)] = (goals - states) / (len(self.layers) - done)
                delta = self._delta(layer, keys, residuals)
            with clock.stage("write"):
                self._add(layer, delta)
        with clock.stage("keys"):
            self._remember(wishes)
        seconds = clock.share(len(batch))
        return [
            MethodOutcome(lesson.edit.id, wish.rounds, wish.loss, dict(seconds))
            for lesson, wish in zip(batch, wishes, strict=True)
        ]

    def _prepare(self) -> None:
        """What has to be known of the unedited model."""
        if not self._moments:
            self._moments = key_moments(self.model, self.tokenizer, self.layers, self._given)

    def _observed(self, wishes: Sequence[Wish], layer: str) -> tuple[Tensor, Tensor]:
        """Keys of a layer fp32 [n, d_in], and the states at the last layer fp32 [k, d_model] of the
        key tokens, which are the first k of them; the others are those to leave alone.

        A key token's key is the mean over the contexts it is in (MEMIT, Eq. 19).
        """
        keys, states, others = [], [], []
        for wish in wishes:
            seen = [observe(self._engine, layer, text) for text in wish.texts]
            found = [key[at] for (key, _), at in zip(seen, wish.places, strict=True)]
            keys.append(torch.stack(found).mean(0))
            states.append(seen[0][1][wish.places[0]])
            if wish.whole:
                rest = torch.ones(len(wish.texts[0]), dtype=torch.bool, device=keys[0].device)
                rest[wish.places[0]] = False
                others.append(seen[0][0][rest])
        return torch.cat(keys + others), torch.cat(states)

    @abstractmethod
    def _delta(self, layer: str, keys: Tensor, residuals: Tensor) -> Tensor:
        """What to add to a layer's weight [d_out, d_in]."""

    def _remember(self, wishes: Sequence[Wish]) -> None:
        """What is to be remembered of edits that have been written."""


@dataclass(frozen=True)
class MemitConfig(LeastSquaresConfig):
    """Settings of MEMIT: the paper's, as EasyEdit has them for Llama-3-8B.

    Attributes:
        weight: lambda, as how many keys what is to be kept counts; None takes 15,000 for keys as
            wide as Llama-3-8B's (14,336) and in proportion for others: a key of C's own kind has
            ``k^T C^-1 k`` = d_ff on the average, so that an edit's share stays the same.
        layer, spread, batch_size, statistics and the others: see :class:`LeastSquaresConfig`.
    """

    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None:
            self._check_number("weight")


class Memit(_LeastSquares[MemitConfig]):
    """MEMIT (Meng et al. 2023, arXiv 2210.07229): Algorithm 1.

    Each layer l up to L gets ``R_l K^T (lambda C + K K^T)^-1`` (Eq. 14) with its share of what is
    missing, ``R_l = (z - h^L) / (L - l + 1)``, and keys and states are looked at again after each.
    With ``chunks``, all tokens of the text are keys, those that are no key tokens with no residual.
    """

    name = "memit"
    config_type: ClassVar[type[MethodConfig]] = MemitConfig

    def _delta(self, layer: str, keys: Tensor, residuals: Tensor) -> Tensor:
        weight = self.config.weight or _WEIGHT * keys.shape[1] / _WIDTH
        return memit_delta(keys, residuals, self._moments[layer].to(keys.device), weight)


@dataclass(frozen=True)
class AlphaEditConfig(LeastSquaresConfig):
    """Settings of AlphaEdit: those of its published code for Llama-3-8B.

    Attributes:
        threshold: eigenvalues of C below it make the null space; absolute, of the mean of
            ``k k^T``, as in the published code. For a model whose keys have another scale, look at
            ``KeyStatistics.spectrum``.
        ridge: the paper's Eq. 14 has 1, its code 10 for Llama-3-8B; in squared norms of a key.
        layer, spread, batch_size, statistics and the others: see :class:`LeastSquaresConfig`.
    """

    threshold: float = 2e-2
    ridge: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("threshold")
        self._check_number("ridge")


class AlphaEdit(_LeastSquares[AlphaEditConfig]):
    """AlphaEdit (Fang et al. 2025, arXiv 2410.02355): MEMIT within the null space of kept keys.

    The update is Eq. 14's; the keys of earlier edits are among what it keeps, in chunks, too, where
    AnyEdit's published code forgets them.
    """

    name = "alphaedit"
    config_type: ClassVar[type[MethodConfig]] = AlphaEditConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig | None = None,
        statistics: KeyStatistics | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config, statistics)
        # fp32: at a width of 14336, each has 0.8 GB.
        self._projectors: dict[str, Tensor] = {}
        self._past: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Undo every edit, and forget its keys."""
        super().reset()
        self._past = {}

    def _prepare(self) -> None:
        super()._prepare()
        if self._projectors:
            return
        for layer, moment in self._moments.items():
            projector = null_space(moment.to(self._engine.device), self.config.threshold)
            if not projector.any():
                raise ConfigError(
                    f"no eigenvalue of {layer}'s keys is below {self.config.threshold}: give a "
                    "larger threshold (KeyStatistics.spectrum shows them)"
                )
            self._projectors[layer] = projector.float()

    def _delta(self, layer: str, keys: Tensor, residuals: Tensor) -> Tensor:
        past = self._past.get(layer, keys.new_zeros(()))
        return alphaedit_delta(keys, residuals, self._projectors[layer], past, self.config.ridge)

    def _remember(self, wishes: Sequence[Wish]) -> None:
        for layer in self.layers:
            keys, _ = self._observed(wishes, layer)
            self._past[layer] = self._past.get(layer, 0) + keys.T @ keys


@dataclass(frozen=True)
class AnyEditMemitConfig(Needed, MemitConfig):
    """Settings of AnyEdit with MEMIT.

    Attributes: see :class:`Needed` and :class:`MemitConfig`.
    """

    weight: float | None = 150.0


class AnyEditMemit(Memit):
    """AnyEdit (arXiv 2502.05628) on top of MEMIT: answers of any length."""

    name = "anyedit-memit"
    config_type: ClassVar[type[MethodConfig]] = AnyEditMemitConfig


@dataclass(frozen=True)
class AnyEditAlphaEditConfig(Needed, AlphaEditConfig):
    """Settings of AnyEdit with AlphaEdit.

    Attributes: see :class:`Needed` and :class:`AlphaEditConfig`.
    """

    ridge: float = 1.0


class AnyEditAlphaEdit(AlphaEdit):
    """AnyEdit (arXiv 2502.05628) on top of AlphaEdit: answers of any length."""

    name = "anyedit-alphaedit"
    config_type: ClassVar[type[MethodConfig]] = AnyEditAlphaEditConfig
