"""How fast codes are drawn, beside what the machine allows and beside simpler loops, and what is spent on what.

    python scripts/benchmark/sample.py --gpt-model GPT-B --batch-sizes 8 --loops cached full
    python scripts/benchmark/sample.py --gpt-model GPT-L --batch-sizes 16 128             # on a GPU

The limit of a step is the longer of two times: its products at the matmul rate, and the weights and caches that it reads at
the rate at which memory is copied, both measured in the same run. The loops draw the same images: `cached` is a plain
eager loop over the model's own layers with caches that grow, `full` runs the whole sequence again for each code.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from card import card, finish
from torch import Tensor

from autoregressive.models.generate import Decoder, PackedLinear, draw, guidance_scales, probabilities
from autoregressive.models.gpt import PRESETS, Transformer, preset
from tokenizer.tokenizer_image import vq_model
from utils import cli, streams
from utils.distributed import best_device, precision_dtype
from utils.machine import copy_rate, durations, matmul_rate
from utils.pixels import to_uint8


def packed_rate(device: torch.device, dtype: torch.dtype, rows: int = 2048) -> float | None:
    """FLOP/s of the packed layer that decoding uses on a CPU, on a square product; None where there is none."""
    linear = torch.nn.Linear(rows, rows, bias=False, device=device, dtype=dtype)
    if not PackedLinear.fits(linear.weight):
        return None
    packed, x = PackedLinear(linear), torch.randn(rows, rows)
    return 2 * rows**3 / min(durations(lambda: packed(x), 10, device))


def step_limit(model: Transformer, batch: int, guided: bool, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs, and bytes read, of the mean step of an image: products with the weights and the caches."""
    c, rows = model.config, 2 * batch if guided else batch
    body = sum(p.numel() for layer in model.layers for p in layer.parameters())
    head = c.dim * c.vocab_size
    cached = c.n_layer * 2 * rows * c.kv_heads * c.head_dim * (c.block_size + 1) / 2
    flops = 2 * (body * rows + head * batch + cached * c.n_head / c.kv_heads)
    return {"flops": flops, "bytes": dtype.itemsize * (body + head + cached)}


def cached_loop(model: Transformer, labels_B: Tensor, uniforms_BL: Tensor, cfg_scale: float) -> Tensor:
    """The straightforward way: eager layers, caches that are concatenated, two rows an image, logits guided."""
    null = torch.full_like(labels_B, model.config.num_classes)
    h_RLD = model.cls_embedding.embedding_table(torch.cat((labels_B, null)))[:, None]
    caches: list[tuple[Tensor, Tensor] | None] = [None] * len(model.layers)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if caches[i] is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(caches[i], (k, v), strict=True))
        caches[i] = k, v
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])

    rope, codes = model.rope_table(model.config.block_size), []
    for t in range(uniforms_BL.shape[1]):
        hidden = model.hidden(h_RLD, rope[t : t + 1], [partial(attend, i) for i in range(len(caches))])
        conditional, unconditional = model.output(hidden)[:, 0].float().chunk(2)
        logits_BV = unconditional + (conditional - unconditional) * cfg_scale
        codes.append(draw(probabilities(logits_BV), uniforms_BL[:, t]))
        h_RLD = model.tok_embeddings(codes[-1]).repeat(2, 1)[:, None]
    return torch.stack(codes, dim=1)


def full_loop(model: Transformer, labels_B: Tensor, uniforms_BL: Tensor, cfg_scale: float) -> Tensor:
    """Without caches: all positions again for each code. What the others must agree with."""
    B, L = uniforms_BL.shape
    null = torch.full_like(labels_B, model.config.num_classes)
    codes_BL = torch.zeros(B, L, dtype=torch.int64, device=labels_B.device)
    rope = model.rope_table(model.config.block_size)
    for t in range(L):
        h_RLD = model.embed(codes_BL[:, :t, None].repeat(2, 1, 1), torch.cat((labels_B, null)))
        last = model.output(model.hidden(h_RLD, rope[: t + 1])[:, -1]).float()
        conditional, unconditional = last.chunk(2)
        logits_BV = unconditional + (conditional - unconditional) * cfg_scale
        codes_BL[:, t] = draw(probabilities(logits_BV), uniforms_BL[:, t])
    return codes_BL


LOOPS = {"cached": cached_loop, "full": full_loop}


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure(args: argparse.Namespace, model: Transformer, batch: int, device: torch.device, dtype: torch.dtype) -> dict:
    """A batch: the decoder's first call and its median afterwards, and the loops beside it."""
    labels = torch.arange(batch, device=device) % model.config.num_classes
    codes = model.config.block_size
    uniforms = torch.from_numpy(streams.uniform(0, streams.SAMPLE, np.arange(batch)[:, None], np.arange(codes))).to(
        device
    )
    decoder = Decoder(model, batch, dtype, args.compile)
    scales = guidance_scales(codes, args.cfg_scale)
    run = partial(decoder, labels, uniforms, scales)
    first, drawn = seconds(run, device)
    runs = []
    for _ in range(args.repeats):
        limits = [matmul_rate(device, dtype), packed_rate(device, dtype), copy_rate(device)]
        runs.append((*limits, seconds(run, device)[0]))
    matmul, packed, copied = (max(row[i] or 0 for row in runs) for i in range(3))
    taken = statistics.median(row[-1] for row in runs)
    work = step_limit(model, batch, args.cfg_scale > 1, dtype)
    limit = {
        name: max(work["flops"] / rate, work["bytes"] / copied)
        for name, rate in (("matmul", matmul), ("packed", max(matmul, packed)))
    }
    late = guidance_scales(codes, max(args.cfg_scale, 2.0), interval=(codes - 1, codes))
    alone = guidance_scales(codes, 1.0)
    row = {
        "batch": batch, "seconds": taken, "first": first, "step": taken / codes,
        "codes_per_s": batch * codes / taken, "images_per_s": batch / taken,
        "limit": limit["matmul"], "share": limit["matmul"] / (taken / codes),
        "limit_packed": limit["packed"], "share_packed": limit["packed"] / (taken / codes),
        "matmul_flops": matmul, "packed_flops": packed, "copy_bytes": copied, **work,
        "unguided": statistics.median(seconds(partial(decoder, labels, uniforms, alone), device)[0] for _ in range(2)),
        # one pass over all positions of the unconditional half, and one guided step
        "prefill": seconds(partial(decoder, labels, uniforms, late), device)[0],
    }  # fmt: skip
    row["prefill"] -= row["unguided"]
    plain = model.to(dtype)
    plain.rope = plain.rope.float()
    for name in args.loops:
        row[f"{name}_seconds"], theirs = seconds(
            partial(LOOPS[name], plain, labels, uniforms, args.cfg_scale), device
        )  # fmt: skip
        row[f"{name}_same_codes"] = float((theirs == drawn).float().mean())
    return row


@torch.inference_mode()
def measure_tokenizer(name: str, codes: int, batch: int, device: torch.device) -> float:
    """Seconds an image, from codes to uint8."""
    tokenizer = vq_model.VQModel(vq_model.preset(name)).to(device, memory_format=torch.channels_last).eval()
    drawn = torch.randint(tokenizer.config.codebook_size, (batch, codes), device=device)
    return statistics.median(durations(lambda: to_uint8(tokenizer.decode_code(drawn)).cpu(), 3, device, 1)) / batch


def report(row: dict[str, Any], loops: list[str]) -> None:
    print(
        f"batch {row['batch']}: {row['step'] * 1e3:.2f} ms a position, {row['codes_per_s']:.0f} codes/s, "
        f"{row['images_per_s']:.3f} images/s; first call {row['first'] - row['seconds']:.1f} s more\n"
        f"  {row['share']:.0%} of the limit of {row['limit'] * 1e3:.2f} ms: {row['flops'] / 1e9:.2f} GFLOP at matmul's "
        f"{row['matmul_flops'] / 1e9:.0f} GFLOP/s, {row['bytes'] / 1e9:.2f} GB at copy's {row['copy_bytes'] / 1e9:.0f} GB/s"
    )
    if row["packed_flops"]:
        print(f"  {row['share_packed']:.0%} at the packed layer's own rate, {row['packed_flops'] / 1e9:.0f} GFLOP/s")
    print(
        f"  a batch takes {row['seconds']:.2f} s, without guidance {row['unguided']:.2f} s; "
        f"the unconditional half's caches in one pass {max(0, row['prefill']):.2f} s"
    )
    for name in loops:
        slower = row[f"{name}_seconds"] / row["seconds"]
        print(f"  {name} loop: {slower:.1f}x as long; {row[f'{name}_same_codes']:.2%} of its codes are the same")


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpt-model", choices=PRESETS, default="GPT-B")
    add("--batch-sizes", type=cli.positive_int, nargs="+", default=[1, 8, 32])
    add("--image-tokens", type=cli.positive_int, default=256)
    add("--vocab-size", type=cli.positive_int, default=16384)
    add("--cfg-scale", type=cli.at_least_one, default=2.0)
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--loops", choices=LOOPS, nargs="*", default=["cached"], help="simpler loops to time, and compare codes with")
    add("--repeats", type=cli.positive_int, default=3)
    add("--vq-model", choices=vq_model.PRESETS, default="VQ-16")
    args = parser.parse_args()
    device = best_device()
    dtype = precision_dtype(args.precision, device)
    machine = card(device)
    torch.manual_seed(0)
    model = (
        Transformer(preset(args.gpt_model, vocab_size=args.vocab_size, block_size=args.image_tokens)).to(device).eval()
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)  # zeros, as it starts, would make every code as likely
    print(
        f"{machine}\n{args.gpt_model}, {args.image_tokens} codes, guidance {args.cfg_scale}, {dtype}, compile {args.compile}"
    )
    rows = []
    for batch in args.batch_sizes:
        row = measure(args, model, batch, device, dtype)
        rows.append(row)
        report(row, args.loops)
    side = 1 if device.type == "cpu" else 32
    tokenizer = measure_tokenizer(args.vq_model, args.image_tokens, side, device)
    print(f"tokenizer {args.vq_model}: {tokenizer:.3f} s an image in batches of {side}")
    finish({**machine, "benchmark": "sample", **vars(args), "rows": rows, "tokenizer_seconds": tokenizer})


if __name__ == "__main__":
    cli.run(main)
