"""Sampled contexts: short texts the model writes itself, in which an edit is practised.

Appendix B.6 of WISE: without them an edit holds for its bare prompt and little else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wise_ext.editing.prompts import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# First words, so that the samples do not all begin alike.
_OPENINGS = (
    "Yesterday",
    "Most people",
    "In the",
    "We",
    "It was",
    "A",
    "Some of",
    "They",
    "For",
    "My",
)
_CANDIDATES = 50


@torch.no_grad()
def sample_contexts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int
) -> list[str]:
    """Let the model write ``count`` openings of ``tokens`` tokens each.

    Sampled among the 50 likeliest tokens with a generator of its own, so the same seed gives the
    same texts and the caller's random state is untouched. Stop tokens are never drawn.
    """
    if count == 0:
        return []
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        opening = _OPENINGS[number % len(_OPENINGS)]
        ids, cache, written = encode_prompt(tokenizer, opening), None, []
        for _ in range(tokens):
            step = torch.tensor([ids], device=device)
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits: Tensor = output.logits[0, -1].float().cpu()
            logits[list(tokenizer.all_special_ids)] = -torch.inf
            best = logits.topk(min(_CANDIDATES, logits.numel()))
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            ids = best.indices[drawn].tolist()
            written += ids
        text = opening + str(tokenizer.decode(written, skip_special_tokens=True))
        texts.append(" ".join(text.split()))
    return texts


def in_context(context: str, prompt: str) -> str:
    """The prompt after a sampled context, as one text."""
    return f"{context}. {prompt}"
