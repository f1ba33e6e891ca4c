"""Training: the cost of a step by patch side, and of a whole run, beside next-token training.

    python -m scripts.benchmark.train --gpt-model GPT-B --batch-size 4 --patch-sizes 1 2 4 8
    python -m scripts.benchmark.train --gpt-model GPT-L --batch-size 256 --compile                # on a GPU
    python -m scripts.benchmark.train --measure runs --gpt-model GPT-B --batch-size 8
    python -m scripts.benchmark.train --measure operations --gpt-model GPT-B --batch-size 4

steps: what the trainer does in a step, on random codes: gather them from packed shards, forward, backward, clipping,
AdamW. MFU counts 6 FLOPs for each matrix weight and position, and causal attention, against the matmul rate measured in
the same run. runs: the whole training command, with its start, checkpoints and curves. These cost the same at every level,
so short runs show less of the saving than long ones. operations: those of utils/kernels.py beside PyTorch's own, on a CPU,
at the shapes of a step; the group norm is that of the small tokenizer.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import PRESETS, Transformer, preset
from autoregressive.models.patches import grid_side
from autoregressive.train import train_c2i
from autoregressive.train.gpt_task import Data, GPTTask
from autoregressive.train.schedule import Level, Plan, patch_levels, relative_cost
from dataset.codes import Codes, toy
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from utils import cli, kernels
from utils.distributed import World, autocast, best_device, precision_dtype
from utils.log import read_metrics
from utils.machine import durations, keep_freed_memory, matmul_rate, peak_memory, reset_peak_memory
from utils.settings import Fraction, PositiveInt, Settings, one_of, setting
from utils.task import EngineSettings
from utils.update import update

RATE = 0.5  # of the schedules, as published


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


def write_codes(s: TrainBenchmarkSettings, folder: Path, images: int, size: int) -> None:
    """Random codes of so many images, named toy{size}, in one packed shard."""
    toy.write_codes(
        folder, images=images, views=10, tokens=s.image_tokens, codebook=s.vocab_size, shard_size=images, size=size
    )


def make_task(s: TrainBenchmarkSettings, codes: Codes, device: torch.device) -> GPTTask:
    """Training of a fresh GPT; level i of its plan is step i, on the i-th largest patches."""
    config = preset(
        s.gpt_model, vocab_size=s.vocab_size, block_size=s.image_tokens,
        token_dropout_p=s.dropout_p, resid_dropout_p=s.dropout_p, ffn_dropout_p=s.dropout_p,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).to(device).train()
    levels = [Level(patch, i, i + 1) for i, patch in enumerate(sorted(set(s.patch_sizes), reverse=True))]
    plan = Plan(levels, len(codes) // s.batch_size, lr=1e-4)
    settings = EngineSettings(global_batch_size=s.batch_size)
    return GPTTask(model, Data(codes), plan, settings, label_drop=0.1, recompute=s.activation_checkpointing)


def measure_steps(s: TrainBenchmarkSettings, device: torch.device) -> list[dict[str, Any]]:
    """A row a patch side, fine to coarse: medians of a whole step, of forward and backward alone, of the wait for data."""
    dtype, rows = precision_dtype(s.mixed_precision, device), []
    with tempfile.TemporaryDirectory() as folder:
        write_codes(s, Path(folder), max(4096, 4 * s.batch_size), 32)
        task = make_task(s, Codes(folder, "toy", 32), device)
        world = World(0, 1, device)
        batches = itertools.chain.from_iterable(task.batches(epoch, 0, world) for epoch in itertools.count())
        objective = torch.compile(task.objective, dynamic=False) if s.compile else task.objective
        amp = partial(autocast, device, dtype)

        def data() -> list[Tensor]:
            return [tensor.to(device) for tensor in next(batches)]

        def gradients(step: int) -> None:
            with amp():
                loss = task.loss(objective, data(), step)["loss"]
            loss.backward()
            task.optimizer.zero_grad(set_to_none=True)

        def whole(step: int) -> None:
            update(
                lambda batch: task.loss(objective, batch, step), objective, task.optimizer, [data()], lr=1e-4,
                max_grad_norm=1.0, amp=amp,
            )  # fmt: skip

        for step, (patch, *_) in enumerate(task.plan.levels):  # coarse to fine, as training goes
            before = matmul_rate(device, dtype)
            reset_peak_memory(device)
            first, _ = harness.timed(partial(whole, step), device)
            calls = (partial(whole, step), partial(gradients, step), data)
            times = [[harness.timed(call, device)[0] for call in calls] for _ in range(s.steps)]
            seconds, forward_backward, wait = map(statistics.median, zip(*times, strict=True))
            memory, rate = peak_memory(device), (before + matmul_rate(device, dtype)) / 2
            rows.insert(0, {
                "patch": patch, "s/step": seconds, "fwd+bwd": forward_backward, "images/s": s.batch_size / seconds,
                "positions/s": s.batch_size * s.image_tokens / patch**2 / seconds,
                "MFU": s.batch_size * task.flops(step) / seconds / rate, "data wait": wait / seconds,
                "GB": memory / 1e9, "first call": first, "matmul GFLOP/s": rate / 1e9,
            })  # fmt: skip
    for row in rows:
        row["of p1"] = row["s/step"] / rows[0]["s/step"]
        row["fwd+bwd of p1"] = row["fwd+bwd"] / rows[0]["fwd+bwd"]
        row["positions"] = (rows[0]["patch"] / row["patch"]) ** 2
    print(f"'of p1': relative to patches of side {rows[0]['patch']}")
    harness.table(rows, {
        "patch": "d", "s/step": ".3f", "of p1": ".3f", "fwd+bwd": ".3f", "fwd+bwd of p1": ".3f", "positions": ".4f",
        "images/s": ".1f", "positions/s": ".0f", "MFU": ".1%", "data wait": ".1%", "GB": ".1f", "first call": ".1f",
        "matmul GFLOP/s": ".0f",
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_codes(s, folder / "codes", s.batch_size * s.steps_per_epoch, 256)
        for level in (1, *s.levels):
            results = folder / f"level{level}"
            arguments = [
                "--code-path", folder / "codes", "--dataset", "toy", "--image-size", 256, "--results-dir", results,
                "--gpt-model", s.gpt_model, "--global-batch-size", s.batch_size, "--epochs", s.epochs, "--patch-level", level,
                "--epoch-rate", RATE, "--scheduler", "--log-every", 1, "--mixed-precision", s.mixed_precision,
            ]  # fmt: skip
            seconds, _ = harness.timed(partial(harness.in_a_process, train_c2i.main, list(map(str, arguments))))
            speeds = [row["images_per_s"] for row in read_metrics(results / f"000-{s.gpt_model}") if "loss" in row]
            steps = sum(s.batch_size / speed for speed in speeds)
            rows.append({"levels": level, "seconds": seconds, "steps alone": steps,
                         "positions": relative_cost(patch_levels(s.epochs, level, RATE))})  # fmt: skip
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
        "steps": lambda: measure_steps(s, device),
        "runs": lambda: measure_runs(s),
        "operations": lambda: measure_operations(s),
    }
    results = {name: measure() for name, measure in measurements.items() if name in s.measure}
    harness.finish("train", machine, s, **results)


if __name__ == "__main__":
    cli.run(main)
