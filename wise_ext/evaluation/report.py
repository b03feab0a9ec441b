"""What an edited model is measured by: did edits take, generalise, and leave the rest alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..editing.edits import Edit, find_conflicts
from ..editing.progress import ProgressCallback, counted
from ..errors import ConfigError, DataError
from .measuring import Wanted, count_units, measure
from .summary import details_of, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    chat: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    generation: bool = True,
    unedited: bool = True,
    perplexity: bool = False,
    progress: bool | ProgressCallback = True,
    details: bool = False,
) -> dict[str, Any]:
    """Measure an edited model on its edits.

    * ``n``: how many edits were measured; ``superseded``: how many were left out because a later
      one of ``edits`` has their prompt and another target.
    * ``reliability``, ``generalization``: mean over edits of the share of target tokens (without
      the stop token) that are greedy under teacher forcing, after the prompt and the rephrasing.
    * ``locality``: share of the locality answers' tokens, all edits together, at which the edited
      and the unedited model are greedily of the same mind.
    * ``generation.reliability``, ``generation.generalization``: share of greedy answers that are
      the target as a whole (trimmed, case folded, punctuation at the ends stripped);
      ``generation.contains``: that hold it somewhere; ``generation.locality``: that equal the
      unedited model's, character for character.
    * ``routing.edit_to_side``, ``rephrase_to_side``, ``locality_to_main``: share of prompts sent
      there; ``routing.right_shard``, ``right_shard_rephrase``: share of edit prompts and of
      rephrasings sent to the very shard that holds the edit, among the edits the memory has.
    * ``unedited``: reliability and generalization of the model without its memory.
    * ``target_perplexity`` (``perplexity=True``), also under ``unedited``: ``mean`` and ``median``
      over edits of exp(mean negative log likelihood of the target's tokens after the prompt).
    * ``seconds``: wall time.

    A mean that no edit has the fields for, or that was not asked for, is ``None``. The model is
    left as it was.

    Args:
        model: a patched model (a model without a memory is measured as it is).
        tokenizer: its tokenizer.
        edits: what to measure; not empty.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest generated answer, in tokens.
        generation: generate answers; without, only routes and teacher forcing.
        unedited: score the model without its memory too.
        perplexity: work out the target's perplexity (the unedited one only with ``unedited``).
        progress: a bar on standard error, or a function called with (done, total).
        details: add ``details``, one row an edit: its own scores, answers and routes.

    Raises:
        ConfigError: ``batch_size`` or ``max_new_tokens`` is not positive, no chat template.
        DataError: there are no edits, or a text has no tokens.
    """
    if not edits:
        raise DataError("there are no edits to evaluate: give at least one")
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError("batch size and max_new_tokens must be at least 1")
    start = time.perf_counter()
    superseded = {older for older, _ in find_conflicts(edits)}
    kept = [edit for edit in edits if edit.id not in superseded]
    wanted = Wanted(
        chat=chat,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        generation=generation,
        unedited=unedited,
        perplexity=perplexity,
        texts=details,
    )
    training = model.training
    model.train(False)
    try:
        with counted("evaluating", count_units(kept, wanted), progress) as tick:
            rows = measure(model, tokenizer, kept, wanted, tick)
    finally:
        model.train(training)
    report = summarise(rows)
    report["superseded"] = len(edits) - len(kept)
    report["seconds"] = time.perf_counter() - start
    if details:
        report["details"] = details_of(rows)
    return report
