"""Seconds a training step, by patch side: the saving that Next Patch Prediction promises, on this machine.

    python scripts/benchmark/train.py --gpt-model GPT-S --batch-size 16 --image-tokens 256 --patch-sizes 1 2 4

A step is forward, backward, clipping and AdamW on random codes. MFU counts 6 FLOPs a matrix weight and position (plus
attention) against the matmul rate measured in the same run.
"""

from functools import partial

import torch
from card import card, finish, matmul_rate, seconds

from autoregressive.models.gpt import PRESETS, GPTConfig, Transformer, preset
from autoregressive.models.patches import grid_side
from autoregressive.train.optim import adamw, update
from utils import cli
from utils.distributed import autocast, precision_dtype


def step_flops(config: GPTConfig, batch: int, patch: int) -> float:
    """Matrix FLOPs of forward and backward: weights of the blocks and the head, and causal attention."""
    positions = config.block_size // patch**2
    qkv = config.dim * (config.n_head + 2 * config.kv_heads) * config.head_dim
    block = qkv + config.dim**2 + 3 * config.dim * config.ffn_hidden
    weights = config.n_layer * block + config.dim * config.vocab_size
    attention = config.n_layer * 2 * positions * config.dim / 2
    return 6.0 * batch * positions * (weights + attention)


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, default="GPT-S")
    add("--batch-size", type=cli.positive_int, default=16)
    add("--image-tokens", type=cli.positive_int, default=256)
    add("--vocab-size", type=cli.positive_int, default=16384)
    add("--patch-sizes", type=cli.positive_int, nargs="+", default=[1, 2, 4])
    add("--steps", type=cli.positive_int, default=20, help="measured steps; their median is reported")
    add("--mixed-precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--compile", action="store_true")
    args = parser.parse_args()
    side = grid_side(args.image_tokens)
    for patch in args.patch_sizes:
        if side % patch:
            raise cli.InputError(f"--patch-sizes {patch} does not divide the grid of {side}x{side} codes")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision_dtype(args.mixed_precision, device)
    config = preset(args.gpt_model, vocab_size=args.vocab_size, block_size=args.image_tokens)
    model = Transformer(config).to(device).train()
    optimizer = adamw(model, 1e-4, 0.05, (0.9, 0.95))
    forward = torch.compile(model, dynamic=False) if args.compile else model
    codes = torch.randint(args.vocab_size, (args.batch_size, args.image_tokens), device=device)
    labels = torch.randint(config.num_classes, (args.batch_size,), device=device)
    amp = partial(autocast, device, dtype)

    peak = matmul_rate(device, dtype)
    machine = card(device)
    print(
        f"{machine}\n{args.gpt_model}, batch {args.batch_size}, {args.image_tokens} codes, matmul {peak / 1e9:.0f} GFLOP/s"
    )
    print("patch   s/step   to p=1    ideal   images/s   positions/s    MFU")
    rows = []
    for patch in sorted(args.patch_sizes):
        step = partial(
            update, forward, optimizer, [(codes, labels)], patch, lr=1e-4, max_grad_norm=1.0, autocast=amp
        )  # fmt: skip
        time = seconds(step, args.steps, device)
        positions = args.batch_size * args.image_tokens // patch**2
        row = {
            "patch": patch,
            "seconds": time,
            "ratio": time / rows[0]["seconds"] if rows else 1.0,
            "ideal": (sorted(args.patch_sizes)[0] / patch) ** 2,
            "images_per_s": args.batch_size / time,
            "positions_per_s": positions / time,
            "mfu": step_flops(config, args.batch_size, patch) / time / peak,
        }
        rows.append(row)
        print(
            f"{patch:>5} {row['seconds']:>8.3f} {row['ratio']:>8.3f} {row['ideal']:>8.4f} {row['images_per_s']:>10.1f} "
            f"{row['positions_per_s']:>13.0f} {row['mfu']:>6.1%}"
        )
    finish({**machine, "benchmark": "train", **vars(args), "matmul_flops": peak, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
