"""What the machine can do, and what a process has used."""

import numpy as np
import torch

from utils.machine import matmul_rate, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def test_the_matmul_rate_is_that_of_a_product():
    assert 1e8 < matmul_rate(CPU, torch.float32, side=256, repeats=3) < 1e14


def test_peak_memory_sees_what_was_freed_until_it_is_reset():
    np.ones(1_000_000_000, np.uint8)  # another test's
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    block = np.ones(200_000_000, np.uint8)
    del block
    assert peak_memory(CPU) > before + 150_000_000
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before + 150_000_000
