"""The shard in training: dual_linear_train with its backward, and masked_update_."""

from __future__ import annotations

import pytest
import torch

from wise_ext import ops

ABOUT = ("dual_linear_train", "masked_update_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (6, 7, 45), (33, 20, 96), (40, 33, 543), (0, 4, 40), (3, 0, 40), (3, 4, 0)]


@pytest.fixture
def shard(make_bank):
    def make(d_out, d_in):
        bank = make_bank(1, d_out, d_in)
        return bank.dense[0].float(), bank.mask_bits[0], bank.row_ptr

    return make


def mask_of(mask_bits, d_in):
    return ops.unpack(mask_bits, *all_ones(mask_bits, d_in), d_in).bool()


def all_ones(mask_bits, d_in):
    values, row_ptr = ops.pack(torch.ones(mask_bits.shape[0], d_in), mask_bits)
    return values, row_ptr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_train_forward_and_backward(provider, shard, assert_as_good, shape, dtype):
    rows, d_out, d_in = shape
    delta, mask_bits, _ = shard(d_out, d_in)
    x, base = torch.randn(rows, d_in).to(dtype), torch.randn(rows, d_out).to(dtype)
    grad_y, grad_r = torch.randn(rows, d_out).to(dtype), torch.randn(rows)

    def run(function, *leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y, r = function(*leaves)
        torch.autograd.backward([y, r], [grad_y.to(y.dtype), grad_r.to(r.dtype)])
        return y.detach(), r.detach(), *(t.grad for t in leaves)

    def composed(x, base, delta):
        s = x.to(delta.dtype) @ delta.T
        return (base.to(delta.dtype) + s).to(base.dtype), s.norm(dim=1)

    before = [t.clone() for t in (x, base, delta, mask_bits)]
    got = run(lambda *t: ops.dual_linear_train(*t, mask_bits), x, base, delta)
    for after, was in zip((x, base, delta, mask_bits), before, strict=True):
        assert torch.equal(after, was)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, torch.float32]
    oracle = list(run(composed, x.double(), base.double(), delta.double()))
    plain = list(run(composed, x, base, delta))
    mask = mask_of(mask_bits, d_in)
    oracle[4], plain[4] = oracle[4] * mask, plain[4] * mask
    for ours, exact, torchs in zip(got, oracle, plain, strict=True):
        assert_as_good(ours, exact, torchs)
    assert (got[4][~mask] == 0).all()


def test_train_without_gradients_records_nothing(provider, shard):
    delta, mask_bits, _ = shard(5, 40)
    x, base = torch.randn(3, 40), torch.randn(3, 5)
    with torch.no_grad():
        y, r = ops.dual_linear_train(x, base, delta.requires_grad_(), mask_bits)
    assert not y.requires_grad and not r.requires_grad
    torch.testing.assert_close(y, base + x @ delta.detach().T)
    recorded = ops.dual_linear_train(x, base, delta, mask_bits)
    assert recorded[0].requires_grad and torch.equal(recorded[1].detach(), r)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_made(provider, shard, wanted):
    delta, mask_bits, _ = shard(5, 40)
    leaves = [torch.randn(3, 40), torch.randn(3, 5), delta]
    for index in wanted:
        leaves[index].requires_grad_()
    y, r = ops.dual_linear_train(*leaves, mask_bits)
    (y.sum() + r.sum()).backward()
    assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]


def test_a_zero_norm_has_a_zero_subgradient(provider, shard):
    delta, mask_bits, _ = shard(5, 40)
    delta = torch.zeros_like(delta).requires_grad_()
    _, r = ops.dual_linear_train(torch.randn(3, 40), torch.randn(3, 5), delta, mask_bits)
    r.sum().backward()
    assert torch.equal(r, torch.zeros(3)) and torch.equal(delta.grad, torch.zeros_like(delta))


def test_gradcheck_in_double(shard):
    """In double the reference answers. delta's gradient is masked: perturb it there only."""
    delta, mask_bits, row_ptr = shard(4, 35)
    values, _ = ops.pack(delta.double(), mask_bits)
    mask = mask_of(mask_bits, 35)
    x, base = torch.randn(3, 35).double(), torch.randn(3, 4).double()

    def function(x, base, values):
        delta = torch.zeros(4, 35, dtype=torch.float64).masked_scatter(mask, values)
        return ops.dual_linear_train(x, base, delta, mask_bits)

    leaves = [t.requires_grad_() for t in (x, base, values)]
    assert row_ptr[-1] == len(values) and torch.autograd.gradcheck(function, leaves)


def plain_update(delta, grad, mask, m, v, lr, beta1, beta2, eps, step, clamp):
    """The definition, dense, in float64."""
    delta, grad = delta.double(), grad.double()
    if m is None:
        moved, states = delta - lr * grad, ()
    else:
        m_dense = torch.zeros_like(delta).masked_scatter(mask, m.double())
        v_dense = torch.zeros_like(delta).masked_scatter(mask, v.double())
        m_dense, v_dense = (
            beta1 * m_dense + (1 - beta1) * grad,
            beta2 * v_dense + (1 - beta2) * grad**2,
        )
        scale = (v_dense / (1 - beta2**step)).sqrt() + eps
        moved = delta - lr * (m_dense / (1 - beta1**step)) / scale
        states = (m_dense[mask], v_dense[mask])
    return torch.where(mask, moved.clamp(-clamp, clamp), delta), *states


@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (20, 96), (33, 1543), (0, 40), (4, 0)], ids=str)
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("clamp", [float("inf"), 0.5])
def test_masked_update(provider, shard, shape, adam, clamp):
    delta, mask_bits, row_ptr = shard(*shape)
    grad, mask = torch.randn(shape), mask_of(mask_bits, shape[1])
    # Entries outside the mask must survive, whatever they are.
    delta = torch.where(mask, delta, torch.randn(shape))
    nnz = int(row_ptr[-1])
    m, v = (torch.randn(nnz), torch.rand(nnz)) if adam else (None, None)
    settings = {"lr": 0.03, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step": 3, "clamp": clamp}
    expected = plain_update(delta, grad, mask, m, v, **settings)
    changed, kept_grad = delta.clone(), grad.clone()
    assert ops.masked_update_(changed, grad, mask_bits, row_ptr, m, v, **settings) is None
    assert torch.equal(grad, kept_grad)
    assert torch.equal(changed[~mask], delta[~mask])
    for got, want in zip((changed, m, v) if adam else (changed,), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


def test_many_steps_follow_torchs_adam(provider, shard):
    delta, mask_bits, row_ptr = shard(9, 70)
    mask = mask_of(mask_bits, 70)
    parameter = torch.nn.Parameter(delta.clone())
    adam = torch.optim.Adam([parameter], lr=0.02, betas=(0.9, 0.95))
    m, v = torch.zeros(int(row_ptr[-1])), torch.zeros(int(row_ptr[-1]))
    for step in range(1, 21):
        grad = torch.randn(9, 70)
        parameter.grad = grad * mask
        adam.step()
        ops.masked_update_(delta, grad, mask_bits, row_ptr, m, v, 0.02, 0.9, 0.95, 1e-8, step)
    torch.testing.assert_close(delta, parameter.detach(), atol=1e-5, rtol=1e-5)


def test_update_takes_a_strided_gradient_and_any_number_of_threads(provider, shard):
    delta, mask_bits, row_ptr = shard(300, 400)
    grad = torch.randn(400, 300).T
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            one = delta.clone()
            ops.masked_update_(one, grad, mask_bits, row_ptr, None, None, 0.1)
        finally:
            torch.set_num_threads(threads)
        results.append(one)
    assert torch.equal(*results)
    torch.testing.assert_close(
        results[0], torch.where(mask_of(mask_bits, 400), delta - 0.1 * grad, delta)
    )


def test_update_invalidates_what_a_backward_saved(provider, shard):
    delta, mask_bits, row_ptr = shard(5, 40)
    delta.requires_grad_()
    y, _ = ops.dual_linear_train(torch.randn(3, 40), torch.randn(3, 5), delta, mask_bits)
    ops.masked_update_(delta, torch.randn(5, 40), mask_bits, row_ptr, None, None, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
