"""The emulator's module: the CUDA kernels, compiled for the CPU by `WISE_TESTING=1`.

It registers its ops in a namespace of its own, and offers plain C functions about the emulator.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from wise_ext.ops import reference, schema

ROOT = Path(__file__).parents[2]
NAMESPACE = "wise_ext_emulated"

_libraries: list[torch.library.Library] = []


def path() -> Path | None:
    """The module: the one WISE_EMULATED names, else the newest in the build folder, else none."""
    chosen = os.environ.get("WISE_EMULATED")
    if chosen is not None:
        return Path(chosen) if chosen else None
    built = sorted(ROOT.glob("build/native-*/*/_emulated*.so"), key=lambda p: p.stat().st_mtime)
    return built[-1] if built else None


@cache
def load_ops() -> frozenset[str]:
    """Define the namespace and load the module; the ops it has, none where it was not built."""
    module = path()
    if module is None:
        return frozenset()
    if not hasattr(getattr(torch.ops, NAMESPACE), "pack"):  # a namespace is defined once a process
        # An empty list of deltas is on no device: there the reference answers, as in wise_ext.
        _libraries.append(schema.register(NAMESPACE, {"ties_merge": reference.ties_merge}))
    torch.ops.load_library(str(module))
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in schema.SCHEMAS if registered(f"{NAMESPACE}::{op}", "CPU"))


@cache
def functions() -> ctypes.CDLL | None:
    """The module's C functions; none where it was not built."""
    if not load_ops():
        return None
    library = ctypes.CDLL(str(path()))
    i32, i64, u32, u64 = ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
    text, pointer = ctypes.c_char_p, ctypes.c_void_p
    for name, result, *arguments in (
        ("wise_emulator_schedule", None, u64),
        ("wise_emulator_launches", u64),
        ("wise_probe", text, text, pointer, pointer, i32),
        ("wise_probe_launch", text, i64, i64, i32, i64),
        ("wise_low_bits", u32, i32),
        ("wise_valid_bits", u32, i64, i64),
        ("wise_words_of", i64, i64),
        ("wise_popcount", i32, u32),
        ("wise_rank_of", i32, u32, i32),
        ("wise_select_bit", i32, u32, i32),
        ("wise_bit_field", u32, u32, i32, i32),
        ("wise_row_fits", i32, i64, i64, i64, i64),
        ("wise_round", None, pointer, pointer, pointer, i64),
        ("wise_widen", None, pointer, pointer, pointer, i64),
        ("wise_widen_vector", None, pointer, pointer, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
