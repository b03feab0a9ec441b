"""Teacher forcing: which token would the model say at each position of a given answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import models
from .decoding import Taken, each, forced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: prompt ids and answer ids of one row
TokenPair = tuple[list[int], list[int]]


class Scored(NamedTuple):
    """One row under teacher forcing.

    Attributes:
        tokens: the greedy token at every answer position, the true tokens before it given.
        nll: mean negative log likelihood of the answer's tokens, in nats; None where not asked.
    """

    tokens: list[int]
    nll: float | None


def greedy_tokens(
    model: PreTrainedModel, rows: Sequence[TokenPair], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """The greedy tokens of :func:`score_rows`: (index of the row, as many as its answer has)."""
    for index, scored in score_rows(model, rows, batch_size):
        yield index, scored.tokens


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[TokenPair],
    batch_size: int,
    *,
    routes: Sequence[Taken] | None = None,
    likelihood: bool = False,
) -> Iterator[tuple[int, Scored]]:
    """Run answers behind their prompts.

    The route of a row is decided on its prompt alone, as it is when generating.

    Args:
        model: patched or not.
        rows: (prompt ids, answer ids), neither empty.
        batch_size: rows run at once; rows of similar length share a batch.
        routes: where the rows go, one a row; None lets the model decide.
        likelihood: work out ``nll`` too.

    Yields:
        (index of the row, its scores), once a row.
    """
    takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
    for batch in length_batches([len(p) + len(a) for p, a in rows], batch_size):
        prompts = [rows[i][0] for i in batch]
        answers = [rows[i][1] for i in batch]
        ids, mask = pad([p + a for p, a in zip(prompts, answers, strict=True)], model, left=False)
        # position t predicts token t + 1, so the answer is read from one position earlier
        wanted = [
            range(len(p) - 1, len(p) - 1 + len(a)) for p, a in zip(prompts, answers, strict=True)
        ]
        kept = sorted(set().union(*wanted))
        options: dict[str, Any] = {"use_cache": False}
        if takes_positions:  # logits of a whole long prompt would not fit in memory
            options["logits_to_keep"] = torch.tensor(kept, device=ids.device)
        else:
            kept = list(range(ids.shape[1]))
        with _routed(model, prompts, None if routes is None else [routes[i] for i in batch]):
            logits = model(input_ids=ids, attention_mask=mask, **options).logits
        best = logits.argmax(dim=-1).tolist()
        place = {position: column for column, position in enumerate(kept)}
        for row, index in enumerate(batch):
            columns = [place[t] for t in wanted[row]]
            nll = None
            if likelihood:
                # row by row: a batch of fp32 log-probabilities would be as large as the logits
                logs = logits[row, columns].float().log_softmax(dim=-1)
                true = torch.tensor(answers[row], device=logs.device)
                nll = -float(logs.gather(1, true.unsqueeze(1)).mean())
            yield index, Scored([int(best[row][column]) for column in columns], nll)


def _routed(
    model: PreTrainedModel, prompts: Sequence[list[int]], routes: Sequence[Taken] | None
) -> AbstractContextManager[None]:
    """The given routes, or those that the prompts alone take."""
    if routes is not None or not models.is_patched(model):
        return forced(model, routes)
    return models.prompt_lengths(model, torch.tensor([len(p) for p in prompts]))


@torch.no_grad()
def prompt_routes(
    model: PreTrainedModel, prompts: Sequence[list[int]], batch_size: int, pad_id: int = 0
) -> list[Taken]:
    """Where prompts go: the model runs only as far as that needs.

    Args:
        model: patched or not; without a memory everything is main.
        prompts: token ids, none empty.
        batch_size: prompts run at once.
        pad_id: what fills short rows.
    """
    routes = [Taken(-1, 0)] * len(prompts)
    if models.is_patched(model):
        for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
            ids, mask = pad([prompts[i] for i in batch], model, left=True, pad_id=pad_id)
            found = each(models.decide_routes(model, ids, mask))
            for index, taken in zip(batch, found, strict=True):
                routes[index] = taken
    return routes


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches, longest first, so that little is padded and memory runs out at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(
    sequences: Sequence[list[int]], model: PreTrainedModel, left: bool, pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [B, T], on the model's device."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        part = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, part] = torch.tensor(sequence, dtype=torch.long)
        mask[row, part] = 1
    return ids.to(model.device), mask.to(model.device)
