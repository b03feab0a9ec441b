"""Which tokens a label has to beat: a few rivals while training, all of them before it counts.

The output layer of a small model costs as much as several of its blocks, and of its logits only the
largest matter. Each row therefore keeps the strongest rivals of its labels, found among the whole
vocabulary, and is trained against those of its chunk. A row that passes is looked at in full first;
where another token turns out to be stronger, it joins the rivals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wise_ext.editing.losses import greedy_by
from wise_ext.editing.rows import Replayed, Row, SuffixOutput
from wise_ext.editing.suffix import SuffixEngine

# Rivals a label keeps from each look at the whole vocabulary.
_STRONGEST = 32


class Rivals:
    """The rivals of the rows of one lesson.

    Args:
        engine: gives the logits.
        everything: train against the whole vocabulary all the time.
    """

    def __init__(self, engine: SuffixEngine, everything: bool = False) -> None:
        self._engine = engine
        self._everything = everything or not engine.takes_tokens
        self._of: dict[int, Tensor] = {}

    def look(
        self, rows: Sequence[Row], replayed: Replayed, margins: Tensor
    ) -> tuple[SuffixOutput, Tensor]:
        """Logits to train on, and which rows [rows] bool have every label ahead of all other tokens
        of the vocabulary by ``margins`` [rows].

        ``logits`` and ``labels`` of the output speak of the chunk's rivals.
        """
        if self._everything:
            output = SuffixOutput(self._engine.logits(replayed.hidden), *replayed[1:])
            return output, greedy_by(output, margins)
        with torch.no_grad():
            new = [i for i, row in enumerate(rows) if id(row) not in self._of]
            passed = self._full(rows, replayed, new, margins)
            ok = greedy_by(self._among(rows, replayed), margins)
            ok[new] = passed
            again = [i for i in ok.nonzero().flatten().tolist() if i not in new]
            ok[again] = self._full(rows, replayed, again, margins)
        return self._among(rows, replayed), ok

    def _among(self, rows: Sequence[Row], replayed: Replayed) -> SuffixOutput:
        tokens = torch.cat([replayed.labels, *(self._of[id(row)] for row in rows)]).unique()
        return SuffixOutput(
            self._engine.logits(replayed.hidden, tokens),
            replayed.row,
            torch.searchsorted(tokens, replayed.labels),
            replayed.indicator,
        )

    def _full(
        self, rows: Sequence[Row], replayed: Replayed, chosen: list[int], margins: Tensor
    ) -> Tensor:
        """Look at the whole vocabulary for some rows; which of them pass, bool [chosen]."""
        places = torch.tensor(chosen, dtype=torch.int64, device=replayed.row.device)
        here = torch.isin(replayed.row, places)
        logits = self._engine.logits(replayed.hidden[here])
        row, labels = replayed.row[here], replayed.labels[here]
        strongest = logits.topk(min(_STRONGEST, logits.shape[1]), dim=1).indices
        for i in chosen:
            known = self._of.get(id(rows[i]), labels[:0])
            self._of[id(rows[i])] = torch.cat([known, strongest[row == i].flatten()]).unique()
        output = SuffixOutput(logits, row, labels, replayed.indicator)
        return greedy_by(output, margins)[places]
