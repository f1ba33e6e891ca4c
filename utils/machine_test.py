"""What the machine can do, and what a process has used."""

import subprocess
import sys

import torch

from utils.machine import copy_rate, matmul_rate
from utils.testing import ROOT

CPU = torch.device("cpu")


def test_the_matmul_rate_is_that_of_a_product():
    assert 1e8 < matmul_rate(CPU, torch.float32, side=256, repeats=3) < 1e14


def test_the_copy_rate_counts_both_ways():
    assert 1e8 < copy_rate(CPU, size=1 << 22, repeats=3) < 1e13


def test_peak_memory_sees_what_was_freed_until_it_is_reset():
    """In a process of its own: this one may reuse memory that other tests have freed."""
    code = """
import numpy as np
import torch
from utils.machine import peak_memory, reset_peak_memory

cpu = torch.device("cpu")
reset_peak_memory(cpu)
peaks = [peak_memory(cpu)]
block = np.ones(200_000_000, np.uint8)
del block
peaks.append(peak_memory(cpu))
reset_peak_memory(cpu)
peaks.append(peak_memory(cpu))
print(*peaks)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, used, after = map(int, result.stdout.split())
    assert used > before + 150_000_000
    assert after < before + 150_000_000
