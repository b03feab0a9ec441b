"""Teacher forcing: which token would the model say at each position of a given answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: prompt ids and answer ids of one row
TokenPair = tuple[list[int], list[int]]


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel, rows: Sequence[TokenPair], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """The greedy token at every answer position, the true tokens before it given.

    The route of a row is decided on its prompt alone, as it is when generating.

    Args:
        model: patched or not.
        rows: (prompt ids, answer ids), neither empty.
        batch_size: rows run at once; rows of similar length share a batch.

    Yields:
        (index of the row, its greedy tokens: as many as its answer has), once a row.
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
        lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
        if models.is_patched(model):
            with models.prompt_lengths(model, lengths):
                logits = model(input_ids=ids, attention_mask=mask, **options).logits
        else:
            logits = model(input_ids=ids, attention_mask=mask, **options).logits
        best = logits.argmax(dim=-1).tolist()
        place = {position: column for column, position in enumerate(kept)}
        for row, index in enumerate(batch):
            yield index, [int(best[row][place[t]]) for t in wanted[row]]


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
