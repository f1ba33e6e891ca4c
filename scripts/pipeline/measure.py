"""Seconds an image of the work of each stage, measured on this machine in a few seconds by a few small steps."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.models.patches import to_patches
from autoregressive.models.sampler import ImageSampler
from dataset.crops import Unreadable, center_crop, decode
from evaluations.c2i.classifier import Classifier
from tokenizer.tokenizer_image.vq_loss import vq_loss
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.distributed import autocast, best_device, precision_dtype
from utils.machine import durations

ENOUGH = 1.0  # seconds that a measurement lasts
OVERHEAD = 1.15  # of a training step: optimizer, average, batches
PROBE = 16  # codes of an image that is drawn to measure


class Costs(NamedTuple):
    """Seconds an image. training: by patch side."""

    read: float
    classify: float
    tokenizer_training: float
    encode: float
    training: dict[int, float]
    sample: float


def measure(vq: VQConfig, gpt: GPTConfig, patches: list[int], size: int, paths: list[str]) -> Costs:
    """The costs of a plan's models at an image size. paths: some images."""
    device = best_device()
    on_cpu = device.type == "cpu"
    torch.manual_seed(0)

    classifier = Classifier(10).to(device)
    pixels = torch.zeros(64, size, size, 3, dtype=torch.uint8, device=device)

    tokenizer = VQModel(vq).to(device, memory_format=torch.channels_last)
    images = torch.rand(8 if on_cpu else 32, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    transformer = Transformer(gpt).to(device)
    codes = torch.randint(gpt.vocab_size, (16 if on_cpu else 64, gpt.block_size), device=device)
    labels = torch.zeros(len(codes), dtype=torch.int64, device=device)
    patched = {patch: to_patches(codes, patch) for patch in patches}

    return Costs(
        read=_reading(paths, size),
        classify=_training(lambda: classifier(pixels)[1].sum(), device) / len(pixels),
        tokenizer_training=_training(lambda: vq_loss(images, tokenizer(images))["loss"], device) / len(images),
        encode=_seconds(torch.inference_mode()(lambda: tokenizer.encode(images)), device) / len(images),
        training={
            patch: _training(lambda x=x: transformer.loss(x, labels), device) / len(codes)
            for patch, x in patched.items()
        },
        sample=_sampling(gpt, device),
    )


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some calls, after one that warms up, unless that took long enough by itself."""
    return min(durations(call, 9, device, warmup=1, limit=ENOUGH))


def _training(loss: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a training step."""

    def step() -> None:
        with autocast(device, precision_dtype("auto", device)):
            total = loss()
        total.backward()

    return OVERHEAD * _seconds(step, device)


def _reading(paths: list[str], size: int) -> float:
    start, n = time.perf_counter(), 0
    while n < len(paths) and time.perf_counter() - start < ENOUGH:
        with suppress(Unreadable):
            center_crop(decode(Path(paths[n])), size)
        n += 1
    return (time.perf_counter() - start) / n


def _sampling(config: GPTConfig, device: torch.device) -> float:
    """By images of few codes: with more of them attention costs more, and this is an estimate."""
    gpt = Transformer(replace(config, block_size=min(PROBE, config.block_size))).eval()
    tiny = VQConfig(
        ch=4, encoder_ch_mult=(1,), decoder_ch_mult=(1,), num_res_blocks=1, z_channels=4, codebook_size=config.vocab_size
    )  # fmt: skip
    n, dtype = 32, precision_dtype("auto", device)
    sampler = ImageSampler(gpt, VQModel(tiny), device=device, dtype=dtype, batch_size=n, compiled=False)
    call = _seconds(lambda: sampler([0] * n, cfg_scale=2.0), device)
    return call / n * config.block_size / gpt.config.block_size
