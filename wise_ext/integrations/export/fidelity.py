"""What an export keeps: the edits, and everything that they are not about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ... import models
from ...editing.edits import Edit
from ...editing.prompts import encode_prompt, neutral_prompts
from ...evaluation import evaluate
from ...evaluation.generation import write_answers
from ...evaluation.scoring import TokenPair, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 32
# Tokens that are compared of a continuation.
_TOKENS = 16


class Fidelity:
    """Measures one model, edited in this way and that, against what it said unedited.

    Args:
        model: patched; what it says without its memory is what counts as unchanged.
        tokenizer: its tokenizer.
        edits: what it was taught; not empty.
        chat: put prompts into the tokenizer's chat template.
        unrelated: prompts about something else. By default the edits' own locality prompts and the
            package's neutral texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        chat: bool = False,
        unrelated: Sequence[str] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._edits, self._chat = model, tokenizer, edits, chat
        if unrelated is None:
            local = [edit.locality_prompt for edit in edits if edit.locality_prompt]
            unrelated = list(dict.fromkeys([*local, *neutral_prompts()]))
        prompts = [encode_prompt(tokenizer, text, chat) for text in unrelated]
        with models.disabled(model) if models.is_patched(model) else nullcontext():
            written = write_answers(
                model, tokenizer, prompts, batch_size=_BATCH, max_new_tokens=_TOKENS
            )
        self._rows: list[TokenPair] = [
            (prompt, answer.tokens) for prompt, answer in zip(prompts, written, strict=True)
        ]

    def measure(self) -> dict[str, Any]:
        """Measure the model as it is now.

        Returns:
            ``reliability``, ``generalization``: token accuracies, see ``evaluate``;
            ``whole_answers``, ``whole_rephrasings``: shares of greedy answers that are the target
            (None for long edits); ``unrelated``: ``prompts`` (how many), ``same_tokens`` (share of
            the tokens of the unedited model's continuations that are still the greedy ones after
            those before them) and ``same_answers`` (share of continuations in which all are).
        """
        found = evaluate(
            self._model,
            self._tokenizer,
            self._edits,
            chat=self._chat,
            batch_size=_BATCH,
            generation=not any(edit.is_long for edit in self._edits),
            unedited=False,
            progress=False,
        )
        return {
            "reliability": found["reliability"],
            "generalization": found["generalization"],
            "whole_answers": found["generation"]["reliability"],
            "whole_rephrasings": found["generation"]["generalization"],
            "unrelated": self._unrelated(),
        }

    def _unrelated(self) -> dict[str, Any]:
        hits = tokens = whole = 0
        for place, scored in score_rows(self._model, self._rows, _BATCH):
            said = self._rows[place][1]
            same = sum(a == b for a, b in zip(scored.tokens, said, strict=True))
            hits, tokens, whole = hits + same, tokens + len(said), whole + (same == len(said))
        count = len(self._rows)
        return {
            "prompts": count,
            "same_tokens": hits / tokens,
            "same_answers": whole / count,
        }
