"""Every op of the registry, from every provider this machine has, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import registry, runner
from bench.cases import AXES, Case, Filter, choose, grid
from bench.composites import Call, Wrap
from bench.inputs import Inputs, routes
from wise_ext import ops

SMALL = list(grid(AXES, ["tiny"], (1, 8), (1, 6), ("fp32", "bf16", "fp16")))
DISPATCH = [case for case in choose("cpu", "dispatch", Filter()) if case.grad]


@pytest.mark.parametrize("case", [*SMALL, *DISPATCH], ids=lambda case: case.label)
def test_every_provider_agrees_with_the_reference(case: Case) -> None:
    before = ops.get_backend()
    providers = runner.plan(case, "cpu").providers
    assert "torch" in providers
    errors = registry.check(case, providers, Inputs(case, "cpu"))
    assert errors.keys() == set(providers)
    assert ops.get_backend() == before


def test_ops_have_axes_and_composites() -> None:
    assert registry.OPS.keys() == AXES.keys()
    for name, op in registry.OPS.items():
        assert "torch" in op.composites, name
        assert set(op.composites) <= set(registry.COMPOSITES)
        assert op.waits <= set(registry.PROVIDERS)


def test_the_oracle_is_not_among_what_it_judges() -> None:
    """A composite that only called our op would agree with it always."""
    case = Case("ties_merge", "tiny", shards=5)
    inputs = Inputs(case, "cpu")
    wrong = [torch.zeros_like(delta) for delta in inputs["deltas"]]
    merged = registry.build(case, "torch", inputs).call()[0]
    assert not torch.equal(merged, wrong[0])
    torch.testing.assert_close(merged, registry.build(case, "reference", inputs).call()[0])


def broken(result: Tensor) -> registry.Op:
    def build(inputs: Inputs, wrap: Wrap) -> Call:
        return lambda: (result,)

    return replace(registry.OPS["linear"], composites={"torch": build}, ours=_linear)


def _linear(inputs: Inputs, wrap: Wrap) -> Call:
    x, weight = inputs.get("x", "weight")
    return lambda: (x @ weight.T,)


@pytest.mark.parametrize("fault", ["one row", "nan", "shape", "dtype"])
def test_a_wrong_result_aborts_the_case(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("linear", "tiny", 8)
    inputs = Inputs(case, "cpu")
    result = inputs["x"] @ inputs["weight"].T
    if fault == "one row":
        result[5] *= 1.001
    elif fault == "nan":
        result[3, 2] = float("nan")
    elif fault == "shape":
        result = result[:7]
    else:
        result = result.long()
    monkeypatch.setitem(registry.OPS, "linear", broken(result))

    def no_clock(*arguments: object) -> None:
        raise AssertionError("the clock was reached")

    monkeypatch.setattr(runner.timing, "measure", no_clock)
    with pytest.raises(registry.Mismatch, match="linear tiny N=8 k=1 fp32: torch"):
        runner.run(runner.Plan(case, ("torch",), {}), "cpu", 0.0, None)


def test_checks_leave_the_inputs_alone() -> None:
    case = Case("masked_update_", "tiny", variant="adam")
    inputs = Inputs(case, "cpu")
    before = [inputs[name].clone() for name in ("delta", "m", "v")]
    registry.check(case, ["reference", "torch"], inputs)
    for name, value in zip(("delta", "m", "v"), before, strict=True):
        assert torch.equal(inputs[name], value)


def test_inputs_do_not_depend_on_what_was_asked_for_first() -> None:
    case = Case("dual_linear", "tiny", 8, 6, variant="all")
    one, other = Inputs(case, "cpu"), Inputs(case, "cpu")
    one.get("x", "weight", "values")
    other.get("values", "dense", "weight", "x")
    for name in ("x", "weight", "values"):
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["x"][:, :8], one["weight"])


def test_routes() -> None:
    case = Case("dual_linear", "tiny", 6, 2, variant="half")
    assert routes(case, "cpu").tolist() == [0, -1, 1, -1, 0, -1]
    assert routes(replace(case, variant="all"), "cpu").tolist() == [0, 1, 0, 1, 0, 1]
    assert routes(replace(case, variant="none"), "cpu").tolist() == [-1] * 6
    assert routes(case, "cpu").dtype == torch.int32


def test_what_cannot_run_says_why() -> None:
    case = Case("add_side_", "tiny", variant="all")
    assert registry.unavailable(case, "cuda", "cpu") == "cuda is for cuda"
    assert registry.unavailable(case, "torch-dense", "cpu") == "there is no such composite"
    assert registry.unavailable(Case("linear", "tiny"), "cpp", "cpu")
    assert not registry.unavailable(case, "compiled", "cpu")
    plan = runner.plan(case, "cpu", ["torch", "triton"])
    assert plan.providers == ("torch",)
    assert "triton" in plan.left_out


def test_a_candidate_sets_its_backend_for_the_call_alone() -> None:
    case = Case("add_side_", "tiny", variant="all")
    candidate = registry.build(case, "reference", Inputs(case, "cpu"))
    before = ops.get_backend()
    with candidate.in_force():
        assert ops.get_backend() == "reference"
        assert not torch.is_grad_enabled()
    assert ops.get_backend() == before
    assert torch.is_grad_enabled()
