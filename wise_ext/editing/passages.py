"""The AnyEdit writer: one edit with an answer of any length in, a low-rank shard out.

At the edited layer an answer's keys do not depend on what is added there, so the least squares need
no iteration: what is said token by token while generating meets the very keys that were solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wise_ext.editing.anatomy import frozen
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.edits import Edit
from wise_ext.editing.in_turn import seek_in_turn
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.editing.rows import Row
from wise_ext.editing.shifts import Shifts, cut, label_leads, seek_together
from wise_ext.editing.solving import Factors, least_delta
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.upper import UpperModel
from wise_ext.editing.wise import Outcome
from wise_ext.memory import LowRankShard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Share of the margin that labels keep when directions are left out and factors rounded.
_KEPT = 0.5
# Edits whose chunks are sought together: their logits have to be there at once.
_TOGETHER = 8
# Ranks are told apart by this share of the full one.
_FINE = 16
#: What factors are rounded to.
DTYPE = torch.bfloat16


class PassageWriter:
    """Writes edits into shards of their own.

    Args:
        engine: its projection is the edited one.
        tokenizer: the model's.
        config: settings.
        chat: put prompts into the chat template.
        in_half: whether products in half precision will do while shifts are sought.
    """

    def __init__(
        self,
        engine: SuffixEngine,
        tokenizer: PreTrainedTokenizerBase,
        config: AnyEditConfig,
        chat: bool,
        in_half: bool,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._chat = chat
        self._half = engine.in_half if in_half else nullcontext
        self._upper = UpperModel(engine) if config.schedule == "in_turn" else None

    def write(
        self, edits: Sequence[Edit], progress: Callable[[int], None] = lambda done: None
    ) -> list[tuple[Outcome, LowRankShard]]:
        """Write each edit by itself: what becomes of it does not depend on its company (in turn,
        where some are worked on together, up to rounding).

        Args:
            edits: new ones.
            progress: called with the number of edits done.

        Raises:
            ConfigError: a library for cutting answers is not installed.
            DataError: an edit has no tokens.
        """
        written = []
        size = 1 if self._upper is None else _TOGETHER
        with frozen(self._engine.model):
            for start in range(0, len(edits), size):
                batch = edits[start : start + size]
                rows = [self._captured(edit) for edit in batch]
                with self._half():
                    sought = self._sought(rows)
                for edit, row, shifts in zip(batch, rows, sought, strict=True):
                    written.append(self._written(edit, row, shifts))
                    progress(len(written))
        return written

    def _captured(self, edit: Edit) -> Row:
        prompt = encode_prompt(self._tokenizer, edit.prompt, self._chat)
        target = encode_target(self._tokenizer, edit.target_new, chat=self._chat)
        return self._engine.capture([prompt], [target])[0]

    def _sought(self, rows: Sequence[Row]) -> list[Shifts]:
        chunks = [cut(row, self._tokenizer, self._config) for row in rows]
        if self._upper is not None:
            return seek_in_turn(self._upper, rows, chunks, self._config)
        return [
            seek_together(self._engine, row, of, self._config)
            for row, of in zip(rows, chunks, strict=True)
        ]

    def _written(self, edit: Edit, row: Row, shifts: Shifts) -> tuple[Outcome, LowRankShard]:
        factors = least_delta(row.activation, _spread(row, shifts), self._config.ridge)
        shard = self._smallest(row, factors)
        leads = label_leads(self._engine, row, row.base + _added(row, shard))
        outcome = Outcome(
            edit=edit,
            locality_prompt=edit.locality_prompt,
            iterations=shifts.rounds,
            losses={"edit": shifts.loss},
            indicator=float(_added(row, shard)[: row.prompt_length].norm(dim=-1).mean()),
            converged=bool((leads > 0).all()),
        )
        shard.edit_ids = [edit.id]
        return outcome, shard

    def _smallest(self, row: Row, factors: Factors) -> LowRankShard:
        """The shard of about the least rank that, rounded, still keeps the labels ahead as the full
        one does, or by half of the margin."""
        whole = LowRankShard.of(*factors)
        with self._half():
            least = self._ahead(row, whole, whole.rank)
            enough = min(least, self._config.margin * _KEPT)
            # Between a rank that will not do and one that will, as far as it is worth a look.
            low, high = -1, whole.rank
            while high - low > 1 + whole.rank // _FINE:
                middle = (low + high) // 2
                if self._ahead(row, whole, middle) >= enough:
                    high = middle
                else:
                    low = middle
        return whole.first(high, DTYPE)

    def _ahead(self, row: Row, whole: LowRankShard, rank: int) -> float:
        added = _added(row, whole.first(rank, DTYPE))
        return float(label_leads(self._engine, row, row.base + added).min())


def _spread(row: Row, shifts: Shifts) -> Tensor:
    """The shifts of all tokens of a row [t, d_model]: zero but at the key tokens."""
    return torch.zeros_like(row.base).float().index_add(0, shifts.places, shifts.values)


def _added(row: Row, shard: LowRankShard) -> Tensor:
    """What a shard adds at each token of a row [t, d_model]."""
    left, right = shard.left.to(row.base), shard.right.to(row.base)
    return (row.activation.to(right) @ right.T) @ left
