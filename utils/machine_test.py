"""What the machine can do, and what a process has used."""

import subprocess
import sys

import pytest
import torch
from torch._inductor import config as inductor

from utils.machine import can_compile, copy_rate, durations, matmul_rate, use_compile
from utils.testing import ROOT

CPU = torch.device("cpu")


def test_the_matmul_rate_is_that_of_a_product():
    assert 1e8 < matmul_rate(CPU, torch.float32, side=256, repeats=3) < 1e14


def test_what_is_slow_is_not_repeated(monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr("utils.machine.time.perf_counter", lambda: next(clock))
    assert durations(lambda: None, 10, CPU, limit=2.0) == [5]
    assert durations(lambda: None, 10, CPU, limit=16.0) == [5, 5]
    assert len(durations(lambda: None, 10, CPU)) == 10
    assert matmul_rate(CPU, torch.float32, side=2) == 16 / 5


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


class TestMachinesWithoutACompiler:
    @pytest.fixture(autouse=True)
    def forget(self):
        can_compile.cache_clear()
        yield
        can_compile.cache_clear()

    @pytest.mark.slow
    def test_inductor_says_so_and_one_line_is_printed(self, capsys):
        with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
            assert not use_compile(True, CPU) and not use_compile(True, CPU)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: torch.compile")]
        assert len(lines) == 1 and "InvalidCxxCompiler: No working C++ compiler" in lines[0]

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\n\nSet TORCH_LOGS"),
            subprocess.CalledProcessError(1, ["gcc", "main.c", "-I/usr/include/python3.11"]),  # without Python.h
            ImportError(),
        ],
        ids=["no C compiler", "no headers", "no Triton"],
    )
    def test_whatever_is_missing(self, error, monkeypatch, capsys):
        def compile(function):
            raise error

        monkeypatch.setattr(torch, "compile", compile)
        assert not use_compile(None, CPU) and not use_compile(False, CPU) and not capsys.readouterr().err
        assert not use_compile(True, CPU)
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "install a C++ compiler and Python's headers" in printed

    def test_by_default_gpus_compile_and_cpus_do_not(self, monkeypatch):
        monkeypatch.setattr("utils.machine.can_compile", lambda device: True)
        gpu = torch.device("cuda")
        asked = [use_compile(choice, device) for choice in (None, True, False) for device in (gpu, CPU)]
        assert asked == [True, False, True, True, False, False]
