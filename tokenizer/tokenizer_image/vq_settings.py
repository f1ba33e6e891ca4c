"""The settings of tokenizer training: the published recipe for the published presets, what serves small images for others."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.images import ImageSettings
from dataset.listing import ImagesPath
from pretrained_models.catalogue import WeightsFile
from pretrained_models.loader import on_meta
from tokenizer.tokenizer_image.discriminator import (
    DISCRIMINATOR_LOSSES,
    DISCRIMINATORS,
    GENERATOR_LOSSES,
    discriminator,
)
from tokenizer.tokenizer_image.perceptual import LPIPS, NetworkDistance
from tokenizer.tokenizer_image.vq_loss import RECONSTRUCTION
from tokenizer.tokenizer_image.vq_model import PRESETS, Tokenizer, VQConfig, preset
from utils import checkpoint, cli
from utils.cli import InputError
from utils.distributed import world_size
from utils.files import check_folder, sha256
from utils.settings import (
    Count,
    ExistingFile,
    Fraction,
    FractionBelowOne,
    ImageSize,
    NonNegative,
    Positive,
    PositiveInt,
    one_of,
    setting,
)
from utils.task import EngineSettings

PUBLISHED = {
    "lr": 1e-4, "end_lr": 1e-4, "warmup_ratio": 0.0, "weight_decay": 0.0, "ema_decay": 0.9999, "restart_dead_codes": 0,
    "perceptual_weight": 1.0, "disc_weight": 0.5, "disc_start": 20_000, "disc_adaptive_weight": False, "disc_dim": 64,
    "disc_layers": 3, "random_crop": True,
}  # fmt: skip
SMALL = {
    "lr": 3e-3, "end_lr": 1e-5, "warmup_ratio": 0.05, "weight_decay": 0.05, "ema_decay": 0.999, "restart_dead_codes": 50,
    "perceptual_weight": 0.0, "disc_weight": 0.0, "disc_start": None, "disc_lr": 3e-4, "disc_adaptive_weight": True,
    "disc_dim": 32, "disc_layers": 2, "random_crop": False,
}  # fmt: skip
MEDIUM = {**SMALL, "lr": 1e-3, "disc_dim": 64, "disc_layers": 3}
# The defaults of each preset.
RECIPES = {
    "VQ-16": PUBLISHED, "VQ-8": PUBLISHED, "VQ-2-small": SMALL, "VQ-4-small": SMALL, "VQ-4-medium": MEDIUM,
    "VQ-8-medium": MEDIUM,
}  # fmt: skip
OF_PRESET = "default: the preset's"


class TokenizerSettings(EngineSettings, ImageSettings):
    """The settings of tokenizer training; see --help. None stands for the preset's recipe until complete() fills it in."""

    data_path: ImagesPath = setting(help="a folder of images: one folder a class, or flat", free=True)
    image_size: ImageSize = setting(256)
    no_flip: bool = setting(False, "don't mirror half of the images")
    random_crop: bool | None = setting(None, f"crop 80 to 100 % anywhere instead of the centre; {OF_PRESET}")
    num_workers: Count = setting(4, "processes that read a set too large for RAM", free=True)

    vq_model: one_of(PRESETS) = setting("VQ-16")
    vq_ckpt: WeightsFile | None = setting(
        None, "start from these weights (a new schedule and optimizer)", free=True, metavar="WEIGHTS"
    )
    finetune: bool = setting(False, "with --vq-ckpt: train its discriminator further, too, from the start")
    codebook_size: PositiveInt | None = setting(None, OF_PRESET)
    codebook_embed_dim: PositiveInt | None = setting(None, OF_PRESET)
    dropout_p: FractionBelowOne = setting(0.0)

    reconstruction_loss: one_of(RECONSTRUCTION) = setting("l2")
    reconstruction_weight: NonNegative = setting(1.0)
    codebook_weight: NonNegative = setting(1.0, "of the codebook, commitment and entropy losses")
    commit_loss_beta: NonNegative | None = setting(None, OF_PRESET)
    entropy_loss_ratio: NonNegative | None = setting(None, OF_PRESET)
    perceptual_weight: NonNegative | None = setting(None, f"0: no perceptual loss; {OF_PRESET}")
    perceptual_network: ExistingFile | None = setting(
        None, "its features (a .pt2 of the evaluator) instead of LPIPS's VGG", free=True, metavar="NETWORK"
    )
    disc_weight: NonNegative | None = setting(None, f"of the adversarial loss; 0: no discriminator; {OF_PRESET}")
    disc_start: Count | None = setting(
        None, "updates before the discriminator begins; default: the preset's, or half of the run", metavar="STEPS"
    )
    disc_lr: Positive | None = setting(
        None, "learning rate of the discriminator where the tokenizer has --lr; default: the preset's, at most --lr"
    )
    disc_adaptive_weight: bool | None = setting(
        None, f"times the ratio of gradient norms at the decoder's last layer; {OF_PRESET}"
    )
    disc_type: one_of(DISCRIMINATORS) = setting("patchgan")
    disc_loss: one_of(DISCRIMINATOR_LOSSES) = setting("hinge")
    gen_loss: one_of(GENERATOR_LOSSES) = setting("hinge")
    disc_dim: PositiveInt | None = setting(None, f"filters of a PatchGAN's first layer; {OF_PRESET}")
    disc_layers: PositiveInt | None = setting(None, f"layers of a PatchGAN; {OF_PRESET}")
    restart_dead_codes: Count | None = setting(
        None, f"every so many steps, unused entries begin anew at latents of the batch; 0: never; {OF_PRESET}",
        metavar="STEPS",
    )  # fmt: skip

    epochs: PositiveInt = setting(40)
    global_batch_size: PositiveInt = setting(128, "images a step, over all processes")
    lr: Positive | None = setting(None, OF_PRESET)
    end_lr: NonNegative | None = setting(None, f"reached at the end, by a cosine; {OF_PRESET}")
    warmup_ratio: Fraction | None = setting(None, f"part of the run over which the rate rises from 0; {OF_PRESET}")
    weight_decay: NonNegative | None = setting(None, OF_PRESET)
    ema: bool = setting(True, "keep an average of the weights")
    ema_decay: Fraction | None = setting(None, f"of the average; it warms up as (1 + step) / (10 + step); {OF_PRESET}")
    results_dir: Path = setting(Path("results_tokenizer"), free=True)

    def complete(self) -> "TokenizerSettings":
        """These settings with the preset's recipe in the place of what was not given."""
        recipe = dict(RECIPES[self.vq_model])
        recipe["disc_lr"] = min(self.lr or recipe["lr"], recipe.get("disc_lr", math.inf))
        if self.perceptual_network:
            recipe["perceptual_weight"] = recipe["perceptual_weight"] or 0.1
        if self.finetune:
            recipe["disc_start"] = 0
        if self.lr is not None and self.end_lr is None:  # a recipe's rate is constant, or ends where it says
            recipe["end_lr"] = self.lr if recipe["end_lr"] == recipe["lr"] else min(self.lr, recipe["end_lr"])
        return self.model_copy(update={name: value for name, value in recipe.items() if getattr(self, name) is None})

    def vq_config(self) -> VQConfig:
        """The preset with what the command line overrides."""
        given = self.model_dump(include=set(Tokenizer.OPEN), exclude_none=True)
        return preset(self.vq_model, **given, dropout=self.dropout_p)

    def discriminator(self) -> nn.Module | None:
        """A new discriminator, if there is to be one. InputError if it does not fit the images."""
        if not self.disc_weight:
            return None
        return discriminator(self.disc_type, self.image_size, self.disc_dim, self.disc_layers)

    def perceptual(self, device: torch.device) -> nn.Module | None:
        """The perceptual distance, if there is to be one. InputError if it cannot be had."""
        if not self.perceptual_weight:
            return None
        if self.perceptual_network:
            return NetworkDistance(self.perceptual_network, self.image_size, device)
        return LPIPS().to(device)

    def identity(self) -> dict[str, Any]:
        """What tells a run from others besides the settings: the perceptual network's content, and the accumulation, on which
        a PatchGAN's batch norm and the adaptive weight depend."""
        network = self.perceptual_network and sha256(self.perceptual_network)
        return {
            "perceptual": (network or "LPIPS") if self.perceptual_weight else None,
            "accumulation": self.gradient_accumulation_steps if self.disc_weight else None,
        }


Start = dict[str, dict[str, Tensor]]  # weights of the model, and of the discriminator, to begin with


def check(settings: TokenizerSettings, images: int) -> Start:
    """The weights to begin with, as far as there are any. InputError for settings that do not go together, or weights that
    do not fit."""
    config = settings.vq_config()
    if settings.image_size % config.downsample:
        raise InputError(
            f"--image-size {settings.image_size} is no multiple of {config.downsample}, "
            f"the side of a code of {settings.vq_model}"
        )
    settings.check_batch(images, world_size())
    check_folder(settings.results_dir)
    judge = on_meta(settings.discriminator)
    if not settings.vq_ckpt:
        if settings.finetune:
            raise InputError("--finetune needs --vq-ckpt WEIGHTS to start from")
        return {}
    content = checkpoint.load(settings.vq_ckpt, mmap=True)
    state = checkpoint.state_dict(content, "auto")
    Tokenizer.check_weights(state, config, f"{settings.vq_ckpt} (as {settings.vq_model})")
    if not (settings.finetune and judge):
        return {"model": state}
    if (known := content.get("discriminator")) is None:
        cli.note(f"{settings.vq_ckpt} holds no discriminator: a new one is trained")
        return {"model": state}
    advice = "; give the --disc flags it was trained with, or leave --finetune out for a new one"
    checkpoint.check_fit(judge, known, f"the discriminator of {settings.vq_ckpt}", lambda: advice)
    checkpoint.check_finite(known, f"the discriminator of {settings.vq_ckpt}")
    return {"model": state, "discriminator": known}
