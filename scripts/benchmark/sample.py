"""Sampling: how fast codes are drawn beside what the machine allows, what loading weights and writing images take.

    python -m scripts.benchmark.sample --gpt-model GPT-B --batch-sizes 8
    python -m scripts.benchmark.sample --gpt-model GPT-L --batch-sizes 16 128                     # on a GPU
    python -m scripts.benchmark.sample --measure loading --gpt-model GPT-XXL
    python -m scripts.benchmark.sample --measure writing

decoding: the limit of a step is the longer of two times: its products at the matmul rate, and the weights and caches that
it reads at the rate at which memory is copied, both measured in the same run. A plain eager loop over the model's own
layers, with caches that grow, draws the same images beside it.
loading: bf16 weights (all equal: nothing depends on them) in one .pt and in several safetensors files, each loaded as the
stages do, in a process of its own; needs them twice on disk and twice in memory. writing: images of noise go through the
sampler's own files and are read back.
"""

import statistics
import tempfile
from collections import deque
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.generate import Decoder, image_uniforms
from autoregressive.models.gpt import GPT, PRESETS, Transformer, preset
from autoregressive.models.guidance import draw, guidance_scales, probabilities
from autoregressive.sample.sample_c2i_ddp import images_of
from scripts.benchmark import harness
from scripts.benchmark.harness import CPU
from tokenizer.tokenizer_image import vq_model as vq
from utils import checkpoint, cli, samples
from utils.distributed import best_device, precision_dtype
from utils.log import progress
from utils.machine import copy_rate, durations, matmul_rate, peak_memory, reset_peak_memory, use_compile
from utils.parts import Parts
from utils.pixels import to_uint8
from utils.settings import AtLeastOne, ExistingFolder, PositiveInt, Settings, one_of, setting


def plain_loop(model: Transformer, labels_B: Tensor, uniforms_BL: Tensor, cfg_scale: float) -> Tensor:
    """The straightforward way: eager layers, caches that are concatenated, two rows an image, logits guided."""
    labels_R = torch.cat((labels_B, torch.full_like(labels_B, model.config.num_classes)))
    h_RLD = model.cls_embedding.embedding_table(labels_R)[:, None]
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


class SampleBenchmarkSettings(Settings):
    """The settings of this benchmark; see --help."""

    measure: list[one_of(("decoding", "loading", "writing"))] = setting(["decoding"])
    gpt_model: one_of(PRESETS) = setting("GPT-B", "of decoding and loading")
    batch_sizes: list[PositiveInt] = setting([1, 8, 32], "of decoding")
    image_tokens: PositiveInt = setting(256, "codes an image")
    vocab_size: PositiveInt = setting(16384)
    cfg_scale: AtLeastOne = setting(2.0)
    precision: one_of(("auto", "fp32", "bf16", "fp16")) = setting("auto", "of decoding")
    compile: bool | None = setting(None, "torch.compile in decoding (default: on GPUs)")
    loop: bool = setting(True, "also time a plain loop, and compare its codes")
    repeats: PositiveInt = setting(3, "of a batch; the median is reported")
    vq_model: one_of(vq.PRESETS) = setting("VQ-16")
    images: PositiveInt = setting(50000, "images to write")
    image_size: PositiveInt = setting(256, "of the images to write")
    write_batch: PositiveInt = setting(32, "images a part")
    folder: ExistingFolder | None = setting(None, "where files are written; default: the system's temporary folder")


def step_work(model: Transformer, batch: int, guided: bool, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs, and bytes read, of the mean step of an image: products with the weights and the caches."""
    c, rows = model.config, 2 * batch if guided else batch
    body = sum(p.numel() for layer in model.layers for p in layer.parameters())
    head = c.dim * c.vocab_size
    cached = c.n_layer * 2 * rows * c.kv_heads * c.head_dim * (c.block_size + 1) / 2
    flops = 2 * (body * rows + head * batch + cached * c.n_head / c.kv_heads)
    return flops, dtype.itemsize * (body + head + cached)


@torch.inference_mode()
def decoding(s: SampleBenchmarkSettings, model: Transformer, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """A batch: the decoder's first call and its median afterwards, the limits of a step, and the plain loop."""
    device, codes = model.output.weight.device, model.config.block_size
    labels = torch.arange(batch, device=device) % model.config.num_classes
    uniforms = image_uniforms(0, np.arange(batch), codes).to(device)
    decoder = Decoder(model, batch, dtype, use_compile(s.compile, device))
    scales = guidance_scales(codes, s.cfg_scale)
    draw_batch = partial(harness.timed, lambda: decoder(labels, uniforms, scales), device)
    first, drawn = draw_batch()
    runs = [(matmul_rate(device, dtype), copy_rate(device), draw_batch()[0]) for _ in range(s.repeats)]
    matmul_rates, copy_rates, times = zip(*runs, strict=True)
    matmul, copied, taken = max(matmul_rates), max(copy_rates), statistics.median(times)
    flops, read = step_work(model, batch, s.cfg_scale > 1, dtype)
    limit = max(flops / matmul, read / copied)
    row = {
        "batch": batch, "ms/position": 1e3 * taken / codes, "codes/s": batch * codes / taken, "images/s": batch / taken,
        "first call": first - taken, "limit ms": 1e3 * limit, "of limit": limit * codes / taken, "MB read": read / 1e6,
        "matmul GFLOP/s": matmul / 1e9, "copy GB/s": copied / 1e9,
    }  # fmt: skip
    if s.loop:
        plain = model.to(dtype)
        plain.rope = plain.rope.float()
        loop, theirs = harness.timed(lambda: plain_loop(plain, labels, uniforms, s.cfg_scale), device)
        row["loop x"], row["same codes"] = loop / taken, float((theirs == drawn).float().mean())
    return row


@torch.inference_mode()
def pixels(name: str, codes: int, batch: int, device: torch.device) -> float:
    """Seconds an image, from codes to uint8."""
    tokenizer = vq.VQModel(vq.preset(name)).to(device, memory_format=torch.channels_last).eval()
    drawn = torch.randint(tokenizer.config.codebook_size, (batch, codes), device=device)
    return statistics.median(durations(lambda: to_uint8(tokenizer.decode_code(drawn)).cpu(), 3, device, 1)) / batch


def measure_decoding(s: SampleBenchmarkSettings, device: torch.device) -> dict[str, Any]:
    dtype = precision_dtype(s.precision, device)
    torch.manual_seed(0)
    config = preset(s.gpt_model, vocab_size=s.vocab_size, block_size=s.image_tokens)
    model = Transformer(config).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)  # zeros, as it starts, would make every code as likely
    print(f"{s.gpt_model}, {s.image_tokens} codes, guidance {s.cfg_scale}, {dtype}")
    rows = [decoding(s, model, batch, dtype) for batch in s.batch_sizes]
    loop = {"loop x": ".1f", "same codes": ".2%"} if s.loop else {}
    harness.table(rows, {
        "batch": "d", "ms/position": ".2f", "codes/s": ".0f", "images/s": ".3f", "first call": ".1f", "limit ms": ".2f",
        "of limit": ".0%", "MB read": ".0f", "matmul GFLOP/s": ".0f", "copy GB/s": ".0f", **loop,
    })  # fmt: skip
    side = 1 if device.type == "cpu" else 32
    seconds = pixels(s.vq_model, s.image_tokens, side, device)
    print(f"{s.vq_model}: {seconds:.3f} s an image from codes to pixels, {side} at once")
    return {"decoding": rows, "pixels_seconds": seconds}


def write_weights(folder: Path, name: str) -> list[Path]:
    """A preset's weights in bf16, as a .pt file and as a folder of safetensors of 1 GB; the paths."""
    config = preset(name)
    shapes = {key: tuple(value.shape) for key, value in GPT.empty(config).state_dict().items()}
    state = {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()}
    about = {"config": asdict(config), "gpt_model": name}
    checkpoint.save(folder / "gpt.pt", {**about, "model": state})
    checkpoint.save_folder(folder / "shards", state, about, "1GB")
    return [folder / "gpt.pt", folder / "shards"]


def load(path: Path) -> dict[str, Any]:
    """What loading takes: seconds, and the most that this process had resident beyond what it had before."""
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    seconds, model = harness.timed(lambda: GPT.from_pretrained(path))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"file": path.name, "GB": weights / 1e9, "peak GB": (peak_memory(CPU) - before) / 1e9, "seconds": seconds}


def measure_loading(s: SampleBenchmarkSettings) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        rows = [harness.in_a_process(load, path) for path in write_weights(Path(folder), s.gpt_model)]
    print(f"loading {s.gpt_model}")
    harness.table(rows, {"file": "s", "GB": ".2f", "peak GB": ".2f", "seconds": ".2f"})
    return rows


def measure_writing(s: SampleBenchmarkSettings) -> dict[str, Any]:
    n, size = s.images, s.image_size
    labels = np.arange(n) % 1000
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        out = Path(folder) / "samples.npz"
        parts = Parts(out, n)
        todo = parts.missing(s.write_batch, lambda part, path: True)
        reset_peak_memory(CPU)

        def write_parts() -> None:
            for part in progress(todo, desc="parts", unit=" parts"):
                samples.write(parts.path(part), [harness.noise(part, size)], (len(part), size, size, 3), labels[part])

        row = {"images": n, "parts s": harness.timed(write_parts)[0]}
        row[".npz s"], _ = harness.timed(lambda: samples.write(out, images_of(parts), (n, size, size, 3), labels))
        row["read s"], last = harness.timed(lambda: deque(samples.Samples(out).batches(256), maxlen=1).pop()[-1])
        row |= {"GB": out.stat().st_size / 1e9, "peak GiB": peak_memory(CPU) / 2**30}
        row["as written"] = bool(np.array_equal(last, harness.noise(todo[-1], size)[-1]))
    harness.table([row], {
        "images": "d", "GB": ".2f", "parts s": ".1f", ".npz s": ".1f", "read s": ".1f", "peak GiB": ".2f", "as written": "",
    })  # fmt: skip
    return row


def main(arguments: list[str] | None = None) -> None:
    s = SampleBenchmarkSettings.from_command_line(__doc__, arguments)
    device = best_device()
    machine, results = harness.start(device), {}
    if "decoding" in s.measure:
        results |= measure_decoding(s, device)
    if "loading" in s.measure:
        results["loading"] = measure_loading(s)
    if "writing" in s.measure:
        results["writing"] = measure_writing(s)
    harness.finish("sample", machine, s, **results)


if __name__ == "__main__":
    cli.run(main)
