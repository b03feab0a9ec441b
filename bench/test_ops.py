"""A small part of the registry under pytest-benchmark; results are checked before the clock.

OMP_NUM_THREADS=1 python -m pytest bench/test_ops.py --benchmark-group-by=param:case

`python -m bench.run` measures everything, and keeps rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import registry, runner
from bench.cases import Case, grid
from bench.inputs import Inputs

torch.set_num_threads(1)

OPS = [op for op in registry.OPS if op != "ties_merge"]
CASES = [
    *grid(OPS, ["smollm2-135m"], (8,), (1,), ("fp32", "bf16"), ("all", "adam")),
    *grid(["ties_merge"], ["smollm2-135m"]),
]
PARTS = [(case, provider) for case in CASES for provider in runner.plan(case, "cpu").providers]


@pytest.mark.parametrize(
    ("case", "provider"), PARTS, ids=lambda part: part.label if isinstance(part, Case) else part
)
def test_op(benchmark: Callable[..., object], case: Case, provider: str) -> None:
    inputs = Inputs(case, "cpu")
    registry.check(case, [provider], inputs)
    candidate = registry.build(case, provider, inputs)
    with candidate.in_force() as call:
        benchmark(call)
