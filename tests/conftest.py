"""What every test starts from: one thread, the same random numbers."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from tests.tiny_models import architecture, bare, lab, model_dir, tokenizer

__all__ = ["architecture", "bare", "lab", "model_dir", "tokenizer"]

pytest_plugins = ["tests.outcomes"]

# Timings of a shared machine say nothing about the code.
settings.register_profile("wise", deadline=None)
settings.load_profile("wise")
torch.set_num_threads(1)

if os.environ.get("WISE_TEST_DEVICE") == "cuda" and not torch.cuda.is_available():
    pytest.exit("make gpu needs a CUDA device that torch can see; make test needs none", 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
