"""The edited projection alone, patched over bare, for `bench.overhead`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import SHAPES
from bench.made_memory import made_index, made_shards
from bench.overhead_case import BEHIND, Case, WrongError, in_pairs
from bench.rows import Row
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.memory import IndicatorRouter, KeyRouter, PackedBank, Router, uncued
from wise_ext.nn import Course, DualLinear, RouteState


def of_layer(
    shapes: list[str], router: str, counts: list[int], shares: list[str], pairs: int
) -> Iterator[Row]:
    """The edited projection alone, 128 tokens and one, random activations."""
    for shape in shapes:
        size = SHAPES[shape]
        base = torch.nn.Linear(size[1], size[0], bias=False)
        for count in counts:
            bank = PackedBank.from_shards(made_shards(size, count, 0.2), size)
            decides = deciding(router, bank)
            cases = [Case("layer", tokens, 1, share) for tokens in (BEHIND, 1) for share in shares]
            cases = [case for case in cases if case.routed != "half" or case.tokens > 1]
            if router == "indicator":
                cases = []  # a known route costs the same, whoever knows it
            cases += [Case("layer and routing", BEHIND, 1, "none")] * ("none" in shares)
            for case in cases:
                console.note(f"{case.label} of {shape}, {count} shards, {case.routed} routed")
                row = _layer(base, bank, decides, case, pairs)
                bytes_ = {
                    "bank_bytes": bank.nbytes,
                    "dense_bytes": count * 4 * size[0] * size[1],
                }
                yield {**vars(case), "shards": count, "model": shape, **bytes_, **row}
            del bank, decides
            gc.collect()


def activations(tokens: int, width: int) -> Tensor:
    """Random ones, fp32 [tokens, width]."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def deciding(router: str, bank: PackedBank) -> Router:
    """A router for the bank, to which none of `activations` belongs."""
    d_in = bank.shape[1]
    if router == "key":
        return KeyRouter("", made_index(d_in, 100 * bank.num_shards), WiseConfig().radius)
    real = torch.ones(1, BEHIND, dtype=torch.bool)
    open_ = IndicatorRouter("", bank, [0.0] * bank.num_shards, estimate=False)
    typical = open_.indicators(activations(BEHIND, d_in).unsqueeze(0), real)
    return IndicatorRouter("", bank, (4 * typical[0]).tolist())


def _layer(base: torch.nn.Linear, bank: PackedBank, decides: Router, case: Case, pairs: int) -> Row:
    state = RouteState()
    dual = DualLinear(base, bank, state)
    x = activations(case.tokens, base.in_features)
    # Every token a row of its own, so that half of them can be routed.
    every = {"none": 0, "half": 2, "all": 1}[case.routed]
    route = [n % bank.num_shards if every and n % every == 0 else -1 for n in range(case.tokens)]
    state.settle(Course(uncued(torch.tensor(route, dtype=torch.int32)), None))
    real = torch.ones(1, case.tokens, dtype=torch.bool)

    def patched() -> Tensor:
        if case.phase == "layer and routing":
            decides.decide(x.unsqueeze(0), real)
        y: Tensor = dual(x)
        return y

    if int(decides.decide(x.unsqueeze(0), real).route) != -1:
        raise WrongError(f"{case.label}: the prompt went to the side memory")
    stays = torch.tensor(route) < 0
    if not torch.equal(patched()[stays], base(x)[stays]):
        raise WrongError(f"{case.label}: rows that stay in main memory differ")
    return in_pairs(patched, lambda: base(x), pairs)
