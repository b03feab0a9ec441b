"""What an edit is practised in besides its bare prompt: sampled contexts and shorter wordings.

Contexts are short texts the model writes itself (appendix B.6 of WISE): without them an edit holds
for its bare prompt and little else. A shorter wording leaves out some words around the subject, so
that the answer hangs on none of them.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wise_ext.editing.prompts import encode_prompt
from wise_ext.models.weights import device_of

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
# A word of a prompt that is not about its subject is left out this often.
_LEFT_OUT = 0.4


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
    device = device_of(model)
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


def shorter(prompt: str, subject: str | None, rng: random.Random) -> str | None:
    """The prompt without some of its words, or None where all of them may matter.

    Args:
        prompt: words apart by white space.
        subject: its words stay; where it is unknown, or the prompt says it otherwise, so do
            numbers and what is written with a capital, but for the first word.
        rng: decides.
    """
    words = prompt.split()
    named = set(_parts(subject or ""))
    about = [bool(named & set(_parts(word))) for word in words]
    if not any(about):
        about = [word[0].isdigit() or (i > 0 and word[0].isupper()) for i, word in enumerate(words)]
    free = [i for i, stays in enumerate(about) if not stays]
    if not any(about) or not free:
        return None
    left_out = {i for i in free if rng.random() < _LEFT_OUT} or {rng.choice(free)}
    return " ".join(word for i, word in enumerate(words) if i not in left_out)


def _parts(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
