"""What is measured, and the work it cannot do without."""

from __future__ import annotations

import pytest

from bench.cases import AXES, SHAPES, SUITES, Case, Filter, choose, grid
from bench.work import WORK, Work, entries, ties_merge_moved
from wise_ext.memory.masks import popcount, random_mask_bits


def test_axes_and_work_name_the_same_ops() -> None:
    assert AXES.keys() == WORK.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_made_of_valid_cases_each_once(suite: str, device: str) -> None:
    cases = choose(device, suite, Filter())
    assert cases
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert case.shape in SHAPES
        assert case.variant in AXES[case.op].variants
        assert case.dtype in AXES[case.op].dtypes
        assert WORK[case.op](case).bytes > 0


def test_everything_named_is_in_the_full_grid() -> None:
    cases = set(choose("cuda", "full", Filter()))
    assert Case("dual_linear", "llama-3-70b", 2048, 24, "fp16", "half") in cases
    assert Case("sketch_norm", "llama-3.2-1b", 128, 6, "bf16") in cases
    assert {case.op for case in cases} == AXES.keys()


def test_asking_for_something_chooses_from_the_full_grid() -> None:
    found = choose("cpu", None, Filter(ops=("side_norm",), shapes=("llama-2-7b",), shards=(24,)))
    assert len(found) == 4 * 3  # rows x dtypes
    assert all(case.shards == 24 for case in found)


def test_an_axis_an_op_lacks_does_not_exclude_it() -> None:
    wanted = Filter(ops=("ties_merge", "mv"), shapes=("llama-3-8b",), rows=(8,), shards=(6,))
    assert {case.op for case in choose("cpu", None, wanted)} == {"ties_merge", "mv"}


def test_a_case_survives_json() -> None:
    case = Case("dual_linear", "llama-3-8b", 8, 6, "bf16", "half", True)
    assert Case.from_json({**case.to_json(), "provider": "cuda"}) == case


def test_entries_are_those_of_a_real_mask() -> None:
    case = Case("add_side_", "smollm2-135m")
    assert entries(case) == popcount(random_mask_bits(576, 1536, 0.2, seed=3))


def test_linear_moves_the_weight_x_and_y() -> None:
    work = WORK["linear"](Case("linear", "llama-3-8b", 8, dtype="bf16"))
    assert work.bytes == 2 * (4096 * 14336 + 8 * 14336 + 8 * 4096)
    assert work.flops == 2 * 8 * 4096 * 14336


def test_a_packed_shard_is_about_a_quarter_of_a_dense_one() -> None:
    case = Case("add_side_", "llama-3-8b", dtype="bf16", variant="all")
    dense = WORK["linear"](case)
    assert 0.26 < WORK["add_side_"](case).bytes / dense.bytes < 0.27
    assert WORK["add_side_"](case).flops / dense.flops == pytest.approx(0.2, rel=1e-3)


def test_only_routed_shards_and_rows_count() -> None:
    def moved(variant: str, rows: int) -> Work:
        return WORK["dual_linear"](Case("dual_linear", "llama-3-8b", rows, 6, "bf16", variant))

    plain = WORK["linear"](Case("linear", "llama-3-8b", 8, 6, "bf16"))
    assert moved("none", 8).flops == plain.flops
    assert moved("none", 8).bytes - plain.bytes == 8 * 4  # the routes
    assert moved("half", 8).flops - plain.flops == (moved("all", 8).flops - plain.flops) / 2
    # Six shards at most occur, whatever the number of rows.
    few, many = moved("all", 128), moved("all", 2048)
    x_and_y = 2 * (2048 - 128) * (14336 + 4096) + 4 * (2048 - 128)
    assert many.bytes - few.bytes == x_and_y


def test_the_slower_of_moving_and_multiplying_is_the_roofline() -> None:
    work = Work(bytes=100.0, flops=1000.0)
    assert work.seconds(bytes_per_s=10.0, flops_per_s=1000.0) == 10.0
    assert work.bound(10.0, 1000.0) == "memory"
    assert work.seconds(bytes_per_s=1000.0, flops_per_s=100.0) == 10.0
    assert work.bound(1000.0, 100.0) == "compute"


def test_ties_merge_moves_every_delta_in_every_pass() -> None:
    case = Case("ties_merge", "smollm2-135m", shards=5)
    assert ties_merge_moved(case) == 21 * 576 * 1536 * 4
    assert WORK["ties_merge"](case).bytes == 6 * 576 * 1536 * 4


def test_grid_leaves_out_dtypes_an_op_has_not() -> None:
    found = list(grid(["ties_merge", "pack"], ["tiny"], dtypes=("bf16",)))
    assert [case.op for case in found] == ["pack"]
