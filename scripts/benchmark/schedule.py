"""The whole command, end to end: a coarse-to-fine run beside next-token training of the same epochs, in wall-clock time.

    python scripts/benchmark/schedule.py --gpt-model GPT-B --batch-size 8 --epochs 4 --steps-per-epoch 12

Both are `train_c2i.py` on random codes with everything it does: start, checkpoints at the ends of levels, curves. The
seconds of starting up and of saving are the same for both, so short runs show less of the saving than long ones do.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from card import card, finish

from autoregressive.models.gpt import PRESETS
from autoregressive.train.schedule import patch_stages, relative_cost
from dataset.codes import toy
from utils import cli
from utils.log import read_metrics

SCRIPT = Path(__file__).parents[2] / "autoregressive" / "train" / "train_c2i.py"


def run(folder: Path, level: int, args) -> tuple[float, float]:
    """Wall-clock seconds of the command, and of its training steps alone."""
    command = [
        sys.executable, SCRIPT, "--code-path", folder / "codes", "--dataset", "toy", "--image-size", "256",
        "--results-dir", folder / f"level{level}", "--gpt-model", args.gpt_model, "--global-batch-size", args.batch_size,
        "--epochs", args.epochs, "--patch-level", level, "--epoch-rate", "0.5", "--scheduler", "--log-every", "1",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    rows = read_metrics(next((folder / f"level{level}").iterdir()))
    return seconds, sum(args.batch_size / row["images_per_s"] for row in rows)


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, default="GPT-B")
    add("--batch-size", type=cli.positive_int, default=8)
    add("--image-tokens", type=cli.positive_int, default=256)
    add("--epochs", type=cli.positive_int, default=4)
    add("--steps-per-epoch", type=cli.positive_int, default=12)
    add("--patch-levels", type=cli.positive_int, nargs="+", default=[2])
    args = parser.parse_args()
    machine = card(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(machine)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = args.batch_size * args.steps_per_epoch
        toy.write_codes(
            folder / "codes",
            images=images,
            views=10,
            tokens=args.image_tokens,
            codebook=16384,
            shard_size=images,
            size=256,
        )
        for level in (1, *args.patch_levels):
            seconds, steps = run(folder, level, args)
            cost = relative_cost(patch_stages(args.epochs, level, 0.5))
            rows.append({"level": level, "seconds": seconds, "step_seconds": steps, "tokens": cost})
            ratio, alone = seconds / rows[0]["seconds"], steps / rows[0]["step_seconds"]
            print(
                f"level {level}: {seconds:.1f} s ({ratio:.3f}), steps alone {steps:.1f} s ({alone:.3f}); tokens {cost:.3f}"
            )
    finish({**machine, "benchmark": "schedule", **json.loads(json.dumps(vars(args))), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
