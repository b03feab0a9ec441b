"""Every op test runs on each implementation this machine has.

On the CPU these are the torch reference, each instruction set of the native module, and the CUDA
kernels under the emulator. With TRITON_INTERPRET=1 it is the Triton kernels under their
interpreter, with WISE_TEST_DEVICE=cuda what a GPU has: reference, CUDA C++ and Triton. A test file
names the ops it is about in ABOUT: implementations without any of them are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.emulator import library
from wise_ext import ops
from wise_ext.errors import NativeError
from wise_ext.ops import backends, schema, triton_binding

DEVICE = os.environ.get("WISE_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _native_isas() -> list[str]:
    """The instruction sets the native module can run here; none without the module."""
    found = []
    for isa in ops.ISAS if ops.native_loaded() else ():
        try:
            ops.set_cpu_isa(isa)
        except NativeError:
            continue
        found.append(isa)
    if ops.native_loaded():
        ops.set_cpu_isa("auto")
    return found


def _providers() -> dict[str, frozenset[str]]:
    """The implementations to test, and the ops each one is."""
    everything, triton = frozenset(ops.OPS), frozenset(triton_binding.OPS)
    if INTERPRETED:
        import_module("tests.triton.interpreter").install()
        return {"triton": triton}
    if DEVICE == "cuda":
        native = frozenset(op for op, kind in backends._state.kernels if kind == "cuda")
        return {"reference": everything, "native": native, "triton": triton}
    found = {"reference": everything, **dict.fromkeys(_native_isas(), everything)}
    emulated = library.load_ops() if ops.native_loaded() else None
    return {**found, "emulated": emulated} if emulated else found


PROVIDERS = _providers()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        about = set(getattr(metafunc.module, "ABOUT", ops.OPS))
        names = [name for name, has in PROVIDERS.items() if has & about]
        metafunc.parametrize("provider", names, indirect=True)


@pytest.fixture
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes the ops run on one implementation; what it lacks, `auto` provides."""
    name: str = request.param
    before = ops.get_backend()
    if name == "reference":
        ops.set_backend("reference")
    elif name in ops.ISAS:
        ops.set_backend("native")
        ops.set_cpu_isa(name)
    else:
        ops.set_backend("auto")
        namespace = {"triton": schema.TRITON_NAMESPACE, "emulated": library.NAMESPACE}.get(
            name, "wise_ext"
        )
        for op in PROVIDERS[name]:
            function = getattr(getattr(torch.ops, namespace), op).default
            for taken in ("native", "triton"):
                monkeypatch.setitem(backends._implementations[taken], op, function)
    yield name
    ops.set_backend(before)
    if ops.native_loaded():
        ops.set_cpu_isa("auto")


@pytest.fixture
def raises_on_data(provider: str) -> Callable[[str], bool]:
    """Whether an op refuses bad values; on a GPU, which nobody waits for, it answers with NaN."""
    on_the_cpu = provider == "reference" or provider in ops.ISAS
    return lambda op: on_the_cpu or op not in PROVIDERS[provider]


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """Where tensors are made unless a test says otherwise."""
    torch.set_default_device(DEVICE)
    yield DEVICE
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is handed out uninitialised is full of NaN: an op that forgets some shows it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@dataclass
class Bank:
    """A random packed bank and its dense float64 deltas [k, d_out, d_in]."""

    mask_bits: Tensor
    values: Tensor
    row_ptr: Tensor
    dense: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mask_bits, self.values, self.row_ptr


def _bits(mask: Tensor) -> Tensor:
    """bool [..., d_in] to int32 [..., W]."""
    d_in = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, -d_in % 32)).unflatten(-1, (-1, 32)).long()
    words = (padded << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.fixture
def to_bits() -> Callable[[Tensor], Tensor]:
    return _bits


@pytest.fixture
def make_bank() -> Callable[..., Bank]:
    """k shards of density 0.3 whose first row is empty and whose last row is full."""

    def make(k: int, d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> Bank:
        mask = torch.rand(k, d_out, d_in) < 0.3
        mask[:, :1] = False
        mask[:, -1:] = d_out > 1
        dense = torch.where(mask, torch.randn(k, d_out, d_in), 0.0).to(dtype)
        counts = mask.sum(-1).flatten()
        row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        words = (
            _bits(mask) if mask.numel() else torch.zeros(k, d_out, -(-d_in // 32)).to(torch.int32)
        )
        return Bank(words, dense[mask], row_ptr, dense.double())

    return make


@pytest.fixture
def assert_as_good() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The error against a float64 oracle may be twice that of plain torch in the same dtype."""

    def check(got: Tensor, oracle: Tensor, plain: Tensor) -> None:
        assert got.shape == oracle.shape
        if got.numel() == 0:
            return
        allowed = 2 * (plain.double() - oracle).abs().max() + 1e-6 * (1 + oracle.abs().max())
        assert (got.double() - oracle).abs().max() <= allowed

    return check
