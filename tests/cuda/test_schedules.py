"""The CUDA ops on the emulator give the same bytes in whatever order threads and blocks run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.emulator import library
from wise_ext.ops import reference

SEEDS = (1, 2, 3)
K, D_OUT, D_IN, N = 3, 37, 300, 5


def bank(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """mask_bits [K, D_OUT, W] with rubbish past the last column, values and row_ptr."""
    words = -(-D_IN // 32)
    mask_bits = torch.randint(-(2**31), 2**31, (K, D_OUT, words), dtype=torch.int32)
    mask_bits &= torch.randint(-(2**31), 2**31, (K, D_OUT, words), dtype=torch.int32)
    mask_bits[1, 5] = 0
    counts = reference.bits_to_bool(mask_bits, D_IN).sum(-1).flatten()
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return mask_bits, torch.randn(int(row_ptr[-1])).to(dtype), row_ptr


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]:
    """A call of each op, on inputs of its own."""
    ops = torch.ops.wise_ext_emulated
    packed = bank(dtype)
    x, y = torch.randn(N, D_IN).to(dtype), torch.randn(N, D_OUT).to(dtype)
    weight = torch.randn(D_OUT, D_IN).to(dtype)
    route = torch.tensor([0, -1, 2, 2, 1], dtype=torch.int32)
    rows, shards = torch.randint(0, N, (9,)).int(), torch.randint(0, K, (9,)).int()
    delta = torch.randn(D_OUT, D_IN).to(dtype)
    deltas = [torch.randn(D_OUT, D_IN) for _ in range(3)]

    def add_side() -> Tensor:
        out = y.clone()
        ops.add_side_(out, x, *packed, route)
        return out

    return {
        "add_side_": add_side,
        "dual_linear": lambda: ops.dual_linear(x, weight, None, *packed, route),
        "side_norm": lambda: ops.side_norm(x, *packed, rows, shards),
        "pack": lambda: ops.pack(delta, packed[0][0]),
        "unpack": lambda: ops.unpack(
            packed[0][1], packed[1], packed[2][D_OUT : 2 * D_OUT + 1], D_IN
        ),
        "ties_merge": lambda: ops.ties_merge(deltas, [0.5, 1.0, 2.0], 0.3),
    }


def bytes_of(answer: Tensor | tuple[Tensor, ...]) -> list[bytes]:
    tensors = (answer,) if isinstance(answer, Tensor) else answer
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "op", ["add_side_", "dual_linear", "side_norm", "pack", "unpack", "ties_merge"]
)
def test_every_schedule_gives_the_same_bytes(emulator, op, dtype):
    assert op in library.load_ops()
    call = calls(dtype)[op]
    emulator.wise_emulator_schedule(0)
    launched = emulator.wise_emulator_launches()
    expected = bytes_of(call())
    assert emulator.wise_emulator_launches() > launched
    for seed in SEEDS:
        emulator.wise_emulator_schedule(seed)
        assert bytes_of(call()) == expected, seed
