"""The one registry: op x provider x case, and the check that comes before any clock.

Providers: `reference` (the package's own, the oracle), `torch` (what a user would write),
`torch-dense` (another way to write it, where there is one), `compiled` (torch.compile of `torch`),
`cpp` (C++ on the CPU), `triton` and `cuda` (on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from bench import composites, ours
from bench.cases import Case
from bench.composites import Build, Call, Wrap
from bench.inputs import Inputs
from bench.work import WORK, Work
from wise_ext import ops
from wise_ext.errors import WiseError
from wise_ext.ops.backends import Choice

# Backend of wise_ext.ops, and the device type it exists for.
OURS: dict[str, tuple[Choice, str]] = {
    "reference": ("reference", ""),
    "cpp": ("native", "cpu"),
    "triton": ("triton", "cuda"),
    "cuda": ("native", "cuda"),
}
COMPOSITES = ("torch", "torch-dense", "compiled")
PROVIDERS = (*OURS, *COMPOSITES)

# How far from the reference a row of a result may be, relative to that row: several roundings of
# the dtype in which the composites round every step. The ops themselves round once.
LIMITS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


class Mismatch(AssertionError):
    """A provider computed something else than the reference: nothing of the case is timed."""


@dataclass(frozen=True)
class Op:
    """How to call one op.

    Attributes:
        ours: the call into `wise_ext.ops`; None for a yardstick.
        needs: which of `wise_ext.ops` it takes a backend of.
        composites: by provider.
        mutated: inputs that a call changes.
        waits: providers that wait for the device within a call, which a CUDA graph cannot hold.
        trains: whether the call itself takes gradients.
    """

    ours: Build | None = None
    needs: tuple[str, ...] = ()
    composites: dict[str, Build] = field(default_factory=dict)
    mutated: tuple[str, ...] = ()
    waits: frozenset[str] = frozenset()
    trains: bool = False


_ROUTED = frozenset({"reference"})
_GATHERED = frozenset({"reference", "torch", "compiled"})

OPS: dict[str, Op] = {
    "add_side_": Op(
        ours.add_side,
        ("add_side_",),
        {"torch": composites.add_side},
        mutated=("y",),
        waits=_ROUTED,
    ),
    "dual_linear": Op(
        ours.dual_linear, ("dual_linear",), {"torch": composites.dual_linear}, waits=_ROUTED
    ),
    "side_norm": Op(ours.side_norm, ("side_norm",), {"torch": composites.side_norm}, waits=_ROUTED),
    "linear_side_norm": Op(
        ours.linear_side_norm,
        ("side_norm",),
        {"torch": composites.linear_side_norm},
        waits=_ROUTED,
    ),
    "sketch_norm": Op(ours.sketch_norm, ("sketch_norm",), {"torch": composites.sketch_norm}),
    "dual_linear_train": Op(
        ours.dual_linear_train, ("dual_linear_train",), {"torch": composites.dual_linear_train}
    ),
    "train_step": Op(
        ours.train_step,
        ("dual_linear_train", "dual_linear_train_backward", "masked_update_"),
        {"torch": composites.train_step, "torch-dense": composites.train_step_dense},
        mutated=("delta", "m", "v"),
        waits=_GATHERED,
        trains=True,
    ),
    "masked_update_": Op(
        ours.masked_update,
        ("masked_update_",),
        {"torch": composites.masked_update, "torch-dense": composites.masked_update_dense},
        mutated=("delta", "m", "v"),
        waits=_GATHERED,
    ),
    "pack": Op(
        ours.pack,
        ("pack",),
        {"torch": composites.pack},
        waits=_GATHERED | {"cuda"},
    ),
    "unpack": Op(ours.unpack, ("unpack",), {"torch": composites.unpack}, waits=_ROUTED),
    "ties_merge": Op(
        ours.ties_merge,
        ("ties_merge",),
        {"torch": composites.ties_merge},
        waits=_GATHERED,
    ),
    "linear": Op(composites={"torch": composites.linear}),
    "mv": Op(composites={"torch": composites.mv}),
}


@dataclass(frozen=True)
class Candidate:
    """A provider of a case, ready to be called.

    Attributes:
        choice: the backend to set before it is called.
        capturable: whether a CUDA graph can hold it.
    """

    provider: str
    call: Call
    choice: Choice
    capturable: bool
    grad: bool

    @contextmanager
    def in_force(self) -> Iterator[Call]:
        """The call, with its backend chosen and gradients on or off."""
        before = ops.get_backend()
        ops.set_backend(self.choice)
        try:
            with torch.set_grad_enabled(self.grad):
                yield self.call
        finally:
            ops.set_backend(before)


def work(case: Case) -> Work:
    """The bytes and operations a case cannot do without."""
    return WORK[case.op](case)


def default_providers(case: Case, device: str) -> list[str]:
    """Everything there could be, except torch.compile, which takes its time to compile."""
    ours_here = [name for name, (_, kind) in OURS.items() if kind in ("", device)]
    return [*ours_here, *OPS[case.op].composites]


def unavailable(case: Case, provider: str, device: str) -> str:
    """Why a provider cannot take a case on a device; empty where it can."""
    op = OPS[case.op]
    if provider in OURS:
        choice, kind = OURS[provider]
        if op.ours is None:
            return "it is a yardstick of torch's"
        if kind and kind != device:
            return f"{provider} is for {kind}"
        before = ops.get_backend()
        try:
            ops.set_backend(choice)
            for name in op.needs:
                ops.backend(name, device)
        except WiseError as error:
            return str(error)
        finally:
            ops.set_backend(before)
        return ""
    if provider == "compiled":
        return "" if "torch" in op.composites else "there is no composite to compile"
    return "" if provider in op.composites else "there is no such composite"


def build(case: Case, provider: str, inputs: Inputs) -> Candidate:
    """Make what the provider needs, and its call."""
    op = OPS[case.op]
    # Not only where the case takes a gradient: a call is what it is when recording is off.
    grad = case.grad or op.trains
    capturable = provider not in op.waits
    if provider in OURS:
        maker = op.ours
        if maker is None:
            raise ValueError(f"{case.op} has no {provider}: ask `unavailable` first")
        return Candidate(provider, maker(inputs, _as_is), OURS[provider][0], capturable, grad)
    compiled = provider == "compiled"
    wrap = cast(Wrap, torch.compile) if compiled else _as_is
    maker = op.composites["torch" if compiled else provider]
    return Candidate(provider, maker(inputs, wrap), "auto", capturable, grad)


def check(case: Case, providers: Iterable[str], inputs: Inputs) -> dict[str, float]:
    """Run every provider once against the reference, on copies of what it changes.

    Returns each one's error, the largest of any row relative to that row.

    Raises:
        Mismatch: an error is above the dtype's limit, or a result has another shape or dtype.
    """
    op = OPS[case.op]
    expected = None
    if op.ours is not None:
        expected = _run(build(case, "reference", inputs.with_copies(op.mutated)))
    errors = {}
    for provider in providers:
        if expected is None or provider == "reference":
            errors[provider] = 0.0
            continue
        found = _run(build(case, provider, inputs.with_copies(op.mutated)))
        errors[provider] = error = max(
            (_distance(got, want, case, provider) for got, want in _pairs(found, expected)),
            default=0.0,
        )
        limit = LIMITS[case.dtype]
        if not error <= limit:  # NaN is no match
            raise Mismatch(
                f"{case.label}: {provider} is {error:.2e} from the reference, "
                f"the limit is {limit:.0e}"
            )
    return errors


def _run(candidate: Candidate) -> tuple[Tensor, ...]:
    with candidate.in_force() as call:
        return tuple(tensor.detach() for tensor in call())


def _pairs(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(found, expected, strict=True)


def _distance(got: Tensor, want: Tensor, case: Case, provider: str) -> float:
    if got.shape != want.shape or got.dtype.is_floating_point != want.dtype.is_floating_point:
        raise Mismatch(
            f"{case.label}: {provider} gave {got.dtype} {tuple(got.shape)}, "
            f"the reference {want.dtype} {tuple(want.shape)}"
        )
    if want.numel() == 0:
        return 0.0
    if not want.dtype.is_floating_point:
        return float("inf") if not torch.equal(got, want) else 0.0
    # A vector is a row an entry; entries near zero are measured against the average one.
    want = want.reshape(want.shape[0], -1).float()
    difference = got.reshape(want.shape).float().sub_(want)
    size = torch.linalg.vector_norm(want, dim=1)
    scale = size.clamp(min=float(size.mean()) + torch.finfo(torch.float32).tiny)
    return float((torch.linalg.vector_norm(difference, dim=1) / scale).max())


def _as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
