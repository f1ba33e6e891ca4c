"""For every test: no GPU, because the golden numbers are a CPU's in float32; no deadlines, because machines are busy.

PyTorch's random numbers are the same in each run of a test: one in many hundred draws is close enough to a limit to fail.
"""

import os

import pytest
import torch
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
