"""Every CUDA kernel compiles for the default architectures, and keeps everything in registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cuda_resources

ARCHITECTURES = {"sm_80", "sm_90a"}


@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda path: path.name)
def test_no_stack_and_no_spills(source: Path) -> None:
    if cuda_resources.compiler() is None:
        pytest.skip("this machine has no nvcc")
    rows = cuda_resources.rows(source)
    if "__global__" not in source.read_text(encoding="utf-8"):
        assert rows == []
        return
    assert {row["arch"] for row in rows} == ARCHITECTURES
    for row in rows:
        assert row["stack_bytes"] == 0 and row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["static_shared_bytes"] <= 48 * 1024, row
