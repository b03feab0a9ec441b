"""Texts of made-up words, and the score of the key index worked out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wise_ext.memory import KeyIndex, TokenKeys

DIM = 96
# What stands for a word: every token of one id has nearly this activation.
WORDS = torch.randn(60, DIM, generator=torch.Generator().manual_seed(7)) * 2 + 1


def text(ids: Sequence[int], seed: int = 0, noise: float = 0.0) -> TokenKeys:
    """A text of these words, each a little different every time it is said."""
    generator = torch.Generator().manual_seed(seed)
    words = WORDS[list(ids)]
    noisy = words + noise * torch.randn(words.shape, generator=generator)
    return TokenKeys(torch.tensor(list(ids), dtype=torch.int64), noisy)


def background(seed: int = 0) -> list[TokenKeys]:
    """Texts in which words 0-3 are common and 30-59 never stand."""
    generator = torch.Generator().manual_seed(100 + seed)
    rows = []
    for _ in range(12):
        drawn = torch.randint(4, 30, (5,), generator=generator).tolist()
        rows.append([0, *drawn, 1, 2 + int(drawn[0] > 15)])
    return [text(row, seed=i, noise=0.3) for i, row in enumerate(rows)]


def filled(prompts: Sequence[TokenKeys], **options: object) -> KeyIndex:
    options = {"background": background()} | options
    index = KeyIndex(prompts[0].activation.shape[1], **options)  # type: ignore[arg-type]
    index.add(prompts, list(range(len(prompts))), [f"edit-{i}" for i in range(len(prompts))])
    return index


def batch(queries: Sequence[TokenKeys], pad: float = 0.0) -> tuple[Tensor, Tensor]:
    """Queries side by side, pads at alternating ends."""
    width = 1 + max(len(q.ids) for q in queries)
    activation = torch.full((len(queries), width, queries[0].activation.shape[1]), pad)
    real = torch.zeros(len(queries), width, dtype=torch.bool)
    for i, query in enumerate(queries):
        start = (width - len(query.ids)) * (i % 2)
        activation[i, start : start + len(query.ids)] = query.activation
        real[i, start : start + len(query.ids)] = True
    return activation, real


def oracle(
    prompts: Sequence[TokenKeys], background: Sequence[TokenKeys], query: TokenKeys
) -> list[float]:
    """The score of each stored edit for one query, by the definition alone."""
    seen = torch.cat([t.activation for t in background]).double()
    mean, deviation = seen.mean(0), seen.std(0, correction=0)
    floor = 1e-3 * math.sqrt(float((deviation**2).mean()))
    deviation = deviation.clamp(min=floor)

    def keys(text: TokenKeys) -> list[Tensor]:
        """A key is the token and, at half its weight, the token before."""
        made, before = [], torch.zeros_like(mean)
        for activation in text.activation[-64:].double():
            token = (activation - mean) / deviation
            token = token / token.norm()
            made.append(torch.cat([token, before / 2]))
            before = token
        return made

    def cosine(one: Tensor, two: Tensor) -> float:
        return float(one @ two / (one.norm() * two.norm()))

    behind = [set(t.ids.tolist()) for t in background]
    kept: list[list[tuple[int, Tensor, bool]]] = []
    for prompt in prompts:
        flags = prompt.named().tolist()[-64:]
        tokens = list(zip(prompt.ids.tolist()[-64:], keys(prompt), flags, strict=True))
        by_rarity = sorted(
            range(len(tokens)),
            key=lambda i, t=tokens: -1 if t[i][2] else sum(t[i][0] in text for text in behind),
        )
        kept.append([tokens[i] for i in sorted(by_rarity[:16])])
    texts = behind + [{token for token, _, _ in edit} for edit in kept]

    def rarity(token: int) -> float:
        holding = sum(token in text for text in texts)
        return max(0.02, 1 - math.log(holding) / math.log(max(2, len(texts))))

    asked = keys(query)
    scores = []
    for edit in kept:
        says = any(named for _, _, named in edit)
        rarest = sorted(range(len(edit)), key=lambda i, e=edit: (not e[i][2], -rarity(e[i][0])))[:8]
        cubes = {i: rarity(edit[i][0]) ** 3 * (edit[i][2] or not says) for i in rarest}
        score = 0.0
        for i in rarest:
            weight = 0.85 * cubes[i] / sum(cubes.values()) + 0.15 / len(rarest)
            best = max(cosine(edit[i][1], key) for key in asked)
            score += weight * max(0.0, best)
        scores.append(score)
    return scores


PROMPTS = [
    text([0, 31, 32, 5, 1], seed=1, noise=0.2),
    text([0, 31, 33, 9, 12, 1], seed=2, noise=0.2),
    text([34], seed=3, noise=0.2),
    text([0, 0, 2, 1], seed=4, noise=0.2),
    # More words than are compared, and more than are kept.
    text([0, *range(35, 46), 1], seed=5, noise=0.2),
    text([0, 1, 2, 3, *range(20, 30), *range(46, 54), 31], seed=6, noise=0.2),
]
# The same, of which some say which words are their subject's name.
NAMED = [
    prompt._replace(subject=torch.isin(prompt.ids, torch.tensor(name)))
    for prompt, name in zip(
        PROMPTS, ([31], [9, 33], [34], [59], [44, 45, 1], [*range(22, 30), 31]), strict=True
    )
]
QUERIES = [
    text([0, 31, 32, 5, 1], seed=11, noise=0.4),
    text([7, 8, 31, 9, 33], seed=12, noise=0.4),
    text([34, 34, 1], seed=13, noise=0.4),
    text([4, 6, 10], seed=14, noise=0.4),
    text(list(range(30, 50)), seed=15, noise=0.4),
]
