"""The emulator runs right kernels right, and wrong ones not at all."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

SEEDS = range(8)
THREADS = 64
COLLECTIVES = 17


def run(emulator, name: str, values: np.ndarray, outputs: int = 1) -> np.ndarray:
    """Run one of probes.cu's kernels over the values, 64 a block; raise what it fails with."""
    values = values.astype(np.float32)
    out = np.full(values.size * outputs, np.nan, np.float32)
    failure = emulator.wise_probe(
        name.encode(), values.ctypes.data, out.ctypes.data, values.size // THREADS
    )
    if failure is not None:
        raise RuntimeError(failure.decode())
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_right_in_any_order(emulator, seed):
    emulator.wise_emulator_schedule(seed)
    values = np.arange(5 * THREADS)
    backwards = values.reshape(5, THREADS)[:, ::-1].ravel()
    assert np.array_equal(run(emulator, "reverse", values), backwards)
    sums = np.arange(THREADS)
    for _ in range(3):
        sums = sums + np.roll(sums, -1)
    assert np.array_equal(run(emulator, "steps", np.arange(THREADS)), sums)


@pytest.mark.parametrize("name", ["reverse", "steps"])
def test_a_missing_barrier_shows_under_some_schedule(emulator, name):
    values = np.arange(THREADS)
    right = run(emulator, name, values)
    wrong = 0
    for seed in SEEDS:
        emulator.wise_emulator_schedule(seed)
        wrong += not np.array_equal(run(emulator, f"{name} without barrier", values), right)
    assert wrong >= len(SEEDS) // 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("divergent shuffle", "mask names a lane that has ended|threads wait for each other"),
        ("two shuffles", r"wait for each other: 32 at a warp function .*, 32 at a warp function"),
        ("deadlock", "48 at a barrier at probes.cu:.*, 16 at a warp function at probes.cu"),
        ("foreign mask", "mask does not name the calling lane"),
        ("two barriers", "threads meet at different barriers"),
        ("ended lane", "mask names a lane that has ended|threads wait for each other"),
        ("stranger", "lane 15 reads from lane 16, which takes no part, at probes.cu"),
        ("misaligned", r"misaligned vector access at probes.cu:\d+, block \(0, 0, 0\), thread 5"),
    ],
)
def test_wrong_kernels_are_refused_in_any_order(emulator, name, complaint, seed):
    emulator.wise_emulator_schedule(seed)
    with pytest.raises(RuntimeError, match=complaint) as caught:
        run(emulator, name, np.arange(THREADS))
    assert str(caught.value).startswith("wise_ext: probe on the emulator: ")
    # And the next launch is as good as new.
    assert np.array_equal(run(emulator, "reverse", np.arange(THREADS)), np.arange(THREADS)[::-1])


def test_shared_memory_starts_as_nan_in_every_block(emulator):
    for _ in range(2):
        run(emulator, "reverse", np.arange(3 * THREADS))
        assert np.isnan(run(emulator, "poison", np.zeros(3 * THREADS))[:THREADS]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_collective(emulator, seed):
    emulator.wise_emulator_schedule(seed)
    values = np.random.default_rng(seed).integers(-9, 9, THREADS)
    got = run(emulator, "collectives", values, COLLECTIVES).reshape(2, 32, COLLECTIVES)
    lanes = np.arange(32)
    segment = lanes // 8 * 8
    for warp, mine in enumerate(values.reshape(2, 32)):

        def taken(source, fits, mine=mine):
            return mine[np.where(fits, source, lanes)]

        expected = [
            mine[(lanes * 7 + 3) % 32],
            mine[segment + (lanes + 5) % 8],
            taken(lanes - 3, lanes >= 3),
            taken(lanes - 3, lanes - 3 >= segment),
            taken((lanes + 3) % 32, lanes + 3 < 32),
            taken((lanes + 3) % 32, lanes + 3 < segment + 8),
            mine[lanes ^ 13],
            taken(lanes ^ 13, (lanes ^ 13) < segment + 8),
            [(mine[:lane] > 0).sum() for lane in lanes],
            np.full(32, (mine == 7).any()),
            np.full(32, (mine < 100).all()),
            [(mine == own).sum() for own in mine],
            np.full(32, mine.sum()),
            np.full(32, mine.min()),
            np.full(32, mine.max() + 1000),
            np.full(32, (values > 0).sum()),
            mine[lanes // 16 * 16],
        ]
        for number, column in enumerate(expected):
            assert np.array_equal(got[warp, :, number], column), number


def test_launches_that_cannot_be(emulator):
    launched = emulator.wise_emulator_launches()
    for arguments, complaint in (
        ((1, 1, 33, 0), "33 threads a block are not 1 to 32 whole warps"),
        ((1, 1, 0, 0), "0 threads"),
        ((1, 1, 2048, 0), "2048 threads"),
        ((2**31, 1, 32, 0), "blocks is too large"),
        ((1, 65536, 32, 0), "1 x 65536 x 1 blocks is too large"),
        ((-1, 1, 32, 0), "blocks is too large"),
        ((1, 1, 32, 2**20), "bytes of dynamic shared memory are too many"),
    ):
        failure = emulator.wise_probe_launch(*arguments)
        assert failure is not None, arguments
        assert re.search(complaint, failure.decode()), failure
    assert emulator.wise_emulator_launches() == launched
    for arguments in ((0, 1, 32, 0), (1, 0, 32, 0)):
        assert emulator.wise_probe_launch(*arguments) is None
    assert emulator.wise_emulator_launches() == launched, "a grid without a block is no launch"
    assert emulator.wise_probe_launch(3, 2, 1024, 100 * 1024) is None
    assert emulator.wise_emulator_launches() == launched + 1


def test_it_is_fast_enough_to_test_with(emulator):
    """Fifty blocks of 64 threads, seventeen collectives each."""
    before = time.process_time()
    run(emulator, "collectives", np.zeros(50 * THREADS), COLLECTIVES)
    assert time.process_time() - before < 2
