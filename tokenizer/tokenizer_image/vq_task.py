"""What is trained as a tokenizer: a VQModel, and in turn with it a discriminator."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dataset.sampler import epoch_batches
from pretrained_models.loader import on_meta
from tokenizer.tokenizer_image.discriminator import GENERATOR_LOSSES, DiscriminatorLoss, mean_over_processes
from tokenizer.tokenizer_image.vq_data import CachedBatches, ReadBatches
from tokenizer.tokenizer_image.vq_loss import vq_loss
from tokenizer.tokenizer_image.vq_model import VQModel, code_health
from tokenizer.tokenizer_image.vq_settings import Start, TokenizerSettings
from utils import draw, streams
from utils.distributed import World
from utils.pixels import to_float
from utils.task import Opponent, Task
from utils.update import adamw

RESTART_UNTIL = 0.7  # of the run: later the codebook is left to settle
# In the log; 0 before its start.
ADVERSARIAL = ("adversarial", "adversarial_weight", "disc_loss", "logits_real", "logits_fake")


def learning_rate(step: int, steps: int, *, lr: float, end_lr: float, warmup_ratio: float) -> float:
    """The rate of update `step` (0-based) of `steps`: linear from near 0 to lr, then a half cosine down to end_lr."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress_made = (step - warmup) / max(1, steps - 1 - warmup)
    return end_lr + (lr - end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress_made)))


def forward_flops(call: Callable[..., Any], *images_BCHW: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*images_BCHW)
    return counter.get_total_flops()


def gather(x: Tensor, world: World) -> Tensor:
    """The processes' tensors of equal shape, one behind the other along the first axis."""
    if world.size == 1:
        return x
    whole = x.new_empty((world.size * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


class DeadCodes:
    """Which codebook entries were used since the last restart; the others begin anew (as in Jukebox, arXiv 2005.00341)."""

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(codebook_size, dtype=torch.bool, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.copy_(state["seen"])

    def note(self, codes: Tensor) -> None:
        self.seen[codes.flatten()] = True

    @torch.no_grad()
    def restart(
        self,
        model: VQModel,
        ema: VQModel | None,
        optimizer: torch.optim.Optimizer,
        latents_BDHW: Tensor,
        seed: int,
        step: int,
    ) -> None:
        """Move unused entries to random latents, in the EMA too, and forget their moments."""
        dead = (~self.seen).nonzero()[:, 0]
        self.seen.zero_()
        rows_ND = model.quantize.rows(latents_BDHW).flatten(0, 2)
        draws = streams.uniform(seed, streams.AUGMENT, step, np.arange(len(dead)))
        chosen = torch.from_numpy((draws * len(rows_ND)).astype(np.int64)).to(rows_ND.device)
        weight = model.quantize.embedding.weight
        weight[dead] = rows_ND[chosen]
        if ema:
            ema.quantize.embedding.weight[dead] = rows_ND[chosen]
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment][dead] = 0


class TokenizerTask(Task):
    """Training of a VQModel on batches of crops; unused codebook entries are restarted on the way."""

    def __init__(
        self,
        settings: TokenizerSettings,
        images: int,
        read: ReadBatches | CachedBatches,
        device: torch.device,
        about: Mapping[str, Any],
        start: Start | None = None,
        perceptual: nn.Module | None = None,
    ) -> None:
        """settings: complete. images: how many there are. read: turns selections of them into batches. start: weights to
        begin with, of check(). perceptual: the distance of two batches of images, on the device."""
        self.settings, self.images, self.read, self.about = settings, images, read, about
        torch.manual_seed(settings.global_seed)
        config = settings.vq_config()
        model = VQModel(config)
        if start:
            model.load_state_dict(start["model"])
        self.model = self.objective = model.to(device, memory_format=torch.channels_last)
        self.optimizer = adamw(model, settings)
        self.ema_decay = settings.ema_decay if settings.ema else None
        self.steps_per_epoch = images // settings.global_batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        self.stops = (self.steps,)
        self.dead_codes = DeadCodes(config.codebook_size, device)
        # of the update under way, a micro-batch each: images and reconstructions; codes and latents
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.quantised: list[tuple[Tensor, Tensor]] = []
        self.recorded = 0  # codes of this run
        self.perceptual = perceptual
        image, meta = torch.zeros(1, 3, settings.image_size, settings.image_size), on_meta(lambda: VQModel(config))
        self.image_flops = 3 * forward_flops(lambda x: meta.decode(meta.latents(x)), image.to("meta"))
        if self.perceptual:  # one of the two images has a gradient
            self.image_flops += 3 * forward_flops(self.perceptual, *[image.to(device)] * 2) // 2
        self.discriminator, self.disc_start, self.disc_flops = settings.discriminator(), self.steps, 0
        if self.discriminator:
            if start and "discriminator" in start:
                self.discriminator.load_state_dict(start["discriminator"])
            self.discriminator.to(device, memory_format=torch.channels_last)
            self.opponent = Opponent(
                DiscriminatorLoss(self.discriminator, settings.disc_loss), adamw(self.discriminator, settings),
                lambda step: self.pairs if step >= self.disc_start else [], self.discriminator_loss,
                settings.disc_lr / settings.lr,
            )  # fmt: skip
            self.disc_start = self.steps // 2 if settings.disc_start is None else settings.disc_start
            # three passes for each of an image and its reconstruction, and two for the gradient of the adversarial loss
            self.disc_flops = 8 * forward_flops(on_meta(settings.discriminator), image.to("meta"))

    def batches(self, epoch: int, first_step: int, world: World) -> Iterator[tuple[Tensor]]:
        """uint8 (B, H, W, 3); view 1 is the mirror image."""
        s = self.settings
        selections = epoch_batches(
            self.images, 1 if s.no_flip else 2, s.global_batch_size,
            seed=s.global_seed, epoch=epoch, label_drop=0.0,
            first_step=first_step, part=world.share(s.global_batch_size),
        )  # fmt: skip
        crops = {}
        if s.random_crop:
            crops["places"] = lambda i: streams.uniform(s.global_seed, streams.CROP, epoch, i[:, None], np.arange(3))
        for images_BHWC in self.read(selections, **crops):
            yield (images_BHWC,)

    def learning_rate(self, step: int) -> float:
        s = self.settings
        return learning_rate(step, self.steps, lr=s.lr, end_lr=s.end_lr, warmup_ratio=s.warmup_ratio)

    def loss(self, objective: nn.Module, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        s, images_BCHW = self.settings, to_float(batch[0]).contiguous(memory_format=torch.channels_last)
        output = objective(images_BCHW)
        self.pairs.append((images_BCHW, output.reconstruction_BCHW.detach().float()))
        self.quantised.append((output.codes_BHW, output.latents_BDHW.detach()))

        def adversarial(decoded_BCHW: Tensor) -> Tensor:
            return GENERATOR_LOSSES[s.gen_loss](self.discriminator(decoded_BCHW).float())

        def last_layer_gradient(gradient_BCHW: Tensor) -> Tensor:
            features_BCHW = output.features_BCHW.detach()
            return mean_over_processes(self.model.decoder.last_layer_gradient(features_BCHW, gradient_BCHW))

        judged = self.discriminator and step >= self.disc_start
        with no_float16(images_BCHW):
            losses = vq_loss(
                images_BCHW, output, reconstruction=s.reconstruction_loss,
                reconstruction_weight=s.reconstruction_weight, codebook_weight=s.codebook_weight,
                perceptual=self.perceptual, perceptual_weight=s.perceptual_weight,
                adversarial=adversarial if judged else None, adversarial_weight=s.disc_weight,
                last_layer_gradient=last_layer_gradient if s.disc_adaptive_weight else None,
            )  # fmt: skip
        not_yet = dict.fromkeys(ADVERSARIAL if self.discriminator else (), images_BCHW.new_zeros(()))
        return {"loss": losses["loss"], **not_yet, **losses}

    def discriminator_loss(self, objective: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        loss, real, fake = objective(*batch)
        return {"loss": self.settings.disc_weight * loss, "disc_loss": loss, "logits_real": real, "logits_fake": fake}

    def after_update(self, step: int, ema: nn.Module | None, world: World) -> None:
        """Record the global batch's codes; when it is due, restart entries that none of the last steps used."""
        codes, latents = (torch.cat(parts) for parts in zip(*self.quantised, strict=True))
        self.pairs.clear()
        self.quantised.clear()
        codes_BHW, every = gather(codes, world), self.settings.restart_dead_codes
        if self.model.config.show_usage:
            self.model.quantize.record(codes_BHW)
            self.recorded = step * codes_BHW.numel()
        self.dead_codes.note(codes_BHW)
        if every and step % every == 0 and step < RESTART_UNTIL * self.steps:
            self.dead_codes.restart(
                self.model, ema, self.optimizer, gather(latents, world), self.settings.global_seed, step
            )

    def metrics(self) -> dict[str, float]:
        """Of the newest 65536 codes of this run, or of all where there are fewer."""
        return code_health(self.model.quantize.counts(self.recorded)) if self.model.config.show_usage else {}

    def draw(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """loss.png, and codebook.png: the share of codes in use, and the perplexity as a share of the codebook."""
        super().draw(folder, rows)
        rows, size = [row for row in rows if "perplexity" in row], self.model.config.codebook_size
        epochs = [row["step"] / self.steps_per_epoch for row in rows]
        series = {
            "codes in use": (epochs, [row["codebook_usage"] for row in rows]),
            "perplexity": (epochs, [row["perplexity"] / size for row in rows]),
        }
        if rows:
            draw.curves(
                folder / "codebook.png", series, x_label="epoch", y_label=f"share of {size} codes", title=folder.name,
                boundaries=self.boundaries(),
            )  # fmt: skip

    def boundaries(self) -> dict[float, str]:
        """Where the discriminator begins, in epochs."""
        return {self.disc_start / self.steps_per_epoch: "discriminator"} if 0 < self.disc_start < self.steps else {}

    def flops(self, step: int) -> float:
        return self.image_flops + (self.disc_flops if step >= self.disc_start else 0)

    def cost_after(self, step: int) -> float:
        judged = max(0, self.steps - max(step, self.disc_start))
        return (self.steps - step) * self.image_flops + judged * self.disc_flops

    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"dead_codes": self.dead_codes}
        if self.discriminator:
            parts |= {"discriminator": self.discriminator, "optimizer_disc": self.opponent.optimizer}
        return parts


def no_float16(x: Tensor):
    """float32 where autocast is float16, whose range unscaled gradients at the pixels leave."""
    half = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16
    return torch.autocast(x.device.type, enabled=False) if half else nullcontext()
