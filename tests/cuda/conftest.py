"""The emulator's C functions, and a schedule that no test leaves behind."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from tests.emulator import library


@pytest.fixture
def emulator() -> Iterator[ctypes.CDLL]:
    functions = library.functions()
    if functions is None:
        pytest.skip("the emulator was not built: WISE_TESTING=1 python setup.py build_ext -i")
    yield functions
    functions.wise_emulator_schedule(0)
