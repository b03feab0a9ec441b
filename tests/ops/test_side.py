"""Products with the packed bank: add_side_, dual_linear, side_norm."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.ops.conftest import DEVICE
from wise_ext import ops

ABOUT = ("add_side_", "dual_linear", "side_norm", "sketch_norm")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, d_out, d_in, shards: tails of every kind, nothing at all, more rows than one pass takes,
# more columns than one tile holds.
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 45, 3),
    (70, 9, 31, 2),
    (300, 4, 96, 1),
    (3, 16, 2048, 3),
    (40, 33, 1543, 2),
    (0, 4, 40, 2),
    (2, 0, 40, 2),
    (2, 3, 0, 2),
    (2, 3, 40, 0),
]
nothing_native = pytest.mark.skipif(not ops.native_loaded(), reason="needs the native module")


def routes(rows, shards):
    return torch.randint(-1, shards, (rows,), dtype=torch.int32) if shards else main(rows)


def main(rows):
    return torch.full((rows,), -1, dtype=torch.int32)


def oracle_side(x, bank, route):
    """D_route[n] x[n] in float64, zero on the main memory."""
    out = torch.zeros(x.shape[0], bank.dense.shape[1], dtype=torch.float64)
    for n, shard in enumerate(route.tolist()):
        if shard >= 0:
            out[n] = bank.dense[shard] @ x[n].double()
    return out


def plain_side(x, bank, route, dtype):
    out = torch.zeros(x.shape[0], bank.dense.shape[1], dtype=dtype)
    for n, shard in enumerate(route.tolist()):
        if shard >= 0:
            out[n] = bank.dense[shard].to(dtype) @ x[n].to(dtype)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_side_matches_the_definition(provider, make_bank, assert_as_good, shape, dtype):
    rows, d_out, d_in, k = shape
    bank = make_bank(k, d_out, d_in, dtype)
    x, y, route = (
        torch.randn(rows, d_in).to(dtype),
        torch.randn(rows, d_out).to(dtype),
        routes(rows, k),
    )
    before = [t.clone() for t in (x, *bank.tensors, route)]
    got = y.clone()
    assert ops.add_side_(got, x, *bank.tensors, route) is None
    oracle = y.double() + oracle_side(x, bank, route)
    assert_as_good(got, oracle, y + plain_side(x, bank, route, dtype))
    assert torch.equal(got[route < 0], y[route < 0])
    for after, was in zip((x, *bank.tensors, route), before, strict=True):
        assert torch.equal(after, was)


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "stored"),
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
    ],
)
def test_add_side_takes_mixed_dtypes(provider, make_bank, x_dtype, y_dtype, stored):
    bank = make_bank(2, 6, 50, stored)
    x, y, route = torch.randn(9, 50).to(x_dtype), torch.randn(9, 6).to(y_dtype), routes(9, 2)
    got = y.clone()
    ops.add_side_(got, x, *bank.tensors, route)
    exact = (y.double() + oracle_side(x, bank, route)).to(y_dtype)
    torch.testing.assert_close(got, exact)


def test_add_side_rounds_once(provider, to_bits):
    """1 + 2^-8 rounds to 1 in bfloat16, twice 2^-8 does not: the sum comes before the rounding."""
    mask_bits = to_bits(torch.ones(1, 1, 2, dtype=torch.bool))
    values = torch.full((2,), 2.0**-8, dtype=torch.bfloat16)
    y, x = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    ops.add_side_(y, x, mask_bits, values, torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32))
    assert y.item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_to_storage_is_torchs(provider, to_bits, dtype):
    """Subnormal, overflowing, halfway and special sums round as torch rounds."""
    sums = torch.tensor(
        [0.0, 1e-8, 6e-8, 5.97e-5, 6.1e-5, 1 + 2**-11, 65519.0, 65520.0, 1e39, 3.4e38]
    )
    sums = torch.cat([sums, -sums, torch.tensor([float("nan"), float("inf")]), torch.randn(500)])
    n = len(sums)
    mask_bits = to_bits(torch.ones(1, 1, 1, dtype=torch.bool))
    y = torch.zeros(n, 1, dtype=dtype)
    ops.add_side_(
        y, sums[:, None], mask_bits, torch.ones(1), torch.tensor([0, 1]), torch.zeros(n).int()
    )
    assert torch.equal(y[:, 0].nan_to_num(7.0), sums.to(dtype).nan_to_num(7.0))


def test_every_half_widens_exactly(provider, to_bits):
    """All 65,536 bit patterns of both 16-bit dtypes, as activations and as stored values."""
    # Emulated and interpreted kernels are slow: an odd step meets every exponent too.
    step = 1 if provider == "reference" or provider in ops.ISAS or DEVICE == "cuda" else 37
    bits = torch.arange(-(2**15), 2**15, step, dtype=torch.int32).to(torch.int16)
    n = len(bits)
    one, at_zero = to_bits(torch.ones(1, 1, 1, dtype=torch.bool)), torch.zeros(n).int()
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)[:, None]
        expected = x.float()
        if provider == "triton":
            # Its float32 products are sums of parts, and the parts of infinity are no numbers.
            expected = torch.where(expected.isinf(), float("nan"), expected)
        y = torch.zeros(n, 1)
        ops.add_side_(y, x, one, torch.ones(1), torch.tensor([0, 1]), at_zero)
        assert equal_or_nan(y, expected)
        mask = to_bits(torch.ones(1, n, 1, dtype=torch.bool))
        y = torch.zeros(1, n)
        pointers = torch.arange(n + 1)
        ops.add_side_(y, torch.ones(1, 1), mask, x[:, 0].clone(), pointers, at_zero[:1])
        assert equal_or_nan(y[0], expected[:, 0])


def equal_or_nan(a, b):
    return torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))


def test_add_side_takes_any_strides(provider, make_bank):
    bank = make_bank(2, 6, 50)
    route = routes(9, 2)
    x, y = torch.randn(50, 9).T, torch.randn(9, 12)[:, 3:9]
    mask_bits = bank.mask_bits.transpose(0, 1).contiguous().transpose(0, 1)
    route = torch.stack([route, route], 1)[:, 0]
    expected = y.double() + oracle_side(x, bank, route)
    ops.add_side_(y, x, mask_bits, bank.values, bank.row_ptr, route)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    x = torch.randn(9, 4, 50)[:, 1]
    expected = y.double() + oracle_side(x, bank, route)
    ops.add_side_(y, x, *bank.tensors, route)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_shard_of_a_bank_can_be_used_alone(provider, make_bank):
    bank = make_bank(3, 5, 40)
    x, y = torch.randn(4, 40), torch.zeros(4, 5)
    ops.add_side_(y, x, bank.mask_bits[1:2], bank.values, bank.row_ptr[5:11], torch.zeros(4).int())
    torch.testing.assert_close(y.double(), x.double() @ bank.dense[1].T, atol=1e-5, rtol=1e-5)


@nothing_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 45, 3), (300, 4, 96, 1), (40, 33, 1543, 2)], ids=str)
def test_rows_do_not_influence_one_another(provider, make_bank, shape, dtype):
    if provider == "reference":
        pytest.skip("torch's matmul promises no bits across batch sizes")
    rows, d_out, d_in, k = shape
    bank = make_bank(k, d_out, d_in, dtype)
    x, y, route = (
        torch.randn(rows, d_in).to(dtype),
        torch.randn(rows, d_out).to(dtype),
        routes(rows, k),
    )
    together = y.clone()
    ops.add_side_(together, x, *bank.tensors, route)
    for n in range(0, rows, 7):
        alone = y[n : n + 1].clone()
        ops.add_side_(alone, x[n : n + 1], *bank.tensors, route[n : n + 1])
        assert torch.equal(alone, together[n : n + 1])


def test_same_bits_run_to_run_and_for_any_number_of_threads(provider, make_bank):
    bank = make_bank(2, 600, 700)
    x, route = torch.randn(40, 700), routes(40, 2)
    rows, shards = torch.arange(40).int(), (torch.arange(40) % 2).int()

    def run():
        y = torch.ones(40, 600)
        ops.add_side_(y, x, *bank.tensors, route)
        return y, ops.side_norm(x, *bank.tensors, rows, shards)

    first, again = run(), run()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, threaded, strict=True):
        assert torch.equal(a, b)
        if provider != "reference":
            assert torch.equal(a, c)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_dual_linear(provider, make_bank, assert_as_good, shape, dtype, biased):
    rows, d_out, d_in, k = shape
    bank = make_bank(k, d_out, d_in, dtype)
    x, weight = torch.randn(rows, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype)
    bias = torch.randn(d_out).to(dtype) if biased else None
    route = routes(rows, k)
    got = ops.dual_linear(x, weight, bias, *bank.tensors, route)
    assert got.dtype == dtype
    base = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    plain = F.linear(x, weight, bias) + plain_side(x, bank, route, dtype)
    assert_as_good(got, base + oracle_side(x, bank, route), plain)
    assert torch.equal(got[route < 0], F.linear(x, weight, bias)[route < 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_side_norm(provider, make_bank, assert_as_good, shape, dtype):
    rows, d_out, d_in, k = shape
    bank = make_bank(k, d_out, d_in, dtype)
    x = torch.randn(rows, d_in).to(dtype)
    pairs = 280 if rows and k else 0
    row = torch.randint(0, max(rows, 1), (pairs,), dtype=torch.int32)
    shard = torch.randint(0, max(k, 1), (pairs,), dtype=torch.int32)
    got = ops.side_norm(x, *bank.tensors, row, shard)
    assert got.dtype == torch.float32
    oracle = oracle_side(x[row.long()], bank, shard).norm(dim=1)
    plain = plain_side(x[row.long()], bank, shard, dtype).norm(dim=1)
    assert_as_good(got, oracle, plain)


@pytest.mark.parametrize(
    ("rows", "shards", "rank", "d_in"),
    [(1, 1, 1, 1), (5, 3, 4, 45), (70, 2, 64, 96), (3, 5, 33, 1543), (0, 2, 4, 40), (3, 0, 4, 40)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sketch_norm(provider, assert_as_good, rows, shards, rank, d_in, dtype):
    x, sketch = torch.randn(rows, d_in).to(dtype), torch.randn(shards, rank, d_in).to(dtype)
    got = ops.sketch_norm(x, sketch)
    assert got.dtype == torch.float32 and got.shape == (rows, shards)
    oracle = torch.einsum("nd,krd->nkr", x.double(), sketch.double()).norm(dim=-1)
    plain = torch.einsum("nd,krd->nkr", x.float(), sketch.float()).norm(dim=-1)
    assert_as_good(got, oracle, plain)


def test_sketch_norm_takes_mixed_dtypes_and_strides(provider):
    x, sketch = torch.randn(45, 6).T, torch.randn(3, 45, 4).transpose(1, 2).bfloat16()
    expected = torch.einsum("nd,krd->nkr", x, sketch.float()).norm(dim=-1)
    torch.testing.assert_close(ops.sketch_norm(x, sketch), expected)


def test_a_sketch_estimates_the_indicator(provider, make_bank):
    """Relative error about 1/sqrt(2r) for a projection to r numbers (docs/ops.md)."""
    bank = make_bank(2, 300, 200)
    projection = torch.randn(64, 300) / 64**0.5
    sketch = torch.stack([projection @ delta.float() for delta in bank.dense])
    x = torch.randn(50, 200)
    exact = torch.stack([(x.double() @ delta.T).norm(dim=1) for delta in bank.dense], 1)
    error = ops.sketch_norm(x, sketch).double() / exact - 1
    assert 0.5 < error.square().mean().sqrt() * (2 * 64) ** 0.5 < 2


def test_add_side_has_gradients_in_x_and_y(provider, make_bank):
    bank = make_bank(3, 5, 40)
    route = torch.tensor([2, -1, 0, 1, 2], dtype=torch.int32)
    x, y = torch.randn(5, 40, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    out = y * 2
    ops.add_side_(out, x, *bank.tensors, route)
    grad = torch.randn(5, 5)
    out.backward(grad)
    assert torch.equal(y.grad, 2 * grad)
    expected = torch.zeros(5, 40, dtype=torch.float64)
    for n, shard in enumerate(route.tolist()):
        if shard >= 0:
            expected[n] = bank.dense[shard].T @ grad[n].double()
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dual_linear_has_gradients(provider, make_bank, dtype):
    bank = make_bank(2, 5, 40, dtype)
    route = torch.tensor([1, -1, 0], dtype=torch.int32)
    leaves = [torch.randn(3, 40), torch.randn(5, 40), torch.randn(5)]
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    ops.dual_linear(*leaves, *bank.tensors, route).sum().backward()
    x, weight, bias = (t.detach().double().requires_grad_() for t in leaves)
    dense = torch.stack([bank.dense[1], torch.zeros(5, 40).double(), bank.dense[0]])
    (F.linear(x, weight, bias) + torch.einsum("nod,nd->no", dense, x)).sum().backward()
    for got, want in zip(leaves, (x, weight, bias), strict=True):
        torch.testing.assert_close(got.grad, want.grad.to(dtype), atol=0.05, rtol=0.02)


def test_gradcheck_in_double(make_bank):
    bank = make_bank(2, 4, 35, torch.float64)
    route = torch.tensor([1, -1, 0], dtype=torch.int32)
    leaves = [torch.randn(3, 35), torch.randn(4, 35), torch.randn(4)]
    leaves = [t.double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.dual_linear(x, w, b, *bank.tensors, route), leaves
    )


def test_side_norm_carries_no_gradient(provider, make_bank):
    bank = make_bank(1, 4, 35)
    pair = torch.zeros(1, dtype=torch.int32)
    x = torch.randn(1, 35, requires_grad=True)
    assert not ops.side_norm(x, *bank.tensors, pair, pair).requires_grad
