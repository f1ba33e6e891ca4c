"""For every test: no GPU, because the golden numbers are a CPU's in float32; no deadlines, because machines are busy.

PyTorch's random numbers are the same in each run of a test: one in many hundred draws is close enough to a limit to fail.
Signals that are ignored, as under nohup, would be ignored by the commands under test, too.
"""

import os
import signal

import pytest
import torch
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
