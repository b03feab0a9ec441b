"""Which implementation an op call gets: the native module's kernel or the torch reference.

`wise_ext._C` is loaded once, when this module is first imported; a failure to load is kept and
told to whoever asks for "native" by name. The environment variable WISE_BACKEND
(auto | native | reference) sets the first choice, WISE_CPU_ISA (avx512 | avx2 | portable) the
instruction set of the CPU kernels.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch

from wise_ext._build_info import read_build_info
from wise_ext.errors import ConfigError, NativeError
from wise_ext.ops.schema import NAMESPACE, REFERENCE_NAMESPACE, SCHEMAS

Choice = Literal["auto", "native", "reference"]
Isa = Literal["portable", "avx2", "avx512"]

CHOICES: tuple[Choice, ...] = ("auto", "native", "reference")
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512")

_REBUILD = (
    "build it with a C++20 compiler on PATH (pip install --no-build-isolation -e . in the "
    "source tree), or use the torch reference: set_backend('auto') or WISE_BACKEND=auto"
)


class _State:
    """The choice in force, and how loading the native module went."""

    def __init__(self) -> None:
        self.choice: Choice = "auto"
        self.loaded = False
        self.failure = ""
        self.kernels: frozenset[tuple[str, str]] = frozenset()  # (op, device type)


_state = _State()
_reference: dict[str, Callable[..., Any]] = {
    name: getattr(getattr(torch.ops, REFERENCE_NAMESPACE), name).default for name in SCHEMAS
}
_registered: dict[str, Callable[..., Any]] = {
    name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in SCHEMAS
}


def _load() -> None:
    try:
        importlib.import_module("wise_ext._C")
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
    else:
        _state.failure = "it was built from another version and registers no kernels"


def native_loaded() -> bool:
    """Whether the compiled module is in this process."""
    return _state.loaded


def native_failure() -> str:
    """Why the compiled module could not be loaded; empty when it was."""
    return _state.failure


def set_backend(choice: Choice) -> None:
    """Choose for all later calls: "auto", "native" or "reference".

    Raises `ConfigError` for another word and `NativeError`, with cause and cure, when "native" is
    asked for and the compiled module could not be loaded.
    """
    if choice not in CHOICES:
        raise ConfigError(f"unknown backend {choice!r}: choose one of {', '.join(CHOICES)}")
    if choice == "native":
        _need_native()
    _state.choice = choice


def get_backend() -> Choice:
    """The choice in force: "auto", "native" or "reference"."""
    return _state.choice


def backend(op: str, device: torch.device | str) -> str:
    """Which implementation `op` takes on `device`: "native" or "reference".

    Raises `ConfigError` for an unknown op, `NativeError` when "native" was chosen and there is
    no such kernel.
    """
    if op not in SCHEMAS:
        raise ConfigError(f"unknown op {op!r}: the ops are {', '.join(SCHEMAS)}")
    if _state.choice == "reference":
        return "reference"
    kind = torch.device(device).type
    if _state.loaded and (op, kind) in _state.kernels:
        return "native"
    if _state.choice == "native":
        _need_native()
        raise NativeError(
            f"there is no native {op} for device type {kind!r}: move the tensors to the CPU or "
            "choose set_backend('auto')"
        )
    return "reference"


def resolve(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The callable behind `op` for tensors like `tensor`; float64 always takes the reference."""
    if _state.choice == "auto":
        return _reference[op] if tensor.dtype == torch.float64 else _registered[op]
    if _state.choice == "native":
        backend(op, tensor.device)
        return _registered[op]
    return _reference[op]


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
    _need_native()
    wanted = len(ISAS) if isa == "auto" else ISAS.index(isa)
    got = cast(int, torch.ops.wise_ext.cpu_isa(wanted))
    if isa != "auto" and got != wanted:
        raise NativeError(
            f"this CPU or this build has no {isa} kernels: choose auto or {ISAS[got]}"
        )


def _need_native() -> None:
    if not _state.loaded:
        # What the build said at the time tells more than a missing file.
        causes = "; ".join([_state.failure, *read_build_info().reasons])
        raise NativeError(f"the native module wise_ext._C cannot be used ({causes}): {_REBUILD}")


def _from_environment() -> None:
    """Apply WISE_BACKEND and WISE_CPU_ISA; a bad value warns, since an import must not fail."""
    choice = os.environ.get("WISE_BACKEND", "auto")
    if choice in CHOICES:
        # "native" without a module is refused at the first call, where it can be explained.
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
