"""The ways native CPU kernels can take, which shapes and data choose: all give the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wise_ext import ops
from wise_ext.errors import NativeError

pytestmark = pytest.mark.skipif(not ops.native_loaded(), reason="needs the native module")


@pytest.fixture(params=ops.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set; skips where this processor has not got it."""
    try:
        ops.set_cpu_isa(request.param)
    except NativeError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    ops.set_cpu_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", [1543, 1024])
def test_one_few_and_many_rows_give_the_same_bits(isa, make_bank, dtype, d_in):
    """Rows of x are walked alone, a few at once, or in panels; the last packed rows exactly."""
    bank = make_bank(1, 83, d_in, dtype)
    x, y = torch.randn(150, d_in), torch.randn(150, 83)
    alone = y.clone()
    one = torch.zeros(1, dtype=torch.int32)
    for n in range(150):
        ops.add_side_(alone[n : n + 1], x[n : n + 1], *bank.tensors, one)
    torch.testing.assert_close(
        alone.double(), y.double() + x.double() @ bank.dense[0].T, atol=1e-3, rtol=1e-4
    )
    for rows in (2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 128, 129, 150):
        together = y[:rows].clone()
        ops.add_side_(together, x[:rows], *bank.tensors, torch.zeros(rows, dtype=torch.int32))
        assert torch.equal(together, alone[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sketch_norm_is_the_same_bits_alone_and_for_any_number_of_threads(isa, dtype):
    x, sketch = torch.randn(140, 1543), torch.randn(3, 21, 1543).to(dtype)
    together = ops.sketch_norm(x, sketch)
    for rows in (1, 2, 4, 8, 9, 64, 129):
        assert torch.equal(ops.sketch_norm(x[:rows], sketch), together[:rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.sketch_norm(x, sketch), together)
    finally:
        torch.set_num_threads(threads)


def _misleading(shape: tuple[int, int]) -> torch.Tensor:
    """Small where a sample of 64 entries in every 2048 looks, large elsewhere."""
    delta = torch.randn(shape).flatten()
    delta.view(-1, 2048)[:, :64] *= 1e-3
    return delta.view(shape)


@pytest.mark.parametrize(
    "make",
    [
        torch.randn,
        lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.2),
        lambda shape: torch.randn(shape).sign(),
        lambda shape: torch.randint(-3, 4, shape).float(),
        lambda shape: torch.arange(float(shape[0] * shape[1])).view(shape),
        lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.001),
        _misleading,
    ],
    ids=["dense", "sparse", "one magnitude", "few", "sorted", "too few", "misleading"],
)
@pytest.mark.parametrize("density", [0.2, 0.999])
def test_ties_finds_thresholds_whatever_its_sample_says(isa, make, density):
    deltas = [make((512, 1024)) for _ in range(2)]
    expected = torch.ops.wise_ext_reference.ties_merge(deltas, [1.0, 2.0], density)
    assert torch.equal(ops.ties_merge(deltas, [1.0, 2.0], density), expected)
