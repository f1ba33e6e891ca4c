"""The tokenizer and the GPT of a plan, by what is given, the data and the device."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.gpt import GPT, GPTConfig
from autoregressive.models.gpt import preset as gpt_preset
from pretrained_models.catalogue import CATALOGUE, find_weights
from pretrained_models.loader import Pretrained
from scripts.pipeline.images import Images
from scripts.pipeline.settings import PipelineSettings
from tokenizer.tokenizer_image.vq_model import Tokenizer, VQConfig
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
    start, start_config = _weights(GPT, "--init", s.init) if s.init else (None, None)
    published = CATALOGUE.get(s.init)
    size = s.image_size or (published.image_size if published else _image_size(s, images, device))
    tokenizer = s.tokenizer or (PUBLISHED if size >= PUBLISHED_FROM or published else "train")
    if tokenizer != "train":
        vq_model, vq = _weights(Tokenizer, "--tokenizer", tokenizer)
        tokenizer = absolute(tokenizer)
    elif start:
        raise InputError(
            f"--init {s.init} draws the codes of the tokenizer that it was trained with: give that --tokenizer"
        )
    else:
        vq_model = s.vq_model or _tokenizer_to_train(size, device)
        codebook = s.given_number("tokenizer", "--codebook-size")
        vq = vq_preset(vq_model, **({"codebook_size": codebook} if codebook else {}))
    if size % vq.downsample:
        raise InputError(f"--image-size {size} is no multiple of {vq.downsample}, the side of a code of {vq_model}")
    gpt_model = s.gpt_model or start or ("GPT-XXS" if device.type == "cpu" else _gpu_model(images.train_names))
    if start and gpt_model != start:
        raise InputError(f"--init {s.init} is a {start}, not {gpt_model}: leave out --gpt-model")
    if start and start_config.vocab_size != vq.codebook_size:
        raise InputError(
            f"--init {s.init} knows {start_config.vocab_size} codes, the tokenizer ({tokenizer}) has {vq.codebook_size}: "
            "give the tokenizer that it was trained with"
        )
    side, coarsest = size // vq.downsample, 2 ** (level_count(s) - 1)
    if side % coarsest:
        raise InputError(
            f"patches of side {coarsest} do not divide {side}x{side} codes: give another --patch-level or --image-size"
        )
    gpt = gpt_preset(gpt_model, vocab_size=vq.codebook_size, num_classes=len(images.classes), block_size=side**2)
    return Models(tokenizer, vq_model, vq, gpt_model, gpt, size)


def absolute(text: str) -> str:
    """A path as stages find it, which run elsewhere; a published name or an address as it is."""
    return text if text in CATALOGUE or not Path(text).exists() else str(Path(text).absolute())


def level_count(s: PipelineSettings) -> int:
    """Levels of patches; their sides are powers of 2. Raises InputError for too many."""
    levels = s.patch_level or s.given_number("gpt", "--patch-level") or (1 if s.init else 2)
    if levels > 6:
        raise InputError(f"--patch-level {levels}: expected at most 6")
    return levels


def _image_size(s: PipelineSettings, images: Images, device: torch.device) -> int:
    """The largest of SIZES that suits the images, and a CPU where it has to train the tokenizer."""
    most = SIZES[1] if device.type == "cpu" and s.tokenizer in (None, "train") else SIZES[-1]
    return max(side for side in SIZES if side <= max(SIZES[0], min(most, images.side * 1.2)))


def _tokenizer_to_train(size: int, device: torch.device) -> str:
    """A preset that needs no published network to be trained: grids of about 16x16 codes."""
    if size < 48 or (device.type == "cpu" and size < PUBLISHED_FROM):
        return "VQ-4-small"
    return "VQ-4-medium" if size < 96 else "VQ-8-medium"


def _gpu_model(images: int) -> str:
    return next(name for name, most in (("GPT-XS", 5_000), ("GPT-S", 50_000), ("GPT-B", math.inf)) if images <= most)


def _weights(kind: type[Pretrained], flag: str, source: str) -> tuple[str, Any]:
    """The preset and the config of weights. Published ones are not fetched for that. Raises InputError for another kind."""
    if source in CATALOGUE:
        name = CATALOGUE[source].model
        if name not in kind.PRESETS:
            other = "GPT" if kind is Tokenizer else "tokenizer"
            names = [name for name, row in CATALOGUE.items() if row.model in kind.PRESETS]
            raise InputError(f"{flag} {source} is a {other}: give a {kind.KIND}, such as {names[0]}")
        return name, kind.PRESETS[name]
    content = checkpoint.load(find_weights(source), mmap=True)
    name, config = kind.find_config(checkpoint.about(content), checkpoint.state_dict(content, "auto"), None, {}, source)
    if name not in kind.PRESETS:
        raise InputError(f"{source} is a {name} of no preset of this code")
    return name, config
