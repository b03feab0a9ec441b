"""The table that picks implementations: over facts, so that no card is needed to test it."""

from __future__ import annotations

import re

import pytest

from wise_ext import ops
from wise_ext.errors import NativeError
from wise_ext.ops import triton_binding
from wise_ext.ops.capabilities import BY_ROWS, FEW_ROWS, Facts, at, can_run, covers, select, why_not

CUDA_OPS = ("add_side_", "dual_linear", "side_norm", "pack", "unpack", "ties_merge")
CPU = frozenset((op, "cpu") for op in ops.OPS)
BOTH = CPU | {(op, "cuda") for op in CUDA_OPS}
TRITON = frozenset(triton_binding.OPS)
BUILT = "80 90a+PTX"


def chosen(facts, device="cuda"):
    return {op: select(op, device, facts) for op in ops.OPS}


def test_the_cpu_takes_the_module_and_never_triton():
    assert set(chosen(Facts(BOTH, TRITON), "cpu").values()) == {("native", "native")}
    assert set(chosen(Facts(frozenset(), TRITON), "cpu").values()) == {("reference", "reference")}


def test_a_gpu_takes_cuda_for_few_rows_and_triton_for_many():
    picks = chosen(Facts(BOTH, TRITON, (9, 0), BUILT))
    for op in BY_ROWS:
        assert picks[op] == ("native", "triton")
        assert at(picks[op], 1) == at(picks[op], FEW_ROWS) == "native"
        assert at(picks[op], FEW_ROWS + 1) == "triton"
    for op in ("pack", "unpack", "ties_merge"):
        assert picks[op] == ("native", "native")
    for op in ("sketch_norm", "dual_linear_train", "dual_linear_train_backward", "masked_update_"):
        assert picks[op] == ("triton", "triton")
    assert picks["add_side_backward"] == ("reference", "reference")


def test_a_wheel_without_nvcc_runs_through_triton():
    picks = chosen(Facts(CPU, TRITON, (9, 0)))
    assert {op for op, pick in picks.items() if pick == ("triton", "triton")} == set(TRITON)
    assert {pick for op, pick in picks.items() if op not in TRITON} == {("reference", "reference")}


def test_a_module_without_triton_runs_alone():
    picks = chosen(Facts(BOTH, frozenset(), (8, 6), BUILT))
    assert {op for op, pick in picks.items() if pick == ("native", "native")} == set(CUDA_OPS)


@pytest.mark.parametrize("facts", [Facts(BOTH, TRITON, (7, 5), BUILT), Facts(BOTH, TRITON)])
def test_an_old_card_or_none_takes_the_reference(facts):
    assert set(chosen(facts).values()) == {("reference", "reference")}


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_devices_take_the_reference(device):
    facts = Facts(BOTH, TRITON, (9, 0), BUILT)
    assert set(chosen(facts, device).values()) == {("reference", "reference")}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 90a+PTX", (8, 0), True),
        ("80 90a+PTX", (8, 9), True),
        ("80 90a+PTX", (9, 0), True),
        ("80 90a+PTX", (10, 0), True),
        ("80 90a+PTX", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (8, 0), False),
        ("90a", (10, 0), False),
        ("8.6", (8, 0), False),
        ("86", (8, 9), True),
        ("80+PTX", (12, 1), True),
        ("100f", (10, 3), False),
        ("", (9, 0), False),
    ],
)
def test_architectures(architectures, capability, runs):
    assert covers(architectures, capability) is runs


def test_an_unknown_architecture_is_named():
    with pytest.raises(NativeError, match="unknown CUDA architecture: 'hopper'"):
        covers("80 hopper", (9, 0))


@pytest.mark.parametrize(
    ("asked", "op", "facts", "reason"),
    [
        ("native", "sketch_norm", Facts(BOTH, TRITON, (9, 0), BUILT), "no cuda kernel of it"),
        ("native", "pack", Facts(BOTH, TRITON, (8, 0), "90a"), r"compiled for 90a.* is 8\.0"),
        ("triton", "pack", Facts(BOTH, TRITON, (9, 0), BUILT), "no Triton kernel of it"),
        ("triton", "add_side_", Facts(BOTH, frozenset(), (9, 0)), "triton is not installed"),
        ("triton", "add_side_", Facts(BOTH, TRITON), "need a CUDA device"),
        ("triton", "add_side_", Facts(BOTH, TRITON, (7, 0)), r"need compute capability 8\.0"),
    ],
)
def test_reasons(asked, op, facts, reason):
    assert not can_run(asked, op, "cuda", facts)
    assert re.search(reason, why_not(asked, op, "cuda", facts))
