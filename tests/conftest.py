"""What every test starts from: one thread, the same random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tests.tiny_models import architecture, lab, model_dir

__all__ = ["architecture", "lab", "model_dir"]

# Timings of a shared machine say nothing about the code.
settings.register_profile("wise", deadline=None)
settings.load_profile("wise")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
