"""Seconds an image of the work of each stage, measured on this machine in a few seconds by a few small steps."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.models.patches import to_patches
from autoregressive.models.sampler import ImageSampler
from dataset.crops import Unreadable, center_crop, decode
from evaluations.c2i.classifier import Classifier
from tokenizer.tokenizer_image.vq_loss import vq_loss
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.distributed import autocast, best_device, precision_dtype

ENOUGH = 0.7  # seconds that a measurement lasts, after one step
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


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some calls, after one that warms up, unless that took long enough by itself."""
    times, start = [], time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - start < ENOUGH and len(times) < 10):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        if times[0] > 4 * ENOUGH:
            break
    return min(times[1:] or times)


def measure(vq: VQConfig, gpt: GPTConfig, patches: list[int], image_size: int, paths: list[str]) -> Costs:
    """The costs of a plan's models at an image size. paths: some images."""
    device = best_device()
    dtype = precision_dtype("auto", device)
    torch.manual_seed(0)
    return Costs(
        read=_reading(paths, image_size),
        classify=_classifier(image_size, device, dtype),
        tokenizer_training=_tokenizer(vq, image_size, device, dtype),
        encode=_tokenizer(vq, image_size, device, None),
        training={patch: _gpt(gpt, patch, device, dtype) for patch in patches},
        sample=_sampling(gpt, device, dtype),
    )


def _reading(paths: list[str], size: int) -> float:
    start, n = time.perf_counter(), 0
    for path in paths:
        try:
            center_crop(decode(Path(path)), size)
        except Unreadable:
            continue
        n += 1
        if time.perf_counter() - start > ENOUGH:
            break
    return (time.perf_counter() - start) / max(1, n)


def _classifier(size: int, device: torch.device, dtype: torch.dtype) -> float:
    model, batch = Classifier(10).to(device), 64
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8, device=device)

    def step() -> None:
        with autocast(device, dtype):
            total = model(images)[1].sum()
        total.backward()

    return OVERHEAD * seconds(step, device) / batch


def _tokenizer(config: VQConfig, size: int, device: torch.device, dtype: torch.dtype | None) -> float:
    """dtype: of training; None: of encoding alone."""
    batch = 8 if device.type == "cpu" else 32
    model = VQModel(config).to(device, memory_format=torch.channels_last)
    images = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        if dtype:
            with autocast(device, dtype):
                total = vq_loss(images, model(images)).total
            total.backward()
        else:
            with torch.inference_mode():
                model.encode(images)

    return (OVERHEAD if dtype else 1) * seconds(step, device) / batch


def _gpt(config: GPTConfig, patch: int, device: torch.device, dtype: torch.dtype) -> float:
    batch = 16 if device.type == "cpu" else 64
    model = Transformer(config).to(device)
    codes = torch.randint(config.vocab_size, (batch, config.block_size), device=device)
    patches, labels = to_patches(codes, patch), torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        with autocast(device, dtype):
            loss = model.loss(patches, labels)
        loss.backward()

    return OVERHEAD * seconds(step, device) / batch


def _sampling(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> float:
    """By images of few codes: with more of them attention costs more, and this is an estimate."""
    batch = 32
    small = Transformer(replace(config, block_size=min(PROBE, config.block_size))).eval()
    sampler = ImageSampler(small, _tiny_tokenizer(config), device=device, dtype=dtype, batch_size=batch, compiled=False)
    call = seconds(lambda: sampler([0] * batch, cfg_scale=2.0), device)
    return call / batch * config.block_size / small.config.block_size


def _tiny_tokenizer(config: GPTConfig) -> VQModel:
    return VQModel(VQConfig(ch=4, encoder_ch_mult=(1,), decoder_ch_mult=(1,), num_res_blocks=1, z_channels=4,
                            codebook_size=config.vocab_size))  # fmt: skip
