"""Train a VQ tokenizer on an ImageFolder: reconstruction, codebook and commitment losses.

    bash scripts/tokenizer/train_vq.sh --data-path images/train --vq-model VQ-4-small --image-size 32 --epochs 3 --lr 3e-3

Writes RESULTS_DIR/vq.pt (weights, their moving average, the config), reconstructions.png, log.txt, metrics.jsonl; while
under way, last.pt. The same command continues a run that was cut off. Order and mirroring follow from (seed, epoch,
image), so a continued run is the same run, and any number of processes trains the same model.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dataset.images import ImageFolder
from dataset.sampler import Selection, epoch_batches
from pretrained_models.catalogue import weights_file
from tokenizer.tokenizer_image.dead_codes import DeadCodes
from tokenizer.tokenizer_image.load import tokenizer_advice
from tokenizer.tokenizer_image.vq_data import CachedBatches, ReadBatches, batches_of
from tokenizer.tokenizer_image.vq_loss import RECONSTRUCTION, vq_loss
from tokenizer.tokenizer_image.vq_model import PRESETS, VQConfig, VQModel, preset
from utils import checkpoint, cli, draw
from utils.distributed import World, autocast, precision_dtype, world, world_size
from utils.ema import ema_copy, update_ema
from utils.log import RunLog, forget_after, progress
from utils.pixels import to_float, to_uint8

RESTART_UNTIL = 0.7  # of the run: later the codebook is left to settle
PICTURES = 16  # columns of reconstructions.png
# Settings that may change when a run is continued: they don't change what is trained.
FREE = ("results_dir", "num_workers", "log_every", "ckpt_every")


@dataclass(frozen=True)
class Settings:
    """The command line; see parse() for what each means."""

    data_path: Path
    image_size: int
    no_flip: bool
    num_workers: int
    vq_model: str
    vq_ckpt: Path | None
    codebook_size: int | None
    codebook_embed_dim: int | None
    commit_loss_beta: float | None
    entropy_loss_ratio: float | None
    reconstruction_loss: str
    restart_dead_codes: int
    epochs: int
    global_batch_size: int
    lr: float
    end_lr: float
    warmup_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    ema_decay: float
    mixed_precision: str
    global_seed: int
    results_dir: Path
    log_every: int
    ckpt_every: int

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def model_config(self) -> VQConfig:
        """The preset with what the command line overrides."""
        names = ("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio")
        given = {name: getattr(self, name) for name in names}
        return preset(self.vq_model, **{name: value for name, value in given.items() if value is not None})


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=cli.existing_folder, required=True, help="an ImageFolder: one folder of images a class")
    add("--image-size", type=cli.positive_int, default=256)
    add("--no-flip", action="store_true", help="don't mirror half of the images")
    add("--num-workers", type=cli.count, default=4, help="processes that read a set too large for RAM")

    add("--vq-model", choices=PRESETS, default="VQ-16")
    add("--vq-ckpt", type=weights_file, help="start from these weights (a new schedule and optimizer)")
    add("--codebook-size", type=cli.positive_int, help="default: the preset's")
    add("--codebook-embed-dim", type=cli.positive_int, help="default: the preset's")
    add("--commit-loss-beta", type=cli.non_negative, help="default: the preset's")
    add("--entropy-loss-ratio", type=cli.non_negative, help="default: the preset's")
    add("--reconstruction-loss", choices=RECONSTRUCTION, default="l2")
    add("--restart-dead-codes", type=cli.count, default=50, metavar="STEPS",
        help="every so many steps, unused entries begin anew at latents of the batch; 0: never")  # fmt: skip

    add("--epochs", type=cli.positive_int, default=40)
    add("--global-batch-size", type=cli.positive_int, default=128, help="images a step, over all processes")
    add("--lr", type=cli.positive, default=1e-4)
    add("--end-lr", type=cli.non_negative, default=1e-5, help="reached at the end, by a cosine")
    add("--warmup-ratio", type=cli.fraction, default=0.05, help="part of the run over which the rate rises from 0")
    add("--weight-decay", type=cli.non_negative, default=5e-2)
    add("--beta1", type=cli.fraction, default=0.9)
    add("--beta2", type=cli.fraction, default=0.95)
    add("--max-grad-norm", type=cli.non_negative, default=1.0, help="0: no clipping")
    add("--ema-decay", type=cli.fraction, default=0.999, help="of the weights' moving average; less in the first steps")
    add("--mixed-precision", choices=("auto", "none", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 on GPUs")  # fmt: skip
    add("--global-seed", type=cli.count, default=0)

    add("--results-dir", type=Path, default=Path("results_tokenizer"))
    add("--log-every", type=cli.positive_int, default=100, help="steps")
    add("--ckpt-every", type=cli.positive_int, default=5000, help="steps")
    return Settings(**vars(parser.parse_args(arguments)))


def check(settings: Settings, images: int) -> None:
    """InputError for settings that do not go together, or weights that do not fit."""
    config = settings.model_config()
    if settings.image_size % config.downsample:
        raise cli.InputError(
            f"--image-size {settings.image_size} is no multiple of {config.downsample}, "
            f"the side of a code of {settings.vq_model}"
        )
    if settings.global_batch_size % world_size():
        raise cli.InputError(
            f"--global-batch-size {settings.global_batch_size} is not divisible by {world_size()} processes"
        )
    if settings.global_batch_size > images:
        raise cli.InputError(
            f"--global-batch-size {settings.global_batch_size} is more than the {images} images there are"
        )
    if settings.vq_ckpt:
        empty = checkpoint.on_meta(lambda: VQModel(config))
        state = start_weights(settings)
        what = f"{settings.vq_ckpt} (as {settings.vq_model})"
        checkpoint.check_fit(empty, state, what, lambda: tokenizer_advice(state))


def start_weights(settings: Settings) -> dict[str, Tensor]:
    """The weights of --vq-ckpt: their moving average where the file has one."""
    return checkpoint.state_dict(checkpoint.load(settings.vq_ckpt, mmap=True), "auto")


def previous(settings: Settings, name: str) -> dict[str, Any] | None:
    """RESULTS_DIR/name if it is there and of these settings; InputError if it is of others."""
    path = settings.results_dir / name
    if not path.is_file():
        return None
    content = checkpoint.load(path)
    found, wanted = content.get("args", {}), settings.plain()
    different = [key for key in wanted if key not in FREE and found.get(key) != wanted[key]]
    if different:
        changes = ", ".join(f"{key} {found.get(key)}, now {wanted[key]}" for key in different[:3])
        raise cli.InputError(f"{path} is of another run ({changes}): give another --results-dir, or delete it")
    return content


def learning_rate(step: int, steps: int, *, lr: float, end_lr: float, warmup_ratio: float) -> float:
    """The rate of update `step` (0-based) of `steps`: linear from near 0 to lr, then a half cosine down to end_lr."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress_made = (step - warmup) / max(1, steps - 1 - warmup)
    return end_lr + (lr - end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress_made)))


def adamw(model: VQModel, settings: Settings) -> torch.optim.AdamW:
    """Fused AdamW; weights of two or more dimensions decay, gains and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def gather(x: Tensor, here: World) -> Tensor:
    """The processes' tensors of equal shape, one behind the other along the first axis."""
    if here.size == 1:
        return x
    whole = x.new_empty((here.size * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


class Trainer:
    """A run under way: model, its moving average, optimizer, and how far it is."""

    def __init__(self, settings: Settings, images: int, here: World, resume: dict[str, Any] | None) -> None:
        self.settings, self.images, self.here = settings, images, here
        self.log = RunLog(settings.results_dir, here.is_main)
        self.steps_per_epoch = images // settings.global_batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        dtype = precision_dtype(settings.mixed_precision, here.device)
        self.amp = partial(autocast, here.device, dtype)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=dtype == torch.float16)
        torch.manual_seed(settings.global_seed)
        self.model = VQModel(settings.model_config())
        if settings.vq_ckpt and resume is None:
            checkpoint.load_weights(self.model, start_weights(settings), str(settings.vq_ckpt))
        self.model.to(here.device, memory_format=torch.channels_last).train()
        self.ema = ema_copy(self.model)
        self.optimizer = adamw(self.model, settings)
        self.dead_codes = DeadCodes(self.model.config.codebook_size, here.device)
        self.step = 0
        if resume is not None:
            self.restore(resume)
        self.forward = DistributedDataParallel(self.model, broadcast_buffers=False) if here.size > 1 else self.model
        self.recent: list[Tensor] = []
        self.since = time.perf_counter()

    def restore(self, content: dict[str, Any]) -> None:
        what = str(self.settings.results_dir / "last.pt")
        checkpoint.load_weights(self.model, content["model"], what)
        checkpoint.load_weights(self.ema, content["ema"], f"{what} (ema)")
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.dead_codes.seen.copy_(content["codes_seen"])
        self.step = content["steps"]
        self.log.line(f"continuing at step {self.step} of {self.steps} from {what}")

    def weights(self) -> dict[str, Any]:
        """What the next stage reads."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            "vq_model": self.settings.vq_model,
            "image_size": self.settings.image_size,
            "config": asdict(self.model.config),
            "args": self.settings.plain(),
        }

    def save(self) -> None:
        """Write last.pt: everything that continuing needs."""
        if self.here.is_main:
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            content = {**self.weights(), **state, "codes_seen": self.dead_codes.seen}
            checkpoint.save(self.settings.results_dir / "last.pt", content)

    def selections(self, epoch: int, first_step: int) -> Iterator[Selection]:
        """This process's part of each batch of an epoch; view 1 is the mirror image."""
        s = self.settings
        return epoch_batches(
            self.images, 1 if s.no_flip else 2, s.global_batch_size,
            seed=s.global_seed, epoch=epoch, label_drop=0.0,
            first_step=first_step, part=self.here.share(s.global_batch_size),
        )  # fmt: skip

    def train(self, batches: ReadBatches | CachedBatches) -> None:
        """Run to the last step."""
        s = self.settings
        self.since = time.perf_counter()
        with progress(total=self.steps, initial=self.step, unit=" steps", show=self.here.is_main) as bar:
            while self.step < self.steps:
                epoch, first_step = divmod(self.step, self.steps_per_epoch)
                bar.set_description(f"epoch {epoch}")
                for images_BHWC in batches(self.selections(epoch, first_step)):
                    self.train_step(images_BHWC)
                    bar.update()
                    due = self.step % s.ckpt_every == 0 and self.step < self.steps
                    if due or self.step == 1 or self.step % s.log_every == 0 or self.step == self.steps:
                        bar.set_postfix_str(self.report(epoch))
                    if due:
                        self.save()

    def train_step(self, images_BHWC: Tensor) -> None:
        s = self.settings
        self.lr = learning_rate(self.step, self.steps, lr=s.lr, end_lr=s.end_lr, warmup_ratio=s.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        images_BCHW = to_float(images_BHWC.to(self.here.device, non_blocking=True))
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        with self.amp():
            output = self.forward(images_BCHW)
        loss = vq_loss(images_BCHW, output.reconstruction_BCHW, output.loss, reconstruction=s.reconstruction_loss)
        self.scaler.scale(loss.total).backward()
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.max_grad_norm or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.part_names = list(loss.parts)
        self.recent.append(torch.stack((loss.total.detach(), *loss.parts.values())))
        self.step += 1
        self.keep_codebook_alive(gather(output.codes_BHW, self.here), output.latents_BDHW.detach())
        update_ema(self.ema, self.model, min(s.ema_decay, (1 + self.step) / (10 + self.step)))

    def keep_codebook_alive(self, codes_BHW: Tensor, latents_BDHW: Tensor) -> None:
        """Record the global batch's codes; when it is due, restart entries that none of the last steps used."""
        every = self.settings.restart_dead_codes
        if self.model.config.show_usage:
            self.model.quantize.record(codes_BHW)
        self.dead_codes.note(codes_BHW)
        if every and self.step % every == 0 and self.step < RESTART_UNTIL * self.steps:
            latents_BDHW = gather(latents_BDHW, self.here)
            self.dead_codes.restart(
                self.model, self.ema, self.optimizer, latents_BDHW, self.settings.global_seed, self.step
            )

    def report(self, epoch: int) -> str:
        """Log the mean losses since the last report, over all processes; stop the run if one is not finite."""
        losses = (self.here.sum(torch.stack(self.recent)) / self.here.size).cpu()  # (steps, 1 + parts)
        bad = (~losses[:, 0].isfinite()).nonzero()
        if len(bad):
            step = self.step - len(losses) + 1 + int(bad[0])
            last = self.settings.results_dir / "last.pt"
            kept = f"continue from {last} by the same command" if last.is_file() else "there is no checkpoint yet"
            raise SystemExit(
                f"error: the loss of step {step} is {losses[int(bad[0]), 0]:.3g}: the run stops; {kept}, "
                "or try a lower --lr or --max-grad-norm"
            )
        speed = len(losses) * self.settings.global_batch_size / (time.perf_counter() - self.since)
        self.recent, self.since = [], time.perf_counter()
        row = dict(zip(["loss", *self.part_names], losses.mean(0).tolist(), strict=True))
        if self.model.config.show_usage:
            row["codebook_usage"] = self.model.quantize.usage()
        row |= {"lr": self.lr, "grad_norm": float(self.grad_norm), "images_per_s": round(speed, 1)}
        self.log.metrics(step=self.step, epoch=epoch, **row)
        usage = f", codebook {row['codebook_usage']:.0%}" if "codebook_usage" in row else ""
        return f"loss {row['loss']:.4f}{usage}, lr {self.lr:.1e}, {speed:.0f} images/s"

    def finish(self, pictures_NHWC: Tensor) -> None:
        """Draw reconstructions.png, write vq.pt, drop last.pt."""
        if not self.here.is_main:
            return
        folder = self.settings.results_dir
        decoded = to_uint8(self.ema.reconstruct(to_float(pictures_NHWC.to(self.here.device)))).cpu()
        mse = (decoded.double() - pictures_NHWC.double()).div(255).square().mean().item()
        rows = torch.cat((pictures_NHWC, decoded)).numpy()
        names = ("image", "decoded")
        scale = max(1, 64 // self.settings.image_size)
        draw.save_image(folder / "reconstructions.png", draw.image_grid(rows, len(pictures_NHWC), names, scale))
        checkpoint.save(folder / "vq.pt", self.weights())
        (folder / "last.pt").unlink(missing_ok=True)
        psnr = -10 * math.log10(max(mse, 1e-10))
        self.log.line(
            f"wrote {folder / 'vq.pt'} after {self.step} steps; PSNR of {len(decoded)} training images {psnr:.2f}"
        )


def training_loop(settings: Settings) -> None:
    """Train, or continue, or say that there is nothing left to do. Raises InputError before any work."""
    folder = ImageFolder(settings.data_path)
    check(settings, len(folder))
    done, resume = previous(settings, "vq.pt"), previous(settings, "last.pt")
    with world() as here:
        if done:
            print(f"{settings.results_dir / 'vq.pt'} is already finished") if here.is_main else None
            return
        trainer = Trainer(settings, len(folder), here, resume)
        if here.is_main:
            forget_after(settings.results_dir, trainer.step)
        config, side = trainer.model.config, settings.image_size // trainer.model.downsample
        parameters = sum(p.numel() for p in trainer.model.parameters())
        trainer.log.line(
            f"{settings.vq_model}: {parameters / 1e6:.2f}M parameters, {side}x{side} of {config.codebook_size} codes an image; "
            f"{len(folder)} images, {trainer.steps} steps, {here.size} process(es) on {here.device.type}"
        )
        batches = batches_of(folder, settings.image_size, settings.num_workers, here.is_main)
        trainer.train(batches)
        chosen = np.linspace(0, len(folder) - 1, min(PICTURES, len(folder))).astype(np.int64)
        plain = Selection(chosen, np.zeros_like(chosen), np.zeros_like(chosen, bool))
        trainer.finish(next(batches([plain])))


def main() -> None:
    training_loop(parse())


if __name__ == "__main__":
    cli.run(main)
