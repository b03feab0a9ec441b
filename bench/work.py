"""What an op has to move and to multiply, whoever does it: the floor of its time.

Bytes count each input once and each output once; an implementation that moves more (a dense delta
for a packed one) gets no credit for it. Multiply and add are two operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import DENSITY, DTYPES, SKETCH_ROWS, Case
from wise_ext.memory.masks import bits_per_row, mask_words

FP32, INT32, INT64 = 4, 4, 8


@dataclass(frozen=True)
class Work:
    """Bytes to move and floating-point operations to do."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The roofline's time: the slower of moving and multiplying."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)

    def bound(self, bytes_per_s: float, flops_per_s: float) -> str:
        """Which of the two it is: "memory" or "compute"."""
        return "memory" if self.bytes / bytes_per_s >= self.flops / flops_per_s else "compute"


def entries(case: Case) -> int:
    """Masked entries of one shard."""
    return case.d_out * bits_per_row(case.d_in, DENSITY)


def routed_rows(case: Case) -> int:
    """Rows that go to some shard, as `bench.inputs.routes` draws them."""
    return {"all": case.rows, "half": (case.rows + 1) // 2, "none": 0}[case.variant]


def linear(case: Case) -> Work:
    """Weight and x once, y once."""
    size = DTYPES[case.dtype].itemsize
    elements = case.d_out * case.d_in + case.rows * (case.d_in + case.d_out)
    return Work(elements * size, 2.0 * case.rows * case.d_out * case.d_in)


def mask_bytes(case: Case) -> int:
    """The bits of one shard's mask."""
    return case.d_out * mask_words(case.d_in) * INT32


def shard_bytes(case: Case) -> int:
    """One packed shard: bits, values, offsets."""
    values = entries(case) * DTYPES[case.dtype].itemsize
    return mask_bytes(case) + values + (case.d_out + 1) * INT64


def side(case: Case) -> Work:
    """The packed product alone: the shards that occur, once each, and their rows' products."""
    routed = routed_rows(case)
    shards = min(case.shards, routed)
    return Work(shards * shard_bytes(case) + case.rows * INT32, 2.0 * routed * entries(case))


def add_side(case: Case) -> Work:
    """The side, with x read and y read and written where rows are routed."""
    size = DTYPES[case.dtype].itemsize
    return side(case) + Work(routed_rows(case) * (case.d_in + 2 * case.d_out) * size, 0.0)


def dual_linear(case: Case) -> Work:
    """The plain linear and the side; x and y are counted once."""
    return linear(case) + side(case)


def side_norm(case: Case) -> Work:
    """Every row with every shard."""
    pairs = case.rows * case.shards
    moved = case.shards * shard_bytes(case) + pairs * (2 * INT32 + FP32)
    x = case.rows * case.d_in * DTYPES[case.dtype].itemsize
    return Work(moved + x, 2.0 * pairs * entries(case))


def linear_side_norm(case: Case) -> Work:
    """The plain linear and every indicator; x is counted once."""
    norms = side_norm(case)
    x = case.rows * case.d_in * DTYPES[case.dtype].itemsize
    return linear(case) + Work(norms.bytes - x, norms.flops)


def sketch_norm(case: Case) -> Work:
    """k r x d_in sketches, x, one number a row and shard."""
    sketch = case.shards * SKETCH_ROWS * case.d_in
    moved = (sketch + case.rows * case.d_in) * DTYPES[case.dtype].itemsize
    return Work(moved + case.rows * case.shards * FP32, 2.0 * case.rows * sketch)


def dual_linear_train(case: Case) -> Work:
    """x, base and the fp32 delta in; y, the fp32 side and the indicator out."""
    size = DTYPES[case.dtype].itemsize
    moved = case.rows * (case.d_in + 2 * case.d_out) * size + case.d_out * case.d_in * FP32
    moved += case.rows * (case.d_out + 1) * FP32
    return Work(moved, 2.0 * case.rows * case.d_out * case.d_in)


def masked_update(case: Case) -> Work:
    """Delta in and out, the gradient, the mask; packed states in and out with Adam.

    Lines of a matrix a fifth of whose entries change are moved whole.
    """
    moved = 3 * case.d_out * case.d_in * FP32 + mask_bytes(case) + (case.d_out + 1) * INT64
    states = 0 if case.variant == "sgd" else 4 * entries(case) * FP32
    return Work(moved + states, (2.0 if case.variant == "sgd" else 12.0) * entries(case))


def train_step(case: Case) -> Work:
    """Forward, backward to the delta's gradient, Adam."""
    size = DTYPES[case.dtype].itemsize
    read = case.rows * (case.d_in + case.d_out) * size + case.rows * (case.d_out + 2) * FP32
    gradient = case.d_out * case.d_in * FP32 + mask_bytes(case)
    backward = Work(read + gradient, 2.0 * case.rows * case.d_out * case.d_in)
    return dual_linear_train(case) + backward + masked_update(case)


def packing(case: Case) -> Work:
    """The dense delta on one side, the packed shard on the other; the same both ways."""
    dense = case.d_out * case.d_in * DTYPES[case.dtype].itemsize
    return Work(dense + shard_bytes(case), 0.0)


def ties_merge(case: Case) -> Work:
    """Every delta once and the result. Any exact algorithm reads them more often."""
    return Work((case.shards + 1) * case.d_out * case.d_in * FP32, 0.0)


WORK: dict[str, Callable[[Case], Work]] = {
    "add_side_": add_side,
    "dual_linear": dual_linear,
    "side_norm": side_norm,
    "linear_side_norm": linear_side_norm,
    "sketch_norm": sketch_norm,
    "dual_linear_train": dual_linear_train,
    "train_step": train_step,
    "masked_update_": masked_update,
    "pack": packing,
    "unpack": packing,
    "ties_merge": ties_merge,
    "linear": linear,
    "mv": linear,
}


# Of the CUDA kernel: three passes count magnitudes to find each threshold exactly, one merges.
TIES_PASSES = 4


def ties_merge_moved(case: Case) -> int:
    """What it moves: every delta once a pass, and the result."""
    return (TIES_PASSES * case.shards + 1) * case.d_out * case.d_in * FP32
