"""The module that stands in for a down projection."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wise_ext.errors import ModelError
from wise_ext.memory import PackedBank, Shard, random_mask_bits, uncued
from wise_ext.nn import Course, DualLinear, RouteState

# torch deprecates its own quantised tensors, which serve here as a quantised base.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")

D_OUT, D_IN = 12, 40


def shard(seed: int) -> Shard:
    delta = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed))
    return Shard.from_delta(delta, random_mask_bits(D_OUT, D_IN, 0.3, seed))


SHARDS = [shard(1), shard(2)]


def dual(
    base: nn.Module, shards: list[Shard] | None = None, dtype: torch.dtype = torch.float32
) -> DualLinear:
    bank = PackedBank.from_shards(SHARDS if shards is None else shards, (D_OUT, D_IN), dtype)
    return DualLinear(base, bank, RouteState()).eval()


def course(*routes: int) -> Course:
    return Course(uncued(torch.tensor(routes, dtype=torch.int32)), None)


def expected(base: nn.Module, x: Tensor, *routes: int) -> Tensor:
    y = base(x).float()
    for row, index in enumerate(routes):
        if index >= 0:
            y[row] += x[row].float() @ SHARDS[index].dense().T
    return y


def conv1d() -> nn.Module:
    module = Conv1D(D_OUT, D_IN)
    nn.init.normal_(module.bias)
    return module


def int8_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)[0]


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "bias": lambda: nn.Linear(D_IN, D_OUT),
    "conv1d": conv1d,
    "int8": int8_linear,
}


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


@torch.no_grad()
def test_routed_rows_get_their_shard_and_the_others_stay_bitwise(base: nn.Module) -> None:
    layer, x = dual(base), torch.randn(4, 5, D_IN)
    layer.state.settle(course(1, -1, 0, 1))
    y = layer(x)
    torch.testing.assert_close(y, expected(base, x, 1, -1, 0, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(y[1], base(x)[1])
    assert not torch.allclose(y[0], base(x)[0], atol=1e-2)


@torch.no_grad()
def test_flattened_and_strided_inputs(base: nn.Module) -> None:
    layer, x = dual(base), torch.randn(3, 4, 2 * D_IN)[..., :D_IN]
    layer.state.settle(course(0, -1, 1))
    y = layer(x)
    torch.testing.assert_close(y, expected(base, x, 0, -1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x.reshape(12, D_IN)), y.reshape(12, D_OUT))


@torch.no_grad()
def test_nothing_is_added_without_shards_or_routes(base: nn.Module) -> None:
    x = torch.randn(2, 3, D_IN)
    plain = base(x)
    empty = dual(base, [])
    empty.state.settle(course(-1, -1))
    assert torch.equal(empty(x), plain)
    layer = dual(base)
    assert torch.equal(layer(x), plain)
    layer.state.settle(course(-1, -1))
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    base = nn.Linear(D_IN, D_OUT).to(dtype)
    layer, x = dual(base, dtype=dtype), torch.randn(2, 3, D_IN, dtype=dtype)
    layer.state.settle(course(1, -1))
    y = layer(x)
    assert y.dtype == dtype
    exact = expected(copy.deepcopy(base).float(), x.float(), 1, -1)
    # Two roundings of a number of this size, into y's dtype, and one of the shard's values.
    assert (y.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_gradients_reach_the_input_through_both_weights() -> None:
    base = nn.Linear(D_IN, D_OUT)
    layer, x = dual(base), torch.randn(2, 3, D_IN, requires_grad=True)
    layer.state.settle(course(1, -1))
    layer(x).sum().backward()
    assert x.grad is not None
    routed = (base.weight + SHARDS[1].dense()).sum(0).expand(3, D_IN)
    torch.testing.assert_close(x.grad[0], routed)
    torch.testing.assert_close(x.grad[1], base.weight.sum(0).expand(3, D_IN))


def test_saved_under_the_base_module_s_names() -> None:
    model = nn.Sequential(nn.Linear(3, D_IN), nn.Linear(D_IN, D_OUT))
    names = list(model.state_dict())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model[1] = dual(model[1])
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model[1].weight.zero_()
    missing, unexpected = model.load_state_dict(kept)
    assert not missing and not unexpected
    assert torch.equal(model[1].base.weight, kept["1.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(kept | {"1.weight": torch.zeros(1, 1)})


def test_looks_like_its_base() -> None:
    base = nn.Linear(D_IN, D_OUT).train()
    layer = DualLinear(base, PackedBank.from_shards(SHARDS, (D_OUT, D_IN)), RouteState())
    assert layer.training
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.out_features, layer.in_features) == (D_OUT, D_IN)
    assert layer.to(torch.bfloat16).bank.values.dtype == base.weight.dtype == torch.bfloat16


def test_an_undecided_route_is_an_error() -> None:
    layer = dual(nn.Linear(D_IN, D_OUT))
    layer.state.await_decision(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ModelError, match="choose a key layer below"):
        layer(torch.randn(1, 3, D_IN))


@torch.no_grad()
def test_compiles_whole_and_once_for_all_routes() -> None:
    layer, x = dual(conv1d()), torch.randn(3, 4, D_IN)
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for routes in ((0, 1, -1), (-1, -1, -1), (1, 1, 1)):
        layer.state.settle(course(*routes))
        y = compiled(x)
        torch.testing.assert_close(y, expected(layer.base, x, *routes), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_equals_eager(backend: str) -> None:
    base = nn.Linear(D_IN, D_OUT).to(torch.bfloat16)
    layer, x = dual(base, dtype=torch.bfloat16), torch.randn(2, 3, D_IN, dtype=torch.bfloat16)
    layer.state.settle(course(1, -1))
    torch._dynamo.reset()
    try:
        y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    torch.testing.assert_close(y, layer(x))
