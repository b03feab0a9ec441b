"""Streams, graphs, devices, waiting: how the kernels are launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.ops.calls import arguments
from wise_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Long enough for a launch on another stream to run first.
CYCLES = 50_000_000
TRAINING = ["dual_linear_train", "dual_linear_train_backward", "masked_update_"]


def function_of(op: str, rows: int) -> Callable[..., Any]:
    return ops.backends.resolve(op, torch.empty(0), rows)


def results(op: str, call: tuple[Any, ...], returned: Any) -> list[torch.Tensor]:
    """What an op wrote: what it returned, or the tensor it changed."""
    if returned is None:
        return [call[0]]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def tensors_of(call: tuple[Any, ...]) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def copied(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(torch.Tensor, torch.Tensor.clone, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ops.OPS)
def test_an_op_runs_on_the_current_stream(provider, make_bank, op, dtype):
    for call in arguments(op, make_bank, dtype):
        want_call, got_call = copied(call), copied(call)
        function = function_of(op, 5)
        want = results(op, want_call, function(*want_call))
        # The input arrives late, and only on this stream.
        late = tensors_of(got_call)[0]
        value = late.clone()
        late.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            late.copy_(value)
            got = results(op, got_call, function(*got_call))
        stream.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_a_captured_op_reads_its_tensors_again(provider, make_bank, inference_op):
    (call, *_) = arguments(inference_op, make_bank, torch.float32)
    function = function_of(inference_op, 5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*copied(call))  # compiles what has to be compiled
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    static = copied(call)
    with torch.cuda.graph(graph):
        captured = results(inference_op, static, function(*static))
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = copied(call)
        for value in tensors_of(fresh):
            if value.dim() == 2 and value.is_floating_point():
                value.normal_()
        if inference_op in ("add_side_", "add_low_rank_", "dual_linear"):
            fresh[-1].copy_(torch.randint(-1, 3, (5,), dtype=torch.int32))
        for there, here in zip(tensors_of(static), tensors_of(fresh), strict=True):
            there.copy_(here)
        graph.replay()
        want = results(inference_op, fresh, function(*fresh))
        for a, b in zip(captured, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_inference_does_not_wait(provider, make_bank, inference_op, rows):
    if provider == "reference":
        pytest.skip("the reference reads the routes back")
    (call, *_) = arguments(inference_op, make_bank, torch.float32)
    repeated = [
        t.repeat(8, *[1] * (t.dim() - 1))[:rows] if t.shape[0] == 5 else t for t in tensors_of(call)
    ]
    call = tuple(repeated.pop(0) if isinstance(v, torch.Tensor) else v for v in call)
    function = function_of(inference_op, rows)
    function(*copied(call))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", TRAINING)
def test_training_does_not_wait(provider, make_bank, op):
    if provider != "triton":
        pytest.skip("only Triton has kernels for training")
    for call in arguments(op, make_bank, torch.float32):
        function_of(op, 5)(*copied(call))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function_of(op, 5)(*copied(call))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", ops.OPS)
def test_an_op_runs_where_its_tensors_are(provider, make_bank, op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (call, *_) = arguments(op, make_bank, torch.float32)
    want_call = copied(call)
    want = results(op, want_call, function_of(op, 5)(*want_call))
    moved = tree_map_only(torch.Tensor, lambda t: t.to("cuda:1"), call)
    with torch.cuda.device(0):
        got = results(op, moved, function_of(op, 5)(*moved))
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.to("cuda:0"), b)
