"""Texts, and what the tests of statistics do with them."""

from __future__ import annotations

from typing import Any

import torch

from wise_ext.editing.prompts import neutral_prompts
from wise_ext.editing.statistics import KeyStatistics, collect

TEXTS = [*neutral_prompts()[:24], "One more, and a rather longer one, so that lengths differ."]
LAYERS = [f"model.layers.{n}.mlp.down_proj" for n in (0, 2)]


def gather(model: Any, tokenizer: Any, texts: Any = TEXTS, **more: Any) -> KeyStatistics:
    layers = more.pop("layers", [0, 2])
    return collect(model, tokenizer, layers, texts, progress=False, **more)


def same(one: KeyStatistics, two: KeyStatistics) -> bool:
    pairs = zip(one.moments.items(), two.moments.items(), strict=True)
    equal = all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    return equal and vars(one) | {"moments": 0} == vars(two) | {"moments": 0}
