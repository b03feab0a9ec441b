"""Triton's interpreter, made right for bfloat16.

The interpreter stores bfloat16 as its bits in uint16. Its `tl.dot` multiplies those integers, and
its cast from float32 truncates where a card rounds. Call `install()` once in a process that runs
kernels with TRITON_INTERPRET=1, before the first launch; calling it again does nothing, and other
dtypes are untouched. What stays wrong is element-wise arithmetic on bfloat16: kernels widen right
after the load.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits: to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def install() -> None:
    """Make `tl.dot` and casts of bfloat16 compute what a card computes."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "installed", False):
        return
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def float32_of(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widened(handle.data), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain_dot(self, float32_of(a), float32_of(b), *rest)

    def cast_impl(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if (before, after) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(source.data), after)
        if (before, after) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded(source.data), after)
        return plain_cast(self, source, target)

    builder.create_dot, builder.cast_impl, builder.installed = create_dot, cast_impl, True
