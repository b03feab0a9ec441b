"""opcheck of every op in both namespaces, and the wrappers under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from tests.ops.calls import arguments
from wise_ext import ops

UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize(
    ("namespace", "dtype"),
    [
        ("wise_ext", torch.float32),
        ("wise_ext", torch.bfloat16),
        ("wise_ext", torch.float16),
        ("wise_ext_reference", torch.float32),
    ],
    ids=str,
)
def test_opcheck(namespace, op, make_bank, dtype):
    for call in arguments(op, make_bank, dtype):
        opcheck(getattr(getattr(torch.ops, namespace), op).default, call, test_utils=UTILITIES)


@pytest.fixture
def compiled():
    def compile_(function, backend="aot_eager"):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend)

    yield compile_
    torch._dynamo.reset()


def forward(y, x, weight, bank, route, pair):
    y = y + 1
    ops.add_side_(y, x, *bank, route)
    norms = ops.side_norm(x, *bank, pair, pair)
    return y * 2, ops.dual_linear(x, weight, None, *bank, route), norms


def test_inference_compiles(provider, make_bank, compiled):
    bank = make_bank(3, 7, 45)
    args = [torch.randn(5, 7), torch.randn(5, 45), torch.randn(7, 45), bank.tensors]
    args += [torch.tensor([-1, 0, 2, 2, 1]).int(), torch.tensor([0, 2]).int()]
    with torch.no_grad():
        for got, want in zip(compiled(forward)(*args), forward(*args), strict=True):
            assert torch.equal(got, want)


@pytest.mark.slow
def test_inference_compiles_with_inductor(make_bank, compiled):
    bank = make_bank(3, 7, 45)
    args = [torch.randn(5, 7), torch.randn(5, 45), torch.randn(7, 45), bank.tensors]
    args += [torch.tensor([-1, 0, 2, 2, 1]).int(), torch.tensor([0, 2]).int()]
    with torch.no_grad():
        for got, want in zip(compiled(forward, "inductor")(*args), forward(*args), strict=True):
            torch.testing.assert_close(got, want)


def test_a_graph_input_is_changed_in_place(provider, make_bank, compiled):
    bank = make_bank(2, 7, 45)
    x, route = torch.randn(2, 45), torch.tensor([1, 0]).int()
    got, want = torch.ones(2, 7), torch.ones(2, 7)
    with torch.no_grad():
        compiled(ops.add_side_)(got, x, *bank.tensors, route)
    ops.add_side_(want, x, *bank.tensors, route)
    assert torch.equal(got, want)


def test_gradients_compile(provider, make_bank, compiled):
    bank = make_bank(2, 7, 45)
    mask_bits, route = bank.mask_bits[0], torch.tensor([1, -1, 0]).int()

    def loss(x, base, delta):
        y, indicator = ops.dual_linear_train(x, base, delta, mask_bits)
        ops.add_side_(y, x, *bank.tensors, route)
        return (y * y).sum() + indicator.sum()

    results = []
    for function in (loss, compiled(loss)):
        torch.manual_seed(1)
        leaves = [torch.randn(3, 45), torch.randn(3, 7), bank.dense[0].float()]
        leaves = [t.requires_grad_() for t in leaves]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_an_update_compiles(provider, make_bank, compiled):
    bank = make_bank(1, 7, 45)
    grad, mask_bits, row_ptr = torch.randn(7, 45), bank.mask_bits[0], bank.row_ptr
    results = []
    for function in (ops.masked_update_, compiled(ops.masked_update_)):
        delta, m, v = bank.dense[0].float(), torch.zeros_like(bank.values), bank.values**2
        function(delta, grad, mask_bits, row_ptr, m, v, 0.1, 0.9, 0.95, 1e-8, 2, 0.5)
        results.append((delta, m, v))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(traced, eager)


def test_pack_unpack_and_merge_compile(provider, make_bank, compiled):
    bank = make_bank(1, 7, 45)
    mask_bits, delta = bank.mask_bits[0], torch.randn(7, 45)

    def function(delta):
        values, row_ptr = ops.pack(delta, mask_bits)
        return ops.ties_merge([ops.unpack(mask_bits, values, row_ptr, 45), delta], [1.0, 1.0], 0.5)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(function)(delta), function(delta))
