"""The tokenizer and the GPT of a plan, by what is given, the data and the device."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.gpt import GPT, GPTConfig
from autoregressive.models.gpt import PRESETS as GPT_PRESETS
from autoregressive.models.gpt import preset as gpt_preset
from pretrained_models.catalogue import CATALOGUE, find_weights
from pretrained_models.loader import Pretrained
from scripts.pipeline.images import Images
from scripts.pipeline.settings import PipelineSettings, parse_flags
from tokenizer.tokenizer_image.load import Tokenizer
from tokenizer.tokenizer_image.vq_model import VQConfig
from tokenizer.tokenizer_image.vq_model import preset as vq_preset
from utils import checkpoint
from utils.cli import InputError

SIZES = (32, 64, 128, 256)  # pixels, of images whose size is chosen
PUBLISHED_FROM = 128  # pixels, from which a published tokenizer serves; below, its codes are too few
PUBLISHED = "vq_ds16_c2i"


class Models(NamedTuple):
    """The tokenizer and the GPT of a plan. tokenizer: train, or what --vq-ckpt takes."""

    tokenizer: str
    vq_model: str
    vq: VQConfig
    gpt_model: str
    gpt: GPTConfig
    image_size: int


def choose_models(s: PipelineSettings, images: Images, device: torch.device) -> Models:
    """The models, at the image size. Raises InputError for what does not go together."""
    start = _weights(s.init) if s.init else None
    size = s.image_size or (CATALOGUE[s.init].image_size if s.init in CATALOGUE else 0)
    if not size:
        most = SIZES[1] if device.type == "cpu" and s.tokenizer in (None, "train") else SIZES[-1]
        size = max(side for side in SIZES if side <= max(SIZES[0], min(most, images.side * 1.2)))
    tokenizer = s.tokenizer or (PUBLISHED if size >= PUBLISHED_FROM or s.init in CATALOGUE else "train")
    if tokenizer == "train":
        if start:
            raise InputError(
                f"--init {s.init} draws the codes of the tokenizer that it was trained with: give that --tokenizer"
            )
        given = parse_flags(s.tokenizer_flags)
        name = s.vq_model or _tokenizer_to_train(size, device)
        vq = vq_preset(name)
        if codebook := given.get("--codebook-size"):
            vq = vq_preset(name, codebook_size=whole_number("--tokenizer-flags --codebook-size", codebook))
    elif tokenizer in CATALOGUE:
        name = CATALOGUE[tokenizer].model
        if name.startswith("GPT"):
            raise InputError(f"--tokenizer {tokenizer} is a GPT: give vq_ds16_c2i or vq_ds8_c2i")
        vq = vq_preset(name)
    else:
        name, vq = _config(Tokenizer, tokenizer)
        tokenizer = absolute(tokenizer)
    if size % vq.downsample:
        raise InputError(f"--image-size {size} is no multiple of {vq.downsample}, the side of a code of {name}")
    tokens = (size // vq.downsample) ** 2
    gpt_model = s.gpt_model or (
        start[0] if start else "GPT-XXS" if device.type == "cpu" else _gpu_model(images.train_names)
    )
    if start and gpt_model != start[0]:
        raise InputError(f"--init {s.init} is a {start[0]}, not {gpt_model}: leave out --gpt-model")
    if start and start[1].vocab_size != vq.codebook_size:
        raise InputError(
            f"--init {s.init} knows {start[1].vocab_size} codes, the tokenizer ({tokenizer}) has {vq.codebook_size}: give the "
            "tokenizer that it was trained with"
        )
    side, coarsest = size // vq.downsample, max(patch_sides(s))
    if side % coarsest:
        raise InputError(
            f"patches of side {coarsest} do not divide {side}x{side} codes: give another --patch-level or --image-size"
        )
    gpt = gpt_preset(gpt_model, vocab_size=vq.codebook_size, num_classes=len(images.classes), block_size=tokens)
    return Models(tokenizer, name, vq, gpt_model, gpt, size)


def absolute(text: str) -> str:
    """A path as stages find it, which run elsewhere; a published name or an address as it is."""
    return str(Path(text).absolute()) if Path(text).exists() else text


def whole_number(what: str, words: list[str]) -> int:
    if len(words) != 1 or not words[0].isdecimal() or not 0 < int(words[0]) < 1 << 20:
        raise InputError(f"{what}: expected a whole number of at least 1, got {' '.join(words)!r}")
    return int(words[0])


def _tokenizer_to_train(size: int, device: torch.device) -> str:
    """A preset that needs no published network to be trained: grids of about 16x16 codes."""
    if size < 48 or (device.type == "cpu" and size < PUBLISHED_FROM):
        return "VQ-4-small"
    return "VQ-4-medium" if size < 96 else "VQ-8-medium"


def _gpu_model(images: int) -> str:
    return next(name for name, most in (("GPT-XS", 5_000), ("GPT-S", 50_000), ("GPT-B", math.inf)) if images <= most)


def _weights(init: str) -> tuple[str, GPTConfig]:
    """The preset and the config of a GPT to begin with; a published one is not fetched for that."""
    if init in CATALOGUE:
        if not CATALOGUE[init].model.startswith("GPT"):
            raise InputError(f"--init {init} is a tokenizer: give a GPT, such as c2i_B_256")
        return CATALOGUE[init].model, GPT_PRESETS[CATALOGUE[init].model]
    return _config(GPT, init)


def _config(kind: type[Pretrained], source: str) -> tuple[str, Any]:
    """The preset and the config of weights in a file."""
    content = checkpoint.load(find_weights(source), mmap=True)
    name, config = kind.find_config(checkpoint.about(content), checkpoint.state_dict(content, "auto"), None, {}, source)
    if name not in kind.PRESETS:
        raise InputError(f"{source} is a {name} of no preset of this code")
    return name, config


def patch_sides(s: PipelineSettings) -> list[int]:
    """Patch sides whose steps a plan has to know the cost of."""
    return [2**i for i in range(level_count(s))]


def level_count(s: PipelineSettings) -> int:
    given = parse_flags(s.gpt_flags).get("--patch-level")
    levels = s.patch_level or (whole_number("--gpt-flags --patch-level", given) if given else 1 if s.init else 2)
    if levels > 6:
        raise InputError(f"--patch-level {levels}: expected at most 6")
    return levels
