"""Every op test runs on the torch reference and on each instruction set this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wise_ext import ops
from wise_ext.errors import NativeError


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


PROVIDERS = ["reference", *_native_isas()]


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes the ops run on one implementation: "reference" or an instruction set."""
    name: str = request.param
    before = ops.get_backend()
    ops.set_backend("reference" if name == "reference" else "native")
    if name != "reference":
        ops.set_cpu_isa(name)
    yield name
    ops.set_backend(before)
    if ops.native_loaded():
        ops.set_cpu_isa("auto")


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
