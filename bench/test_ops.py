"""Reference against native kernels, with pytest-benchmark; results are checked before the clock.

OMP_NUM_THREADS=1 python -m pytest bench/test_ops.py --benchmark-group-by=func,param:shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wise_ext import ops

# d_out x d_in of SmolLM2-135M's down projection, and a quarter of the rows of Llama-3-8B's.
SHAPES = [(576, 1536), (1024, 14336)]
DENSITY = 0.2
PROVIDERS = ["reference", *(["native"] if ops.native_loaded() else [])]


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation to time."""
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


def random_shard(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """mask_bits [1, d_out, W], values, row_ptr, and the dense delta."""
    words = d_in // 32
    bits = torch.rand(d_out, words, 32) < DENSITY
    mask_bits = (bits.long() << torch.arange(32)).sum(-1).to(torch.int32)
    values, row_ptr = ops.pack(torch.randn(d_out, d_in).to(dtype), mask_bits)
    return mask_bits[None], values, row_ptr, ops.unpack(mask_bits, values, row_ptr, d_in)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 64])
def test_add_side(
    benchmark: Callable[..., object],
    provider: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
) -> None:
    *bank, dense = random_shard(*shape, dtype)
    x, route = torch.randn(rows, shape[1]).to(dtype), torch.zeros(rows, dtype=torch.int32)
    y = torch.zeros(rows, shape[0])
    ops.add_side_(y, x, *bank, route)
    torch.testing.assert_close(y, x.float() @ dense.float().T, atol=1e-2, rtol=1e-3)
    benchmark(ops.add_side_, y, x, *bank, route)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 64])
def test_dense_linear(
    benchmark: Callable[..., object], shape: tuple[int, int], dtype: torch.dtype, rows: int
) -> None:
    """The yardstick: the dense matmul that the packed product is added to."""
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    benchmark(F.linear, x, weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_merge(
    benchmark: Callable[..., object], provider: str, shape: tuple[int, int]
) -> None:
    deltas = [torch.randn(shape) * (torch.rand(shape) < DENSITY) for _ in range(5)]
    arguments = (deltas, [1.0] * 5, 0.2)
    expected = torch.ops.wise_ext_reference.ties_merge(*arguments)
    assert torch.equal(ops.ties_merge(*arguments), expected)
    benchmark(ops.ties_merge, *arguments)
