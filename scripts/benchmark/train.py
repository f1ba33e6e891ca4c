"""Seconds a training step, by patch side: the saving that Next Patch Prediction promises, on this machine.

    python scripts/benchmark/train.py --gpt-model GPT-B --batch-size 4 --patch-sizes 1 2 4 8
    python scripts/benchmark/train.py --gpt-model GPT-L --batch-size 256 --modes compiled      # on a GPU

A step is what the trainer does: codes gathered from packed shards, forward, backward, clipping, AdamW. MFU counts 6 FLOPs
for each matrix weight and position, and causal attention, against the matmul rate measured in the same run.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from card import card, finish

from autoregressive.models.gpt import PRESETS, Transformer, preset
from autoregressive.models.patches import grid_side, to_patches
from autoregressive.train.optim import Objective, adamw, update
from autoregressive.train.schedule import patch_stages, relative_cost
from dataset.codes import Codes, toy
from dataset.sampler import epoch_batches
from utils import cli
from utils.distributed import autocast, precision_dtype
from utils.machine import keep_freed_memory, matmul_rate, peak_memory, reset_peak_memory


def synchronised_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Step:
    """One training step of a preset on random codes, timed in parts."""

    def __init__(self, args: argparse.Namespace, codes: Codes, compiled: bool, device: torch.device) -> None:
        self.codes, self.batch, self.device = codes, args.batch_size, device
        config = preset(
            args.gpt_model, vocab_size=args.vocab_size, block_size=args.image_tokens,
            token_dropout_p=args.dropout_p, resid_dropout_p=args.dropout_p, ffn_dropout_p=args.dropout_p,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = Transformer(config).to(device).train()
        self.optimizer = adamw(self.model, 1e-4, 0.05, (0.9, 0.95))
        self.objective = Objective(self.model, args.activation_checkpointing)
        if compiled:
            self.objective = torch.compile(self.objective, dynamic=False)
        self.amp = partial(autocast, device, precision_dtype(args.mixed_precision, device))
        self.selections = self._endless()

    def _endless(self):
        for epoch in range(10**6):
            yield from epoch_batches(len(self.codes), self.codes.views, self.batch, seed=0, epoch=epoch, label_drop=0.1)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        selection = next(self.selections)
        codes, labels = self.codes.batch(selection.indices, selection.views)
        labels = np.where(selection.dropped, self.model.config.num_classes, labels)
        return tuple(torch.from_numpy(a).to(self.device) for a in (codes, labels))

    def gradients(self, patch: int) -> None:
        """Forward and backward alone."""
        codes, labels = self.data()
        with self.amp():
            loss = self.objective(to_patches(codes, patch), labels)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self, patch: int) -> None:
        update(
            self.objective, self.optimizer, [self.data()], patch, lr=1e-4, max_grad_norm=1.0, autocast=self.amp
        )  # fmt: skip


def measure(step: Step, patch: int, steps: int, device: torch.device) -> dict:
    """Medians over `steps`: the whole step, forward and backward alone, the wait for data; the first call apart."""
    reset_peak_memory(device)
    start = synchronised_time(device)
    step.whole(patch)
    first = synchronised_time(device) - start
    times = {"seconds": [], "forward_backward": [], "data": []}
    for _ in range(steps):
        for key, call in (
            ("seconds", step.whole),
            ("forward_backward", step.gradients),
            ("data", lambda _: step.data()),
        ):
            start = synchronised_time(device)
            call(patch)
            times[key].append(synchronised_time(device) - start)
    return {key: statistics.median(values) for key, values in times.items()} | {
        "first": first,
        "memory_gb": peak_memory(device) / 1e9,
    }


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, default="GPT-S")
    add("--batch-size", type=cli.positive_int, default=16)
    add("--image-tokens", type=cli.positive_int, default=256)
    add("--vocab-size", type=cli.positive_int, default=16384)
    add("--patch-sizes", type=cli.positive_int, nargs="+", default=[1, 2, 4])
    add("--modes", choices=("eager", "compiled"), nargs="+", default=["eager"])
    add("--dropout-p", type=cli.fraction, default=0.1)
    add("--activation-checkpointing", action="store_true")
    add("--steps", type=cli.positive_int, default=10, help="measured steps; their median is reported")
    add("--mixed-precision", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()
    side = grid_side(args.image_tokens)
    for patch in args.patch_sizes:
        if side % patch:
            raise cli.InputError(f"--patch-sizes {patch} does not divide the grid of {side}x{side} codes")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision_dtype(args.mixed_precision, device)
    keep_freed_memory()
    machine, rows = card(device), []
    print(f"{machine}\n{args.gpt_model}, batch {args.batch_size}, {args.image_tokens} codes, {dtype}")
    print(
        "mode      patch   s/step  to p=1  fwd+bwd  to p=1   ideal  images/s  positions/s    MFU  data    GB  first call"
    )
    with tempfile.TemporaryDirectory() as folder:
        images = max(4096, 4 * args.batch_size)
        toy.write_codes(
            Path(folder), images=images, views=10, tokens=args.image_tokens, codebook=args.vocab_size, shard_size=images
        )
        codes = Codes(folder, "toy", 32)
        for mode in args.modes:
            step = Step(args, codes, mode == "compiled", device)
            mine = []
            for patch in sorted(args.patch_sizes, reverse=True):  # as training goes
                before = matmul_rate(device, dtype)
                row = {"mode": mode, "patch": patch, **measure(step, patch, args.steps, device)}
                rate = (before + matmul_rate(device, dtype)) / 2
                flops = args.batch_size * step.model.config.training_flops(patch)
                row |= {
                    "images_per_s": args.batch_size / row["seconds"],
                    "positions_per_s": args.batch_size * args.image_tokens / patch**2 / row["seconds"],
                    "matmul_flops": rate,
                    "mfu": flops / row["seconds"] / rate,
                    "data_wait": row["data"] / row["seconds"],
                }
                mine.insert(0, row)
            report(mine)
            report_schedules(mine)
            rows += mine
    rates = [row["matmul_flops"] for row in rows]
    print(f"matmul {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s")
    finish({**machine, "benchmark": "train", **vars(args), "rows": rows})


def report(rows: list[dict]) -> None:
    """A line a patch side, beside the finest one."""
    base = rows[0]
    for row in rows:
        row["ratio"] = row["seconds"] / base["seconds"]
        row["ratio_forward_backward"] = row["forward_backward"] / base["forward_backward"]
        row["ideal"] = (base["patch"] / row["patch"]) ** 2
        print(
            f"{row['mode']:<8} {row['patch']:>6} {row['seconds']:>8.3f} {row['ratio']:>7.3f} {row['forward_backward']:>8.3f} "
            f"{row['ratio_forward_backward']:>7.3f} {row['ideal']:>7.4f} {row['images_per_s']:>9.1f} "
            f"{row['positions_per_s']:>12.0f} {row['mfu']:>6.1%} {row['data_wait']:>5.1%} {row['memory_gb']:>5.1f} "
            f"{row['first']:>10.1f}s"
        )


def report_schedules(rows: list[dict]) -> None:
    """What these step times make of the paper's schedules, beside next-token training of the same epochs."""
    seconds = {row["patch"]: row["seconds"] for row in rows}
    for level in (2, 3, 4):
        stages = patch_stages(300, level, 0.5)
        if all(stage.patch in seconds for stage in stages):
            time = sum((s.stop - s.start) * seconds[s.patch] for s in stages) / (300 * seconds[1])
            tokens = relative_cost(stages)
            print(
                f"  {level} levels at rate 0.5: {time:.3f} of the time; {tokens:.3f} of the tokens ({time / tokens:.3f}x)"
            )


if __name__ == "__main__":
    cli.run(main)
