"""What locate-and-edit methods begin with: by how much hidden states have to be shifted.

Weights are then solved for, or trained, that make the shifts; that is where the methods differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.contexts import in_context, sample_contexts
from wise_ext.editing.in_turn import seek_in_turn
from wise_ext.editing.methods.base import Lesson, MethodConfig
from wise_ext.editing.prompts import encode_prompt, subject_tokens
from wise_ext.editing.rows import Row
from wise_ext.editing.shifts import clamp_, cut, seek_together, slopes
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.upper import UpperModel
from wise_ext.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What an answer is not cut into chunks with.
WHOLE = "none"


@dataclass(frozen=True)
class SeekingConfig(MethodConfig):
    """How the shift of a fact is sought (ROME, arXiv 2202.05262, Eq. 4; MEMIT has the same).

    Attributes:
        layer, chat, in_half: see :class:`MethodConfig`; the shift is of this layer's output.
        steps: at most this many steps of Adam.
        step: Adam's learning rate, in root mean squares of the state that is shifted: the papers
            give one for each model, in units of that model's states.
        clamp: no shift grows beyond so many times the norm of that state.
        stop_loss: the search ends when its loss is below it, in nats.
        contexts: so many texts that the model writes itself precede the prompt, beside none.
        context_tokens: their tokens.
        essence: weight of the Kullback-Leibler divergence that keeps what the model makes of
            "{subject} is a"; without a subject there is no such term.
        decay: weight of ``||shift|| / ||state||^2``.
        seed: of the contexts.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 25
    step: float = 0.5
    clamp: float = 4.0
    stop_loss: float = 5e-2
    contexts: int = 5
    context_tokens: int = 10
    essence: float = 0.0625
    decay: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("contexts", 0), ("context_tokens", 1), ("seed", 0)):
            self._check_count(name, least)
        for name in ("step", "clamp"):
            self._check_number(name)
        for name in ("stop_loss", "essence", "decay"):
            self._check_number(name, zero=True)


@dataclass(frozen=True)
class ChunkedConfig(SeekingConfig):
    """The same, or several shifts along a long answer (AnyEdit, arXiv 2502.05628).

    Attributes:
        layer, chat, in_half, steps, step, clamp, stop_loss, contexts, context_tokens, essence,
            decay, seed: see :class:`SeekingConfig`; those from ``stop_loss`` on are of facts alone.
        chunks: ``"none"`` seeks one shift for the whole answer; else where the answer is cut, each
            chunk with a shift at the token before it: ``"windows"``, ``"sentences"`` or
            ``"needed"``, see :class:`AnyEditConfig`, as for all that follow.
        window, overlap, language, schedule, margin: see :class:`AnyEditConfig`.
    """

    chunks: str = WHOLE
    window: int = 0
    overlap: int = 0
    language: str = "en"
    schedule: str = "in_turn"
    margin: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks != WHOLE:
            self.passage()
        elif self.window or self.overlap:
            raise ConfigError("window and overlap are of chunks: choose chunks='windows'")

    def passage(self) -> AnyEditConfig:
        """How the shifts of a chunked answer are sought."""
        return AnyEditConfig(
            chunks=self.chunks,
            window=self.window,
            overlap=self.overlap,
            language=self.language,
            schedule=self.schedule,
            steps=self.steps,
            step=self.step,
            clamp=self.clamp,
            margin=self.margin,
        )


@dataclass(frozen=True)
class Needed:
    """What a small model needs for a long answer, in place of ``ChunkedConfig``'s defaults.

    The paper's (AnyEdit, arXiv 2502.05628) are ``chunks="windows", schedule="in_turn", steps=25,
    margin=0``: one moved state then says 40 tokens, which a small model's cannot.
    """

    steps: int = 60
    step: float = 0.1
    clamp: float = 4.0
    chunks: str = "needed"
    schedule: str = "together"
    margin: float = 4.0


class Wish(NamedTuple):
    """What an edit wants of the edited layer's outputs.

    Attributes:
        texts: token ids; the same tokens are shifted in each. The first has no context.
        places: of each text, int64 [k]: its key tokens.
        values: fp32 [k, d_model]: what is to be added to their outputs.
        whole: whether the text is all that is edited, its other tokens to stay as they are.
        rounds: steps of the optimiser.
        loss: mean negative log likelihood of the answer's tokens with the shifts in place, nats.
    """

    texts: list[list[int]]
    places: list[Tensor]
    values: Tensor
    whole: bool
    rounds: int
    loss: float


class Seeker:
    """Seeks what edits want of the output of an engine's projection.

    Args:
        engine: its model may be edited between calls, below the blocks that follow the projection.
        tokenizer: the model's.
        config: settings.
        at_subject: a fact's key token is its subject's last, where the prompt names that; else the
            prompt's last.
    """

    def __init__(
        self,
        engine: SuffixEngine,
        tokenizer: PreTrainedTokenizerBase,
        config: SeekingConfig,
        at_subject: bool,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._at_subject = at_subject
        self._contexts: list[str] | None = None

    def wishes(self, lessons: Sequence[Lesson]) -> list[Wish]:
        """One a lesson; in turn, the chunks of all of them are sought together.

        Raises:
            ConfigError: a library for cutting answers is not installed.
        """
        if isinstance(self._config, ChunkedConfig) and self._config.chunks != WHOLE:
            return self._passages(lessons, self._config.passage())
        return [self._fact(lesson) for lesson in lessons]

    # -- long answers ----------------------------------------------------------------------------

    def _passages(self, lessons: Sequence[Lesson], config: AnyEditConfig) -> list[Wish]:
        engine = self._engine
        rows = [engine.capture([x.prompt], [x.target])[0] for x in lessons]
        chunks = [cut(row, self._tokenizer, config) for row in rows]
        if config.schedule == "in_turn":
            found = seek_in_turn(UpperModel(engine), rows, chunks, config)
        else:
            pairs = zip(rows, chunks, strict=True)
            found = [seek_together(engine, row, of, config) for row, of in pairs]
        return [
            Wish([[*x.prompt, *x.target[:-1]]], [s.places], s.values, True, s.rounds, s.loss)
            for x, s in zip(lessons, found, strict=True)
        ]

    # -- facts -----------------------------------------------------------------------------------

    def _fact(self, lesson: Lesson) -> Wish:
        edit, c, engine = lesson.edit, self._config, self._engine
        prompts = [edit.prompt, *(in_context(text, edit.prompt) for text in self._written())]
        texts, places = zip(*(self._located(p, edit.subject) for p in prompts), strict=True)
        rows = engine.capture(texts, [lesson.target] * len(texts))
        spots = list(places)
        if c.essence and self._at_subject and edit.subject:
            text, place = self._located(f"{edit.subject} is a", edit.subject)
            # What is predicted behind it is compared with what was; any label will do.
            rows += engine.capture([text], [lesson.target[:1]])
            spots.append(place)
        value, rounds, loss = seek_fact(engine, rows, spots, len(texts), c)
        tokens = [torch.tensor([place], device=engine.device) for place in places]
        return Wish(list(texts), tokens, value[None], False, rounds, loss)

    def _written(self) -> list[str]:
        if self._contexts is None:
            c = self._config
            self._contexts = sample_contexts(
                self._engine.model, self._tokenizer, c.contexts, c.context_tokens, c.seed
            )
        return self._contexts

    def _located(self, prompt: str, subject: str | None) -> tuple[list[int], int]:
        """A prompt's ids, and its key token."""
        ids = encode_prompt(self._tokenizer, prompt, self._config.chat)
        named = None
        if self._at_subject:
            named = subject_tokens(self._tokenizer, prompt, subject, self._config.chat)
        last = len(ids) - 1
        return ids, max((i for i, of in enumerate(named or ()) if of), default=last)


def seek_fact(
    engine: SuffixEngine,
    rows: Sequence[Row],
    places: Sequence[int],
    edited: int,
    config: SeekingConfig,
) -> tuple[Tensor, int, float]:
    """The shift that makes several rows say their labels (ROME, arXiv 2202.05262, Eq. 4).

    Args:
        engine: its projection's output is shifted.
        rows: captured; those behind the first ``edited`` are to be predicted as before.
        places: the token of each row that is shifted, the same shift for all.
        edited: how many rows are to say their labels, at least 1.
        config: settings.

    Returns:
        The shift fp32 [d_model], how many steps it took, and the mean negative log likelihood of
        the labels, in nats.
    """
    starts = torch.tensor([0, *(len(row) for row in rows[:-1])]).cumsum(0)
    flat = (starts + torch.tensor(places)).to(engine.device)
    base = torch.cat([row.base for row in rows])
    norm = base[flat[0]].float().norm()
    unit = norm / base.shape[-1] ** 0.5
    shift = torch.zeros_like(base[0], dtype=torch.float32).requires_grad_()
    adam = torch.optim.Adam([shift], lr=config.step)
    rounds, before = 0, None
    while True:
        moved = (shift * unit).to(base.dtype).expand(len(flat), -1)
        hidden, row, labels = engine.above(rows, base.index_add(0, flat, moved))
        spoken = row < edited
        # Each row has as many labels: the mean over all is that over rows.
        gradient = torch.zeros_like(hidden)
        gradient[spoken], _, nll = slopes(engine, hidden[spoken], labels[spoken], math.inf)
        gradient /= spoken.sum()
        kept = config.decay * (shift * unit).norm() / norm**2
        if not bool(spoken.all()):
            logits = engine.logits(hidden[~spoken]).log_softmax(-1)
            before = logits.detach() if before is None else before
            moving = F.kl_div(logits, before, log_target=True, reduction="batchmean")
            kept = kept + config.essence * moving
        if rounds == config.steps or nll + float(kept.detach()) < config.stop_loss:
            return (shift * unit).detach(), rounds, nll
        (shift.grad,) = torch.autograd.grad([hidden, kept], shift, [gradient, None])
        adam.step()
        clamp_(shift, norm[None], unit, config.clamp)
        rounds += 1
