"""Memories of any size without training: made-up facts, real keys, random values.

What a forward pass costs depends on how many shards and keys there are and not on what they say, so
a bench of costs need not wait for hours of editing. The names are syllables, the questions those of
`wise_ext/data/relations.json`; their keys are what the model's first block says of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.wordings import relations
from wise_ext.editing.workshop import Workshop
from wise_ext.memory import KeyIndex, Shard, SideMemory, TokenKeys
from wise_ext.memory.masks import bits_per_row, mask_words, random_mask_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYLLABLES = (
    *("ba", "bel", "cor", "da", "del", "fen", "gal", "har", "il", "jo", "ka", "lan", "lim", "mar"),
    *("mo", "nar", "nel", "or", "pel", "quo", "ra", "sal", "sten", "ta", "tor", "ul", "van", "wen"),
)
# Small enough to change no fluent text, whatever is routed.
_SIZE = 1e-3
# Tokens of an edit that has no words.
_TOKENS = 8
# Further shards' masks are a few random ones, their rows moved on: drawing one takes long.
_DRAWN = 4


@dataclass(frozen=True)
class Made:
    """A memory and the questions that its edits were stored under, in order."""

    memory: SideMemory
    prompts: list[str]


class Maker:
    """Makes memories for one model, of few or many shards; what one needs is kept for the next.

    Args:
        model: bare, in evaluation mode.
        tokenizer: its tokenizer.
        router: "key" or "indicator".
        shard_size: edits in a shard.
        mask_ratio: share of the layer a shard changes.
        seed: of names, masks and values.
        settings: others of the memory, such as its radius.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        router: str = "key",
        shard_size: int = 100,
        mask_ratio: float = 0.2,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        config = WiseConfig(router=router, margins=router == "indicator", **settings)
        self._shop = Workshop(model, tokenizer, config)
        self._size, self._ratio, self._seed = shard_size, mask_ratio, seed
        self._facts = questions(seed)
        self._prompts: list[str] = []
        self._keys: list[list[TokenKeys]] = []

    def make(self, shards: int) -> Made:
        """A memory of so many shards."""
        memory = self._shop.empty_memory()
        while len(self._prompts) < shards * self._size:
            prompt, subject = next(self._facts)
            self._prompts.append(prompt)
            self._keys.append(self._shop.coach.addresses(prompt, subject))
        prompts = self._prompts[: shards * self._size]
        memory.shards[:] = made_shards(memory.shape, shards, self._ratio, self._seed)
        ids = [f"made-{number}" for number in range(len(prompts))]
        for number, shard in enumerate(memory.shards):
            shard.edit_ids = ids[number * self._size : (number + 1) * self._size]
        if memory.key_index is not None:
            places = [number // self._size for number in range(len(prompts))]
            memory.key_index.add_worded(self._keys[: len(prompts)], places, ids)
        return Made(memory, prompts)


def questions(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Endless questions about subjects that occur once, and those subjects."""
    rng = random.Random(seed)
    known = [r for r in relations() if r.kind != "anything"]
    taken = set()
    while True:
        words = ("".join(rng.sample(_SYLLABLES, rng.choice((2, 3)))).title() for _ in range(2))
        subject = " ".join(words)
        if subject not in taken:
            taken.add(subject)
            yield rng.choice(rng.choice(known).wordings).format(subject), subject


def made_index(width: int, count: int, seed: int = 1) -> KeyIndex:
    """Edits of eight tokens that no model has seen, three of them a name, a hundred to a shard."""
    draw = torch.Generator().manual_seed(seed)
    name = torch.arange(_TOKENS) < 3
    index = KeyIndex(width)
    tokens = [
        TokenKeys(torch.arange(n, n + _TOKENS), torch.randn(_TOKENS, width, generator=draw), name)
        for n in range(0, count * _TOKENS, _TOKENS)
    ]
    index.add(tokens, [n // 100 for n in range(count)], [f"made-{n}" for n in range(count)])
    return index


def made_shards(
    shape: tuple[int, int], count: int, mask_ratio: float, seed: int = 0
) -> list[Shard]:
    """Shards with random masks and small random values; their thresholds admit nothing."""
    d_out, d_in = shape
    a_row = bits_per_row(d_in, mask_ratio)
    drawn = min(count, _DRAWN)
    masks = [random_mask_bits(d_out, d_in, mask_ratio, seed + number) for number in range(drawn)]
    row_ptr = torch.arange(d_out + 1) * a_row
    assert all(mask.shape == (d_out, mask_words(d_in)) for mask in masks)
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        values: Tensor = torch.randn(d_out * a_row, generator=generator) * _SIZE
        mask = masks[number % drawn].roll(number // drawn, 0) if masks else torch.zeros(0)
        found.append(Shard(mask, values, row_ptr, d_in, torch.inf))
    return found
