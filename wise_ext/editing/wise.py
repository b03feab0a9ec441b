"""The WISE writer: edits in, a shard's masked delta out (arXiv 2405.14768, Eq. 3, 5 and 7)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.editing.anatomy import frozen
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.cueing import cue_numbers
from wise_ext.editing.edits import Edit, find_conflicts, squeezed
from wise_ext.editing.losses import Margins, label_loss, margin_loss
from wise_ext.editing.practice import Coach, Practice, draw_seed
from wise_ext.editing.rivals import Rivals
from wise_ext.editing.rows import Row
from wise_ext.memory import NO_CUE, Cues, Shard, random_mask_bits

# Rounds that a row rests for after passing once, twice, ... in succession.
_RESTS = (3, 6, 12)
# Share of the margin that a row must keep, once it has passed, to go on passing.
_KEPT = 0.5
# Share of the rounds in which other wordings are practised.
_WORDINGS = 0.25
# What a row counts that is already right: enough to stay so, little beside those that are not.
_SETTLED = 0.1


@dataclass(frozen=True)
class Outcome:
    """How one edit went: optimiser rounds it took part in, last losses, indicator, and whether its
    labels are all greedy (by the margin asked for) in what was looked at last."""

    edit: Edit
    locality_prompt: str | None
    iterations: int
    losses: dict[str, float]
    indicator: float
    converged: bool


@dataclass(eq=False)
class OpenShard:
    """A shard in training: dense fp32 ``delta`` [d_out, d_in] that is zero outside its mask."""

    number: int
    seed: int
    mask_bits: Tensor
    row_ptr: Tensor
    delta: Tensor
    edits: list[Edit] = field(default_factory=list)

    def seal(self, threshold: float) -> Shard:
        """The packed shard as it is now."""
        ids = [edit.id for edit in self.edits]
        return Shard.from_delta(self.delta, self.mask_bits, threshold, ids, self.seed)


class _Sample(NamedTuple):
    """A row of a round: which of the new edits it practises (-1: a replayed one), which of its rows
    that is (0: the bare prompt), with what, and by how many logits its labels have to lead."""

    owner: int
    place: int
    row: Row
    unrelated: Row | None
    margin: float


class WiseWriter:
    """Trains shards for one model, layer and set of settings.

    Args:
        coach: captures rows.
        config: settings.
        shape: (d_out, d_in) of the edited projection.
        margins: Eq. 5's, or None to train without them.
        cues: what enters a shard with its edits' prompts, or None for nothing.
    """

    def __init__(
        self,
        coach: Coach,
        config: WiseConfig,
        shape: tuple[int, int],
        margins: Margins | None,
        cues: Cues | None = None,
    ) -> None:
        self._coach = coach
        self._engine = coach.engine
        self._config = config
        self._shape = shape
        self._margins = margins
        self._cues = cues
        self._drawn: tuple[int, tuple[int, Tensor, Tensor]] | None = None

    def open(
        self, number: int, values: Tensor | None = None, edits: Sequence[Edit] = ()
    ) -> OpenShard:
        """A new shard, or one taken up again that was sealed with these ``values`` [nnz]. Its mask
        depends on seed and number."""
        seed, bits, row_ptr = self._mask(number)
        device = self._engine.device
        delta = torch.zeros(self._shape)
        if values is not None:
            delta = ops.unpack(bits, values.float(), row_ptr, self._shape[1])
        return OpenShard(
            number, seed, bits.to(device), row_ptr.to(device), delta.to(device), list(edits)
        )

    def _mask(self, number: int) -> tuple[int, Tensor, Tensor]:
        """A shard's seed, mask bits and row pointers; a large mask takes seconds to draw."""
        if self._drawn is None or self._drawn[0] != number:
            seed = draw_seed(self._config.seed, "mask", number)
            bits = random_mask_bits(*self._shape, self._config.mask_ratio, seed)
            _, row_ptr = ops.pack(torch.zeros(self._shape), bits)
            self._drawn = number, (seed, bits, row_ptr)
        return self._drawn[1]

    def write(
        self,
        shard: OpenShard,
        edits: Sequence[Edit],
        foreign: Sequence[Edit] = (),
        progress: Callable[[int], None] = lambda settled: None,
    ) -> list[Outcome]:
        """Train new edits into an open shard, together, earlier ones of it replayed.

        Args:
            shard: changed in place; it then lists the edits.
            edits: new ones, of different prompts.
            foreign: edits of other shards, which this one's indicator must stay below alpha for
                (App. B.3); used where margins are trained.
            progress: called after each round with the number of new edits that pass so far.

        Raises:
            DataError: an edit has no tokens.
        """
        new = [self._coach.practice(e) for e in edits]
        replaced = {old for old, _ in find_conflicts([*shard.edits, *edits])}
        old = [self._coach.practice(e) for e in shard.edits if e.id not in replaced]
        # Prompts of other shards come without a cue, even those of guests.
        others = [self._without_cue(e) for e in foreign] if self._margins else []
        self._give_cues([*old, *new])
        ids = ",".join(edit.id for edit in edits)
        rng = random.Random(draw_seed(self._config.seed, "draws", shard.number, ids))
        half = self._engine.in_half() if self._coach.in_half else nullcontext()
        with frozen(self._engine.model), half:
            lesson = _Lesson(self, shard, new, old, others, rng)
            lesson.run(progress)
        shard.edits.extend(edits)
        indicators = self.indicators(shard, [p.bare for p in new])
        return [
            Outcome(p.edit, p.locality_prompt, rounds, losses, r, settled)
            for p, rounds, losses, r, settled in zip(
                new, lesson.rounds, lesson.losses, indicators, lesson.settled, strict=True
            )
        ]

    def _give_cues(self, practices: Sequence[Practice]) -> None:
        """To all edits of a shard; they may have changed with its latest ones."""
        if self._cues is None:
            return
        numbers = cue_numbers([p.edit for p in practices], [p.asked for p in practices])
        for p in practices:
            number = numbers[squeezed(p.edit.prompt)]
            vector = self._cues.vectors(torch.tensor([number], device=self._engine.device))[0]
            p.give(vector if number != NO_CUE else None)

    def indicators(self, shard: OpenShard, rows: Sequence[Row]) -> list[float]:
        """Eq. 3 for each row under the shard as it is."""
        with torch.no_grad():
            r = self._engine.indicator(rows, shard.delta, shard.mask_bits)
        return [float(v) for v in r]

    def threshold(self, delta: Tensor, edits: Sequence[Edit]) -> float:
        """epsilon [Eq. 6] of a delta, fp32 [d_out, d_in]: its edits' least indicator x act_ratio.

        Infinite without edits: nothing is routed to an empty shard.
        """
        if not edits:
            return math.inf
        bits = torch.zeros(self._shape[0], -(-self._shape[1] // 32), dtype=torch.int32)
        device = self._engine.device
        # For routing by the indicator, which knows of no cues.
        rows = [self._without_cue(e) for e in edits]
        with torch.no_grad():
            r = self._engine.indicator(rows, delta.to(device), bits.to(device))
        return float(r.min()) * self._config.act_ratio

    def _without_cue(self, edit: Edit) -> Row:
        return replace(self._coach.practice(edit).bare, cue=None)


class _Lesson:
    """One call of ``write``: rounds over a batch of edits until all of them pass."""

    def __init__(
        self,
        writer: WiseWriter,
        shard: OpenShard,
        new: list[Practice],
        old: list[Practice],
        foreign: list[Row],
        rng: random.Random,
    ) -> None:
        self._config = writer._config
        self._engine = writer._engine
        self._margins = writer._margins
        self._shard = shard
        self._new, self._old, self._foreign = new, old, foreign
        self._rng = rng
        adam = self._config.optimizer == "adam"
        nnz = int(shard.row_ptr[-1])
        self._m = torch.zeros(nnz, device=shard.delta.device) if adam else None
        self._v = torch.zeros(nnz, device=shard.delta.device) if adam else None
        self._rivals = Rivals(self._engine, everything=not self._config.early_stop)
        self._step = 0
        self.rounds = [0] * len(new)
        self.losses: list[dict[str, float]] = [{} for _ in new]
        # By edit and row: the round it is due again, and how often it has passed in succession.
        drawn = self._config.contexts_per_round > 0
        self._needed = [1 + drawn * len(p.contexts) for p in new]
        self._due = [[0] * (1 + drawn * len(p.contexts + p.wordings)) for p in new]
        self._passed = [[0] * len(rows) for rows in self._due]
        self._forgotten: list[_Sample] = []

    @property
    def settled(self) -> list[bool]:
        """Which of the new edits passed in the bare prompt and every context when last looked at.

        Not in other wordings: where two edits differ in what was left out, no answer is right.
        """
        return [all(rows[:n]) for rows, n in zip(self._passed, self._needed, strict=True)]

    def run(self, progress: Callable[[int], None]) -> None:
        c = self._config
        for number in range(c.iterations):
            everyone = not c.early_stop or (all(self.settled) and not self._forgotten)
            samples = self._draw(-1 if everyone else number)
            passed = self._round(samples)
            self._forgotten = [s for s, ok in passed if s.owner < 0 and not ok]
            for sample, ok in passed:
                if sample.owner >= 0:
                    times = self._passed[sample.owner][sample.place] + 1 if ok else 0
                    self._passed[sample.owner][sample.place] = times
                    rest = _RESTS[min(times, len(_RESTS)) - 1] if ok else 0
                    self._due[sample.owner][sample.place] = number + 1 + rest
            for owner in {sample.owner for sample in samples} - {-1}:
                self.rounds[owner] += 1
            progress(sum(self.settled))
            # Passing counts only when everyone passed in one and the same round.
            if c.early_stop and everyone and all(ok for _, ok in passed):
                break

    def _round(self, samples: list[_Sample]) -> list[tuple[_Sample, bool]]:
        """One pass over these rows; which of them passed."""
        samples = sorted(samples, key=lambda s: len(s.row))
        size = self._config.rows_per_step
        chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
        self._rng.shuffle(chunks)
        return [pair for c in chunks for pair in zip(c, self._learn(c), strict=True)]

    def _draw(self, number: int) -> list[_Sample]:
        """Rows for a round: of each new edit the bare prompt and some contexts, as far as they are
        due by now, and of earlier edits those that were forgotten and some at random. With -1,
        before the lesson may end, it is every new edit's turn, and every earlier one's."""
        c = self._config
        new, kept = c.stop_margin, c.stop_margin * _KEPT
        everything = 0 <= number < c.iterations * _WORDINGS
        samples = []
        for i, p in enumerate(self._new):
            rows = self._due[i] if everything else self._due[i][: self._needed[i]]
            due = [r for r, when in enumerate(rows) if number < 0 or when <= number]
            contexts = [r for r in due if r > 0]
            count = min(c.contexts_per_round, len(contexts))
            drawn = [r for r in due if r == 0] + self._rng.sample(contexts, count)
            texts = [p.bare, *p.contexts, *p.wordings]
            margins = [kept if times else new for times in self._passed[i]]
            samples += [_Sample(i, r, texts[r], p.unrelated, margins[r]) for r in drawn]
        if not c.replay:
            return samples
        if number < 0 and c.early_stop:
            return samples + [_Sample(-1, 0, p.bare, p.unrelated, kept) for p in self._old]
        samples += [s._replace(margin=new) for s in self._forgotten]
        for p in self._rng.sample(self._old, min(c.replay, len(self._old))):
            row = self._rng.choice([p.bare, *p.contexts])
            samples.append(_Sample(-1, 0, row, p.unrelated, kept))
        return samples

    def _learn(self, chunk: list[_Sample]) -> list[bool]:
        """Score a chunk and, unless all of it is right already, take one optimiser step."""
        shard, rows = self._shard, [s.row for s in chunk]
        delta = shard.delta.detach().requires_grad_()
        replayed = self._engine.replay(rows, delta, shard.mask_bits)
        margins = torch.tensor([s.margin for s in chunk], device=delta.device)
        output, ok = self._rivals.look(rows, replayed, margins)
        labels = label_loss(output, len(rows))
        total, parts = labels, {"edit": labels.tolist()}
        if self._margins is not None:
            apart = self._margin(chunk, output.indicator, delta)
            total, parts["margin"] = labels + apart, apart.tolist()
            ok &= apart <= 1e-4 * self._margins.beta
        for i, sample in enumerate(chunk):
            if sample.owner >= 0:
                self.losses[sample.owner] = {name: values[i] for name, values in parts.items()}
        if self._config.early_stop:
            if bool(ok.all()):
                return [True] * len(chunk)
            weights = torch.where(ok, _SETTLED, 1.0)
            loss = (total * weights).sum() / weights.sum()
        else:
            loss = total.mean()
        (grad,) = torch.autograd.grad(loss, delta)
        self._update(grad)
        return [bool(v) for v in ok]

    def _margin(self, chunk: list[_Sample], indicator: Tensor, delta: Tensor) -> Tensor:
        """Eq. 5 of each row with the unrelated prompt of its edit, and B.3's of foreign edits."""
        assert self._margins is not None
        unrelated = [s.unrelated for s in chunk if s.unrelated is not None]
        count = min(self._config.replay, len(self._foreign))
        foreign = self._rng.sample(self._foreign, count)
        r = self._engine.indicator([*unrelated, *foreign], delta, self._shard.mask_bits)
        loss = margin_loss(indicator, r[: len(unrelated)], self._margins)
        if foreign:
            loss = loss + torch.relu(r[len(unrelated) :] - self._margins.alpha).mean()
        return loss

    def _update(self, grad: Tensor) -> None:
        c, shard = self._config, self._shard
        self._step += 1
        ops.masked_update_(
            shard.delta,
            grad,
            shard.mask_bits,
            shard.row_ptr,
            self._m,
            self._v,
            lr=c.learning_rate,
            beta1=c.betas[0],
            beta2=c.betas[1],
            step=self._step,
            clamp=c.clamp,
        )
