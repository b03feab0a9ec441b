"""What only a card can show. `make gpu` runs these; other runs leave them out."""

from __future__ import annotations

import os

import pytest

from tests.ops.conftest import (
    PROVIDERS,
    device,
    make_bank,
    provider,
    pytest_generate_tests,
    to_bits,
)

__all__ = ["PROVIDERS", "device", "make_bank", "provider", "pytest_generate_tests", "to_bits"]

ON_A_CARD = os.environ.get("WISE_TEST_DEVICE") == "cuda"
collect_ignore_glob = [] if ON_A_CARD else ["test_*.py"]


@pytest.fixture(params=["add_side_", "add_low_rank_", "dual_linear", "side_norm", "sketch_norm"])
def inference_op(request: pytest.FixtureRequest) -> str:
    """The ops a running model calls."""
    name: str = request.param
    return name
