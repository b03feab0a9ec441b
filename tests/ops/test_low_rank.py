"""Products with shards of low rank: every implementation against the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.conftest import DEVICE
from tests.ops.test_cpu_paths import isa  # noqa: F401
from wise_ext import ops

ABOUT = ("add_low_rank_",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, d_out, d_in, ranks: tails of every kind, nothing at all, more rows than one pass takes, more
# columns than one tile holds.
SHAPES = [
    (1, 1, 1, [1]),
    (5, 7, 45, [3, 0, 9]),
    (70, 9, 31, [5, 1]),
    (300, 4, 96, [6]),
    (3, 576, 2048, [0, 64, 2]),
    (40, 1033, 1543, [20, 70]),
    (9, 16, 32, [0, 0]),
    (0, 4, 40, [2, 3]),
    (2, 0, 40, [2, 3]),
    (2, 3, 0, [2, 3]),
    (2, 3, 40, []),
]


@dataclass
class Shards:
    """Entries of the given ranks, and the delta of each in float64."""

    left: Tensor
    right: Tensor
    rank_ptr: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.left, self.right, self.rank_ptr

    def delta(self, entry: int) -> Tensor:
        rows = slice(*self.rank_ptr[entry : entry + 2].tolist())
        return self.left[rows].double().T @ self.right[rows].double()

    def side(self, x: Tensor, route: Tensor) -> Tensor:
        """D_route[n] x[n] in float64, zero on the main memory."""
        out = torch.zeros(len(x), self.left.shape[1], dtype=torch.float64)
        for n, entry in enumerate(route.tolist()):
            if entry >= 0:
                out[n] = self.delta(entry) @ x[n].double()
        return out


def shards(ranks: list[int], d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> Shards:
    total = sum(ranks)
    rank_ptr = torch.tensor([0, *ranks]).cumsum(0)
    left = torch.randn(total, d_out) / max(1, total) ** 0.5
    return Shards(left.to(dtype), torch.randn(total, d_in).to(dtype), rank_ptr)


def routes(rows: int, entries: int) -> Tensor:
    if not entries:
        return torch.full((rows,), -1, dtype=torch.int32)
    return torch.randint(-1, entries, (rows,), dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_formula(provider, assert_as_good, shape, dtype):
    rows, d_out, d_in, ranks = shape
    stored, route = shards(ranks, d_out, d_in, dtype), routes(rows, len(ranks))
    x, y = torch.randn(rows, d_in).to(dtype), torch.randn(rows, d_out).to(dtype)
    before = [t.clone() for t in (x, *stored.tensors, route)]
    got = y.clone()
    assert ops.add_low_rank_(got, x, *stored.tensors, route) is None
    oracle = y.double() + stored.side(x, route)
    assert_as_good(got, oracle, (y.float() + stored.side(x, route).float()).to(dtype))
    assert torch.equal(got[route < 0], y[route < 0])
    for after, was in zip((x, *stored.tensors, route), before, strict=True):
        assert torch.equal(after, was)


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "kept"),
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
    ],
)
def test_dtypes_may_be_mixed(provider, x_dtype, y_dtype, kept):
    stored, route = shards([6, 2], 6, 50, kept), routes(9, 2)
    x, y = torch.randn(9, 50).to(x_dtype), torch.randn(9, 6).to(y_dtype)
    got = y.clone()
    ops.add_low_rank_(got, x, *stored.tensors, route)
    torch.testing.assert_close(got, (y.double() + stored.side(x, route)).to(y_dtype))


def test_nothing_is_rounded_but_the_result(provider):
    """1 + 2^-8 rounds to 1 in bfloat16, and 1 + 2^-20 has no place in it at all."""
    rank_ptr, route = torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32)
    x = torch.tensor([[1.0, 2.0**-10]], dtype=torch.bfloat16)
    y = torch.ones(1, 2, dtype=torch.bfloat16)
    left = torch.tensor([[2.0**-8, 1.0], [2.0**-8, -1.0]], dtype=torch.bfloat16)
    right = torch.tensor([[1.0, 2.0**-10], [1.0, 0.0]], dtype=torch.bfloat16)
    y[0, 1] = 0
    ops.add_low_rank_(y, x, left, right, rank_ptr, route)
    assert y.tolist() == [[1 + 2.0**-7, 2.0**-20]]


def test_routes_to_the_main_memory_leave_everything(provider):
    stored = shards([3, 2], 7, 45)
    stored.left[0] = torch.nan
    y = torch.randn(20, 7)
    got = y.clone()
    ops.add_low_rank_(got, torch.randn(20, 45), *stored.tensors, routes(20, 0))
    assert torch.equal(got, y)


def test_an_entry_of_no_rank_adds_nothing(provider):
    """Alone or beside others that have one: not even a zero changes its sign."""
    stored = shards([0, 2], 7, 45)
    y = torch.full((2, 7), -0.0)
    ops.add_low_rank_(y, torch.randn(2, 45), *stored.tensors, torch.tensor([0, -1]).int())
    ops.add_low_rank_(y[:1], torch.randn(1, 45), *stored.tensors, torch.tensor([0]).int())
    both = torch.full((2, 7), -0.0)
    ops.add_low_rank_(both, torch.randn(2, 45), *stored.tensors, torch.tensor([0, 1]).int())
    assert bool(y.signbit().all()) and bool(both[0].signbit().all())


def test_a_row_that_is_not_finite_leaves_the_others_alone(provider):
    stored, route = shards([5], 40, 45), torch.zeros(12, dtype=torch.int32)
    x, whole = torch.randn(12, 45), torch.zeros(12, 40)
    ops.add_low_rank_(whole, x, *stored.tensors, route)
    x[3, 44] = torch.inf
    got = torch.zeros(12, 40)
    ops.add_low_rank_(got, x, *stored.tensors, route)
    assert not bool(got[3].isfinite().any())
    rest = torch.arange(12) != 3
    torch.testing.assert_close(got[rest], whole[rest])


def test_strides_do_not_matter(provider):
    stored, route = shards([3, 2], 7, 45), routes(5, 2)
    x, padded = torch.randn(5, 45), torch.zeros(5, 10)
    want = torch.zeros(5, 7)
    ops.add_low_rank_(want, x, *stored.tensors, route)
    views = [t.T.contiguous().T for t in (x, stored.left, stored.right)]
    rank_ptr, route = stored.rank_ptr.repeat_interleave(2)[::2], route.repeat_interleave(2)[::2]
    ops.add_low_rank_(padded[:, 2:9], *views, rank_ptr, route)
    torch.testing.assert_close(padded[:, 2:9], want)
    assert not padded[:, :2].any() and not padded[:, 9:].any()


@pytest.mark.skipif(DEVICE != "cpu" or not ops.native_loaded(), reason="needs the native module")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_out", "d_in"), [(83, 1543), (1100, 1024)])
def test_a_row_is_the_same_bits_alone_and_for_any_number_of_threads(isa, dtype, d_out, d_in):  # noqa: F811
    """Rows of x are taken alone, a few at once, or in panels; so are rows of y and columns."""
    stored = shards([7, 0, 70, 1], d_out, d_in, dtype)
    x, y, route = torch.randn(150, d_in), torch.randn(150, d_out), routes(150, 4)
    route[:80] = 2
    alone = y.clone()
    for n in range(150):
        ops.add_low_rank_(alone[n : n + 1], x[n : n + 1], *stored.tensors, route[n : n + 1])
    threads = torch.get_num_threads()
    try:
        for rows in (2, 3, 4, 5, 8, 9, 64, 65, 128, 129, 150):
            torch.set_num_threads(1 + rows % 3)
            together = y[:rows].clone()
            ops.add_low_rank_(together, x[:rows], *stored.tensors, route[:rows])
            assert torch.equal(together, alone[:rows]), rows
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_x_and_y(provider, dtype):
    stored = shards([4, 0, 3], 5, 40, dtype)
    route = torch.tensor([2, -1, 0, 1, 2], dtype=torch.int32)
    x, y = torch.randn(5, 40).to(dtype), torch.randn(5, 5).to(dtype)
    x.requires_grad_()
    y.requires_grad_()
    out = y * 2
    ops.add_low_rank_(out, x, *stored.tensors, route)
    torch.testing.assert_close(
        out.detach(), (2 * y.detach().double() + stored.side(x.detach(), route)).to(dtype)
    )
    grad = torch.randn(5, 5).to(dtype)
    out.backward(grad)
    assert torch.equal(y.grad, 2 * grad)
    expected = torch.zeros(5, 40, dtype=torch.float64)
    for n, entry in enumerate(route.tolist()):
        if entry >= 0:
            expected[n] = stored.delta(entry).T @ grad[n].double()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, expected.to(dtype))


def test_gradcheck_in_double():
    stored = shards([3, 2], 4, 35, torch.float64)
    route = torch.tensor([1, -1, 0], dtype=torch.int32)
    leaves = [torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (4, 35)]

    def out_of_place(y, x):
        y = y * 1
        ops.add_low_rank_(y, x, *stored.tensors, route)
        return y

    assert torch.autograd.gradcheck(out_of_place, leaves)


@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles(provider, grad):
    stored, route = shards([3, 0, 2], 7, 45), torch.tensor([2, -1, 0, 1]).int()

    def function(y, x):
        y = y + 1
        ops.add_low_rank_(y, x, *stored.tensors, route)
        return y * 2

    results = []
    x, y = torch.randn(4, 45), torch.randn(4, 7)
    torch._dynamo.reset()
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_(grad) for t in (y, x)]
        out = run(*leaves)
        if grad:
            out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves if grad)])
    torch._dynamo.reset()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.fixture
def call():
    stored = shards([2, 1], 4, 40)
    return {
        "y": torch.zeros(3, 4),
        "x": torch.randn(3, 40),
        "left": stored.left,
        "right": stored.right,
        "rank_ptr": stored.rank_ptr,
        "route": torch.tensor([0, 1, -1], dtype=torch.int32),
    }


REFUSED = [
    ({"x": torch.Tensor.int}, "x must be float32, bfloat16 or float16, got torch.int32"),
    ({"y": torch.Tensor.long}, "y must be float32, bfloat16 or float16, got torch.int64"),
    ({"left": torch.Tensor.int}, "left must be float32, bfloat16 or float16, got torch.int32"),
    ({"right": torch.Tensor.int}, "right must be float32, bfloat16 or float16, got torch.int32"),
    ({"right": torch.Tensor.half}, "right is torch.float16 but left is torch.float32"),
    ({"rank_ptr": torch.Tensor.int}, "rank_ptr must be int64, got torch.int32"),
    ({"route": torch.Tensor.long}, "route must be int32, got torch.int64"),
    ({"x": lambda t: t[0]}, "x must have 2 dimensions, got 1"),
    ({"y": lambda t: t[None]}, "y must have 2 dimensions, got 3"),
    ({"left": lambda t: t[0]}, "left must have 2 dimensions, got 1"),
    ({"right": lambda t: t[None]}, "right must have 2 dimensions, got 3"),
    ({"rank_ptr": lambda t: t[None]}, "rank_ptr must have 1 dimension, got 2"),
    ({"route": lambda t: t[None]}, "route must have 1 dimension, got 2"),
    ({"y": lambda t: t[:2]}, "y has 2 rows, x has 3"),
    ({"y": lambda t: torch.zeros(4, 3).T}, "y is changed in place, so its rows must be contiguous"),
    ({"right": lambda t: t[:2]}, "left has 3 rows, right has 2"),
    ({"left": lambda t: t[:, 1:]}, "y has d_out = 4, left has 3"),
    ({"right": lambda t: t[:, 1:]}, "x has d_in = 40, right has 39"),
    ({"rank_ptr": lambda t: t[:0]}, "rank_ptr must have an entry a shard, plus one, got none"),
    ({"route": lambda t: t[:2]}, r"route must have one entry a row of x \(3\), got 2"),
]
# What only the values show.
WRONG_VALUES = [
    ({"route": lambda t: t + 1}, "route must be between -1 and 1, got 2"),
    ({"route": lambda t: t - 1}, "route must be between -1 and 1, got -2"),
    ({"rank_ptr": lambda t: t + 1}, "rank_ptr must ascend from 0 to the 3 rows of left and right"),
    ({"rank_ptr": lambda t: t[:2]}, "rank_ptr must ascend from 0 to the 3 rows"),
    ({"rank_ptr": lambda t: t * torch.tensor([1, 5, 1])}, "rank_ptr must ascend from 0 to the 3"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_mistakes_are_named(provider, call, changes, message):
    arguments = {k: changes[k](v) if k in changes else v for k, v in call.items()}
    with pytest.raises(RuntimeError, match=f"add_low_rank_: {message}"):
        ops.add_low_rank_(**arguments)
    assert not call["y"].any()


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES)
def test_wrong_values_are_named_or_nan(provider, raises_on_data, call, changes, message):
    arguments = {k: changes[k](v) if k in changes else v for k, v in call.items()}
    if raises_on_data("add_low_rank_"):
        with pytest.raises(RuntimeError, match=f"add_low_rank_: {message}"):
            ops.add_low_rank_(**arguments)
        assert not call["y"].any()
        return
    ops.add_low_rank_(**arguments)
    wrong = call["y"].isnan()
    assert wrong.any() and torch.equal(wrong.any(1), wrong.all(1))


@pytest.mark.parametrize("name", ["x", "left", "right", "rank_ptr", "route"])
def test_tensors_on_another_device(provider, call, name):
    call[name] = call[name].to("meta")
    with pytest.raises(RuntimeError, match=r"add_low_rank_: .* is on .* but .* must be on one"):
        ops.add_low_rank_(**call)
