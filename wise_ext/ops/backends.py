"""Which implementation an op call gets: the native module's, Triton's, or the torch reference.

`wise_ext._C` is loaded once, when this module is first imported; a failure to load is kept and
told to whoever asks for "native" by name. The choice falls from a table of capabilities, once for
each op and device. The environment variable WISE_BACKEND (auto | native | triton | reference) sets
the first choice, WISE_CPU_ISA (amx | avx512vbmi2 | avx512 | avx2 | portable) the instruction set
of the CPU kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch

from wise_ext._build_info import read_build_info
from wise_ext.errors import ConfigError, NativeError
from wise_ext.ops import capabilities, triton_binding
from wise_ext.ops.capabilities import Facts, Provider, Selection
from wise_ext.ops.schema import NAMESPACE, REFERENCE_NAMESPACE, SCHEMAS, TRITON_NAMESPACE

Choice = Literal["auto", "native", "triton", "reference"]
Isa = Literal["portable", "avx2", "avx512", "avx512vbmi2", "amx"]

CHOICES: tuple[Choice, ...] = ("auto", "native", "triton", "reference")
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "avx512vbmi2", "amx")

_CURES = {
    "native": (
        "build it with a C++20 compiler on PATH (pip install --no-build-isolation -e . in the "
        "source tree), or use the torch reference: set_backend('auto') or WISE_BACKEND=auto"
    ),
    "triton": "install it (pip install triton), or choose set_backend('auto')",
}


class _State:
    """The choice in force, and how loading the native module went."""

    def __init__(self) -> None:
        self.choice: Choice = "auto"
        self.loaded = False
        self.failure = ""
        self.kernels: frozenset[tuple[str, str]] = frozenset()  # (op, device type)
        self.architectures = ""
        self.triton = frozenset(triton_binding.OPS if importlib.util.find_spec("triton") else ())


_state = _State()


def _callables(namespace: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS}


_implementations: dict[str, dict[str, Callable[..., Any]]] = {
    "native": _callables(NAMESPACE),
    "triton": _callables(TRITON_NAMESPACE),
    "reference": _callables(REFERENCE_NAMESPACE),
}


def _load() -> None:
    try:
        module = importlib.import_module("wise_ext._C")
    except Exception as error:
        _state.failure = f"{type(error).__name__}: {error}"
        return
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    _state.kernels = frozenset(
        (op, device_type)
        for op in SCHEMAS
        for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"))
        if registered(f"{NAMESPACE}::{op}", key)
    )
    if _state.kernels:
        _state.loaded = True
        _state.architectures = module.build_info().get("cuda_archs", "")
    else:
        _state.failure = "it was built from another version and registers no kernels"


def native_loaded() -> bool:
    """Whether the compiled module is in this process."""
    return _state.loaded


def native_failure() -> str:
    """Why the compiled module could not be loaded; empty when it was."""
    return _state.failure


def set_backend(choice: Choice) -> None:
    """Choose for all later calls: "auto", "native", "triton" or "reference".

    Raises `ConfigError` for another word and `NativeError`, with cause and cure, when "native" is
    asked for and the compiled module could not be loaded, or "triton" and there is none.
    """
    if choice not in CHOICES:
        raise ConfigError(f"unknown backend {choice!r}: choose one of {', '.join(CHOICES)}")
    if choice in ("native", "triton"):
        _need(choice)
    _state.choice = choice


def get_backend() -> Choice:
    """The choice in force: "auto", "native", "triton" or "reference"."""
    return _state.choice


def backend(op: str, device: torch.device | str, rows: int = 1) -> Provider:
    """Which implementation `op` takes on `device` for so many rows (pairs, for side_norm).

    "native", "triton" or "reference". Raises `ConfigError` for an unknown op, `NativeError` when
    "native" or "triton" was chosen and has no such kernel.
    """
    if op not in SCHEMAS:
        raise ConfigError(f"unknown op {op!r}: the ops are {', '.join(SCHEMAS)}")
    where = torch.device(device)
    return capabilities.at(_selection(_state.choice, op, where.type, where.index), rows)


def resolve(op: str, tensor: torch.Tensor, rows: int = 0) -> Callable[..., Any]:
    """The callable behind `op` for tensors like `tensor`; float64 always takes the reference.

    `rows` matters to the ops that have one kernel for few of them and one for many.
    """
    if _state.choice == "auto" and tensor.dtype == torch.float64:
        return _implementations["reference"][op]
    selection = _selection(_state.choice, op, tensor.device.type, tensor.device.index)
    return _implementations[capabilities.at(selection, rows)][op]


def _selection(choice: Choice, op: str, device_type: str, index: int | None) -> Selection:
    return _selected(choice, op, device_type, index)


# What torch.compiler.assume_constant_result sets; calling that would import the compiler here.
_selection._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _selected(choice: Choice, op: str, device_type: str, index: int | None) -> Selection:
    facts = _facts(device_type, index)
    if choice == "auto":
        return capabilities.select(op, device_type, facts)
    if choice != "reference":
        _need(choice)
        if not capabilities.can_run(choice, op, device_type, facts):
            cause = capabilities.why_not(choice, op, device_type, facts)
            raise NativeError(
                f"there is no {choice} {op} for device type {device_type!r} ({cause}): move the "
                "tensors, or choose set_backend('auto')"
            )
    return (choice, choice)


def _facts(device_type: str, index: int | None) -> Facts:
    capability = None
    if device_type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(index)
    return Facts(_state.kernels, _state.triton, capability, _state.architectures)


def why(op: str, device: torch.device | str, provider: Provider) -> str:
    """Why `op` cannot take `provider` on `device`; empty where it can."""
    where = torch.device(device)
    facts = _facts(where.type, where.index)
    if capabilities.can_run(provider, op, where.type, facts):
        return ""
    return capabilities.why_not(provider, op, where.type, facts)


def cpu_isa() -> Isa | None:
    """The instruction set the native CPU kernels use; None without the native module."""
    if not _state.loaded:
        return None
    return ISAS[cast(int, torch.ops.wise_ext.cpu_isa(-1))]


def set_cpu_isa(isa: Isa | Literal["auto"]) -> None:
    """Force the instruction set of the native CPU kernels ("auto": the best this CPU has).

    Raises `ConfigError` for an unknown name, `NativeError` when this CPU, or this build, lacks it.
    """
    if isa != "auto" and isa not in ISAS:
        raise ConfigError(f"unknown CPU instruction set {isa!r}: choose auto, {', '.join(ISAS)}")
    _need("native")
    wanted = len(ISAS) if isa == "auto" else ISAS.index(isa)
    got = cast(int, torch.ops.wise_ext.cpu_isa(wanted))
    if isa != "auto" and got != wanted:
        raise NativeError(
            f"this CPU or this build has no {isa} kernels: choose auto or {ISAS[got]}"
        )


def _need(provider: Literal["native", "triton"]) -> None:
    if provider == "native" and not _state.loaded:
        # What the build said at the time tells more than a missing file.
        causes = "; ".join([_state.failure, *read_build_info().reasons])
        raise NativeError(
            f"the native module wise_ext._C cannot be used ({causes}): {_CURES[provider]}"
        )
    if provider == "triton" and not _state.triton:
        raise NativeError(f"triton is not installed: {_CURES[provider]}")


def _from_environment() -> None:
    """Apply WISE_BACKEND and WISE_CPU_ISA; a bad value warns, since an import must not fail."""
    choice = os.environ.get("WISE_BACKEND", "auto")
    if choice in CHOICES:
        # One that cannot be had is refused at the first call, where it can be explained.
        _state.choice = choice
    else:
        warnings.warn(
            f"WISE_BACKEND={choice} is not one of {', '.join(CHOICES)}: using auto", stacklevel=2
        )
    isa = os.environ.get("WISE_CPU_ISA", "auto")
    if isa == "auto" or not _state.loaded:
        return
    try:
        set_cpu_isa(cast(Isa, isa))
    except (ConfigError, NativeError) as error:
        warnings.warn(f"WISE_CPU_ISA={isa} is ignored: {error}", stacklevel=2)


_load()
_from_environment()
