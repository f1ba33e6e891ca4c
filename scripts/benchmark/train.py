"""Training: the cost of a step by patch side, and of a whole run, beside next-token training.

    python -m scripts.benchmark.train --gpt-model GPT-B --batch-size 4 --patch-sizes 1 2 4 8
    python -m scripts.benchmark.train --gpt-model GPT-L --batch-size 256 --compile                # on a GPU
    python -m scripts.benchmark.train --measure runs --gpt-model GPT-B --batch-size 8
    python -m scripts.benchmark.train --measure operations --gpt-model GPT-B --batch-size 4

Both run the training command on random codes. steps: medians of what it logs of its steps, from gathering codes to AdamW.
MFU counts 6 FLOPs for each matrix weight and position, and causal attention, against the matmul rate measured in the same
run. runs: the whole command, with its start, checkpoints and curves. These cost the same at every level, so short runs
show less of the saving than long ones. operations: those of utils/kernels.py beside PyTorch's own, on a CPU,
at the shapes of a step; the group norm is that of the small tokenizer.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import PRESETS, preset
from autoregressive.models.patches import grid_side
from autoregressive.train import train_c2i
from autoregressive.train.schedule import patch_levels, relative_cost
from dataset.codes import toy
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from utils import cli, kernels
from utils.distributed import autocast, best_device, precision_dtype
from utils.log import read_metrics
from utils.machine import durations, keep_freed_memory
from utils.settings import Fraction, PositiveInt, Settings, one_of, setting

RATE = 0.5  # of the schedules, as published
WARMUP = 2  # steps that are left out
LOGGED = {
    "images_per_s": "images/s", "tokens_per_s": "positions/s", "mfu": "MFU", "data_wait": "data wait", "memory_gb": "GB",
}  # fmt: skip


class TrainBenchmarkSettings(Settings):
    """The settings of this benchmark; see --help."""

    measure: list[one_of(("steps", "runs", "operations"))] = setting(["steps"])
    gpt_model: one_of(PRESETS) = setting("GPT-S")
    batch_size: PositiveInt = setting(16)
    image_tokens: PositiveInt = setting(256, "codes an image")
    vocab_size: PositiveInt = setting(16384)
    mixed_precision: one_of(("auto", "fp32", "bf16")) = setting("auto")
    patch_sizes: list[PositiveInt] = setting([1, 2, 4], "of the steps")
    steps: PositiveInt = setting(10, "of each patch side; their medians are reported")
    dropout_p: Fraction = setting(0.1, "of the steps")
    activation_checkpointing: bool = setting(False, "in the steps")
    compile: bool = setting(False, "torch.compile in the steps")
    levels: list[PositiveInt] = setting([2], "patch levels of the runs")
    epochs: PositiveInt = setting(4, "of a run")
    steps_per_epoch: PositiveInt = setting(12, "of a run")


def write_codes(s: TrainBenchmarkSettings, folder: str, steps: int) -> None:
    """Random codes for so many steps an epoch."""
    toy.write_codes(
        Path(folder),
        images=s.batch_size * steps,
        views=10,
        tokens=s.image_tokens,
        codebook=s.vocab_size,
        shard_size=8192,
    )


def train(s: TrainBenchmarkSettings, codes: str, *flags: object) -> tuple[float, list[dict[str, Any]]]:
    """Train on these codes by the command, in a process of its own: its seconds, and what it logs of each step."""
    with tempfile.TemporaryDirectory() as results:
        arguments = [
            "--code-path", codes, "--dataset", "toy", "--image-size", 32, "--results-dir", results, "--gpt-model", s.gpt_model,
            "--global-batch-size", s.batch_size, "--mixed-precision", s.mixed_precision, "--log-every", 1, *flags,
        ]  # fmt: skip
        seconds, _ = harness.timed(lambda: harness.in_a_process(train_c2i.main, list(map(str, arguments))))
        return seconds, [row for row in read_metrics(Path(results) / f"000-{s.gpt_model}") if "loss" in row]


def measure_steps(s: TrainBenchmarkSettings) -> list[dict[str, Any]]:
    """A row a patch side, fine to coarse: medians of its steps."""
    flags = ["--dropout-p", s.dropout_p, "--token-dropout-p", s.dropout_p]
    flags += ["--activation-checkpointing"] if s.activation_checkpointing else []
    flags += ["--compile" if s.compile else "--no-compile"]
    rows = []
    with tempfile.TemporaryDirectory() as codes:
        write_codes(s, codes, WARMUP + s.steps)
        for patch in sorted(set(s.patch_sizes)):
            _, steps = train(s, codes, "--patch-sizes", patch, "--patch-steps", WARMUP + s.steps, *flags)
            logged = {key: statistics.median(step[key] for step in steps[WARMUP:]) for key in LOGGED}
            rows.append({
                "patch": patch, "s/step": s.batch_size / logged["images_per_s"],
                **{name: logged[key] for key, name in LOGGED.items()},
            })  # fmt: skip
    for row in rows:
        row["of p1"] = row["s/step"] / rows[0]["s/step"]
        row["positions"] = (rows[0]["patch"] / row["patch"]) ** 2
    print(f"'of p1': relative to patches of side {rows[0]['patch']}")
    harness.table(rows, {
        "patch": "d", "s/step": ".3f", "of p1": ".3f", "positions": ".4f", "images/s": ".1f", "positions/s": ".0f",
        "MFU": ".1%", "data wait": ".1%", "GB": ".1f",
    })  # fmt: skip
    print_schedules({row["patch"]: row["s/step"] for row in rows})
    return rows


def print_schedules(seconds: dict[int, float]) -> None:
    """What steps of these times, by patch side, make of the paper's schedules, beside next-token training."""
    for level in (2, 3, 4):
        rows = patch_levels(300, level, RATE)
        if all(row.patch in seconds for row in rows):
            time = sum((row.stop - row.start) * seconds[row.patch] for row in rows) / (300 * seconds[1])
            print(f"{level} levels at rate {RATE}: {time:.3f} of the time, {relative_cost(rows):.3f} of the positions")


def measure_runs(s: TrainBenchmarkSettings) -> list[dict[str, Any]]:
    """A row a run: wall-clock seconds of the command in a process of its own, and of its steps alone."""
    rows = []
    with tempfile.TemporaryDirectory() as codes:
        write_codes(s, codes, s.steps_per_epoch)
        for level in (1, *s.levels):
            schedule = ("--epochs", s.epochs, "--patch-level", level, "--epoch-rate", RATE, "--scheduler")
            seconds, steps = train(s, codes, *schedule)
            rows.append({
                "levels": level, "seconds": seconds,
                "steps alone": sum(s.batch_size / step["images_per_s"] for step in steps),
                "positions": relative_cost(patch_levels(s.epochs, level, RATE)),
            })  # fmt: skip
    for row in rows:
        row["of next-token"] = row["seconds"] / rows[0]["seconds"]
        row["steps of next-token"] = row["steps alone"] / rows[0]["steps alone"]
    harness.table(rows, {
        "levels": "d", "seconds": ".1f", "of next-token": ".3f", "steps alone": ".1f", "steps of next-token": ".3f",
        "positions": ".3f",
    })  # fmt: skip
    return rows


def measure_operations(s: TrainBenchmarkSettings) -> list[dict[str, Any]]:
    """A row an operation and shape: milliseconds of ours and of PyTorch's own, medians of calls in turn.

    Products are forward passes and gradients one by one, in float32; the others are forward and backward passes.
    """
    config = preset(s.gpt_model, vocab_size=s.vocab_size, block_size=s.image_tokens)
    width, heads, rows = config.dim, config.n_head, []

    def both_passes(operation: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
        inputs = [x.clone().requires_grad_() for x in inputs]
        gradient = torch.randn_like(operation(*inputs))
        return lambda: torch.autograd.grad(operation(*inputs), inputs, gradient)

    def compare(name: str, shape: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        turns = [[1000 * min(durations(call, 3, CPU, warmup=1)) for call in (ours, theirs)] for _ in range(s.steps)]
        a, b = map(statistics.median, zip(*turns, strict=True))
        rows.append({"operation": name, "shape": shape, "ms": a, "PyTorch's": b, "gain": b / a})

    images = s.batch_size * s.image_tokens
    for name, out in (("qkv", 3 * width), ("w1", config.ffn_hidden), ("head", s.vocab_size)):
        x, weight, gradient = torch.randn(images, width), torch.randn(out, width), torch.randn(images, out)
        for part, a, b in (("forward", x, weight.t()), ("dx", gradient, weight), ("dweight", gradient.t(), x)):
            compare(f"product, {part}", name, partial(kernels.product, a, b), partial(torch.matmul, a, b))
    for patch in s.patch_sizes:
        positions = s.image_tokens // patch**2
        qkv = [torch.randn(s.batch_size, heads, positions, width // heads, dtype=torch.bfloat16) for _ in range(3)]
        ours, theirs = (partial(f, is_causal=True) for f in (kernels.attention, F.scaled_dot_product_attention))
        compare("attention, bf16", f"{positions} positions", both_passes(ours, *qkv), both_passes(theirs, *qkv))
        x = torch.randn(s.batch_size, positions, width)
        ours, theirs = (partial(f, p=0.1, training=True) for f in (kernels.dropout, F.dropout))
        compare("dropout", f"{positions} positions", both_passes(ours, x), both_passes(theirs, x))
    x = torch.randn(64, 64, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with autocast(CPU, torch.bfloat16):
        norms = [both_passes(norm(32, 64), x) for norm in (kernels.GroupNorm, nn.GroupNorm)]
        compare("group norm, bf16", "64x64x16x16", *norms)
    harness.table(rows, {"operation": "s", "shape": "s", "ms": ".2f", "PyTorch's": ".2f", "gain": ".2f"})
    return rows


def main(arguments: list[str] | None = None) -> None:
    s = TrainBenchmarkSettings.from_command_line(__doc__, arguments)
    side = grid_side(s.image_tokens)
    if wrong := [patch for patch in s.patch_sizes if side % patch]:
        raise cli.InputError(f"--patch-sizes {wrong[0]} does not divide the grid of {side}x{side} codes")
    device = best_device()
    keep_freed_memory()
    machine = harness.start(device)
    print(f"{s.gpt_model}, batch {s.batch_size}, {s.image_tokens} codes, {precision_dtype(s.mixed_precision, device)}")
    measurements = {
        "steps": lambda: measure_steps(s),
        "runs": lambda: measure_runs(s),
        "operations": lambda: measure_operations(s),
    }
    results = {name: measure() for name, measure in measurements.items() if name in s.measure}
    harness.finish("train", machine, s, **results)


if __name__ == "__main__":
    cli.run(main)
