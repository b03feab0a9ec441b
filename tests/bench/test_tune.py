"""The tuner's own logic; what it needs a card for is behind a function that is given here."""

from __future__ import annotations

import json
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no Triton kernels")

from bench import tune
from bench.cases import Case
from bench.inputs import Inputs
from bench.registry import Mismatch
from bench.tune_jobs import JOBS, verify
from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.configs import Config

LIMITS = {"BLOCK_ROWS": (16, 64), "BLOCK_IN": (32, 32)}


def config(rows=32, width=32, warps=4, stages=2):
    blocks = MappingProxyType({"BLOCK_ROWS": rows, "BLOCK_IN": width})
    return Config(blocks, warps, stages)


def test_neighbours_are_one_step_away_and_within_the_limits():
    assert set(tune.neighbours(config(), LIMITS)) == {
        config(rows=16),
        config(rows=64),
        config(warps=2),
        config(warps=8),
        config(stages=1),
        config(stages=3),
    }
    corner = config(rows=64, warps=8, stages=5)
    assert set(tune.neighbours(corner, LIMITS)) == {
        config(rows=32, warps=8, stages=5),
        config(rows=64, warps=4, stages=5),
        config(rows=64, warps=8, stages=4),
    }


class Clock:
    """Seconds by how far a config is from the best; configs with 16 rows cannot be launched."""

    def __init__(self, best):
        self.best, self.asked = best, []

    def __call__(self, candidates):
        self.asked += candidates
        return {
            each: 1.0
            + abs(each.num_stages - self.best.num_stages)
            + abs(each.num_warps - self.best.num_warps)
            for each in candidates
            if each.blocks["BLOCK_ROWS"] != 16
        }


def test_a_search_climbs_to_the_best_and_times_nothing_twice():
    best = config(warps=8, stages=4)
    clock = Clock(best)
    assert tune.search([config(), config(warps=1)], LIMITS, clock, 9) == (best, 1.0)
    assert len(clock.asked) == len(set(clock.asked))


def test_a_search_ends_after_its_rounds_or_where_nothing_is_better():
    assert tune.search([config()], LIMITS, Clock(config(stages=5)), 1) == (config(stages=3), 3.0)
    clock = Clock(config())
    assert tune.search([config()], LIMITS, clock, 9) == (config(), 1.0)
    assert len(clock.asked) == 1 + len(tune.neighbours(config(), LIMITS))
    with pytest.raises(ValueError, match="none of the table's own configs"):
        tune.search([config(rows=16)], LIMITS, clock, 9)


def test_entries_join_equal_neighbours_and_leave_the_last_open():
    one, other = config(), config(stages=3)
    found = tune.entries([(1, one), (16, one), (64, other), (256, one)])
    assert [(entry["max_rows"], entry["num_stages"]) for entry in found] == [
        (16, 2),
        (64, 3),
        (None, 2),
    ]
    assert [entry["max_rows"] for entry in tune.entries([(8, one)])] == [None]


@pytest.mark.parametrize("name", ["sm80", "sm90", "interpreter"])
def test_tables_are_written_as_they_are(name):
    text = (configs.TABLES / f"{name}.json").read_text(encoding="utf-8")
    assert tune.render(json.loads(text)) == text


def test_merged_tables_are_valid_and_say_what_was_measured(tmp_path):
    table = json.loads((configs.TABLES / "sm90.json").read_text(encoding="utf-8"))
    found = tune.entries([(16, config()), (64, config(stages=3))])
    merged = tune.merge(table, "side_norm", "bf16", found, {"gpu": "H200"})
    path = tmp_path / "sm90.json"
    path.write_text(tune.render(merged))
    before, after = configs.read_table(configs.TABLES / "sm90.json"), configs.read_table(path)
    assert after["side_norm"]["bf16"] == ((16, config()), (None, config(stages=3)))
    after["side_norm"]["bf16"] = before["side_norm"]["bf16"]
    assert after == before
    assert merged["provenance"]["measured"]["side_norm bf16"] == {"gpu": "H200"}
    assert "side_norm bf16" not in table["provenance"]["measured"]
    assert tune.render(json.loads(path.read_text())) == path.read_text()


def test_a_forced_config_is_in_force_for_its_op_alone():
    cpu = torch.device("cpu")
    usual = configs.pick("side_norm", "fp32", 1, cpu)
    with tune.forced("side_norm", config()):
        assert configs.pick("side_norm", "fp32", 1, cpu) == config()
        assert configs.pick("sketch_norm", "fp32", 1, cpu) != config()
    assert configs.pick("side_norm", "fp32", 1, cpu) is usual


@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_every_op_of_the_tables_can_be_tuned(name):
    table = configs.read_table(configs.TABLES / f"{name}.json")
    assert set(JOBS) == set(table)
    for op, job in JOBS.items():
        for entries in table[op].values():
            for _, each in entries:
                assert each.blocks.keys() == job.limits.keys()
                for block, (low, high) in job.limits.items():
                    assert low <= each.blocks[block] <= high


@pytest.mark.parametrize("op", JOBS)
def test_the_reference_answers_every_op_and_agrees_with_itself(op):
    job = JOBS[op]
    inputs = Inputs(Case(op, "tiny", 3, 1, "fp32", variant="all"), "cpu")
    wanted = job.expected(inputs.with_copies(job.changed))
    verify(op, "fp32", job.expected(inputs.with_copies(job.changed)), wanted)
    with pytest.raises(Mismatch):
        verify(op, "fp32", tuple(1.1 * each for each in wanted), wanted)
    with pytest.raises(Mismatch):
        verify(op, "fp32", tuple(each * float("nan") for each in wanted), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.tune"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "bench.tune measures on a GPU, and torch sees none here\n"
