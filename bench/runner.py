"""One case from inputs to rows: check, memory, clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import registry, rows, timing
from bench.cases import DISPATCH_SHAPE, Case
from bench.inputs import Inputs


@dataclass(frozen=True)
class Plan:
    """Which providers of a case run on a device, and why the others do not."""

    case: Case
    providers: tuple[str, ...]
    left_out: dict[str, str]


def plan(case: Case, device: str, wanted: Sequence[str] = ()) -> Plan:
    """Sort the wanted providers (none: all but torch.compile) by whether they can run here."""
    asked = wanted or registry.default_providers(case, device)
    reasons = {name: registry.unavailable(case, name, device) for name in asked}
    return Plan(
        case,
        tuple(name for name, reason in reasons.items() if not reason),
        {name: reason for name, reason in reasons.items() if reason},
    )


def run(planned: Plan, device: str, seconds: float, roof: rows.Roofline | None) -> list[rows.Row]:
    """Check every provider of a case against the reference, then time them in turns.

    Raises:
        registry.Mismatch: a provider is wrong; nothing was timed.
    """
    case, providers = planned.case, planned.providers
    if "compiled" in providers:
        # Compiled code is kept by source line: after a few shapes dynamo would stop compiling.
        torch.compiler.reset()
    inputs = Inputs(case, device)
    errors = registry.check(case, providers, inputs)
    candidates = [
        # An optimizer holds on to what it changes: everyone gets their own.
        registry.build(case, name, inputs.with_copies(registry.OPS[case.op].mutated))
        for name in providers
    ]
    memory = {each.provider: timing.extra_memory(each, device) for each in candidates}
    dispatch = case.shape == DISPATCH_SHAPE
    samples = timing.measure(candidates, device, seconds, dispatch)
    work = registry.work(case)
    found = [
        rows.make(
            case,
            name,
            samples[name],
            work,
            None if dispatch else roof,
            errors[name],
            memory[name],
        )
        for name in providers
    ]
    if device == "cuda":
        # The graphs' pools go back before the next case asks for its own.
        del candidates, inputs
        torch.cuda.empty_cache()
    return found
