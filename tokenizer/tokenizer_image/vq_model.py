"""The VQ tokenizer: images to a grid of code indices and back (VQGAN, arXiv 2012.09841, as in LlamaGen, arXiv 2406.06525).

Shapes: B batch, H x W pixels or a grid of codes, C channels, D codebook width, L = H * W codes, N rows of latents.
Parameter names are those of the published checkpoints (vq_ds16_c2i.pt, vq_ds8_c2i.pt).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from pretrained_models.loader import Pretrained, check_sizes
from utils.cli import InputError
from utils.kernels import GroupNorm, attention

USAGE_LENGTH = 65536  # codes that the usage buffer remembers
# Similarities held at once by the search for the nearest code, by device: a CPU is a third faster within its cache.
SEARCH_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
ENTROPY_TEMPERATURE = 0.01


@dataclass(frozen=True)
class VQConfig:
    """What fixes the weights' shapes, the forward pass and the quantiser's loss terms.

    `fold` is the side of the pixel blocks that are folded into channels before the encoder and unfolded behind the
    decoder: above 1 it saves the convolutions at full resolution, which cost most in a small model.
    """

    ch: int = 128
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    show_usage: bool = True
    dropout: float = 0.0
    fold: int = 1

    def __post_init__(self) -> None:
        for name in ("encoder_ch_mult", "decoder_ch_mult"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.encoder_ch_mult) != len(self.decoder_ch_mult):
            raise ValueError(f"encoder and decoder have {self.encoder_ch_mult} and {self.decoder_ch_mult} levels")

    @property
    def downsample(self) -> int:
        """Pixels of a code's side."""
        return self.fold * 2 ** (len(self.encoder_ch_mult) - 1)


# fmt: off
PRESETS = {
    "VQ-16": VQConfig(),
    "VQ-8": VQConfig(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),
    # Of images of 32 px (grids of 16 x 16 and 8 x 8 codes), 64 and 128 px (16 x 16).
    "VQ-2-small": VQConfig(
        ch=32, encoder_ch_mult=(1,), decoder_ch_mult=(1,), num_res_blocks=1, z_channels=64, codebook_size=512, fold=2
    ),
    "VQ-4-small": VQConfig(
        ch=32, encoder_ch_mult=(1, 1), decoder_ch_mult=(1, 1), num_res_blocks=1, z_channels=64, codebook_size=512, fold=2
    ),
    "VQ-4-medium": VQConfig(
        ch=64, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, z_channels=128, codebook_size=2048, fold=2
    ),
    "VQ-8-medium": VQConfig(
        ch=64, encoder_ch_mult=(1, 2, 2), decoder_ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=128, codebook_size=4096,
        fold=2,
    ),
}
# fmt: on


def preset(name: str, **changes) -> VQConfig:
    """A row of PRESETS with fields replaced."""
    return replace(PRESETS[name], **changes)


def group_norm(channels: int) -> GroupNorm:
    """32 groups as published; narrow layers get fewer, so that a group keeps four channels and thus their mean."""
    return GroupNorm(max(1, min(32, channels // 4)), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is 1x1 where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x_BCHW) + h


class Attention(nn.Module):
    """Every position attends to every other one with a single head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.norm(x_BCHW)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))  # (B, L, C)
        mixed = attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, L, C)
        return x_BCHW + self.proj_out(mixed.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Half the side by a strided convolution that is padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; attention follows each residual block where `attend` is set."""

    def __init__(self, channels_in: int, channels: int, blocks: int, attend: bool, dropout: float) -> None:
        super().__init__()
        widths = [channels_in, *[channels] * blocks]
        self.res = nn.ModuleList(ResBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(channels) if attend else nn.Identity() for _ in range(blocks))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn, strict=True):
            x_BCHW = attn(res(x_BCHW))
        return x_BCHW


def middle(channels: int, dropout: float) -> nn.Sequential:
    """The blocks at the grid's own resolution."""
    return nn.Sequential(
        ResBlock(channels, channels, dropout), Attention(channels), ResBlock(channels, channels, dropout)
    )


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, z_channels, H / downsample, W / downsample)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.encoder_ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * config.fold**2, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = Level(before, width, config.num_res_blocks, i == last, config.dropout)
            level.downsample = Downsample(width) if i != last else nn.Identity()
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self.fold = config.fold

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(images_BCHW, self.fold) if self.fold > 1 else images_BCHW)
        for level in self.conv_blocks:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, H, W) -> images (B, 3, H * downsample, W * downsample); levels from the coarsest to the finest."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in reversed(config.decoder_ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.dropout)
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(before, width, config.num_res_blocks + 1, i == 0, config.dropout)
            level.upsample = Upsample(width) if i != last else nn.Identity()
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.fold**2, 3, padding=1)
        self.fold = config.fold

    def features(self, z_BCHW: Tensor) -> Tensor:
        """What the last layer reads: (B, ch, H, W) at the resolution of the folded image."""
        h = self.mid(self.conv_in(z_BCHW))
        for level in self.conv_blocks:
            h = level.upsample(level(h))
        return F.silu(self.norm_out(h))

    def last_layer(self, features_BCHW: Tensor) -> Tensor:
        """Features -> images."""
        h = self.conv_out(features_BCHW)
        return F.pixel_shuffle(h, self.fold) if self.fold > 1 else h

    def last_layer_gradient(self, features_BCHW: Tensor, gradient_BCHW: Tensor) -> Tensor:
        """The gradient at the last layer's weight that a gradient at the images makes, in float32."""
        if self.fold > 1:
            gradient_BCHW = F.pixel_unshuffle(gradient_BCHW, self.fold)
        with torch.no_grad(), torch.autocast(gradient_BCHW.device.type, enabled=False):
            shape, padding = self.conv_out.weight.shape, self.conv_out.padding
            return conv2d_weight(features_BCHW.float(), shape, gradient_BCHW.float(), padding=padding)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        return self.last_layer(self.features(z_BCHW))


class QuantiserLoss(NamedTuple):
    """The quantiser's loss terms, with their factors (beta, entropy ratio) in them."""

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


class Quantised(NamedTuple):
    """values_BDHW: codebook entries with the latents' gradient (straight through); codes_BHW: int64."""

    values_BDHW: Tensor
    codes_BHW: Tensor
    loss: QuantiserLoss


class VectorQuantizer(nn.Module):
    """Nearest entries of a codebook; latents and entries are brought to unit length first where l2_norm is set."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.l2_norm = config.codebook_l2_norm
        self.beta = config.commit_loss_beta
        self.entropy_ratio = config.entropy_loss_ratio
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1 / config.codebook_size, 1 / config.codebook_size)
            if not self.embedding.weight.is_meta:  # there it changes nothing, but costs PyTorch seconds of imports
                self.embedding.weight.copy_(self.unit(self.embedding.weight))
        if config.show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_LENGTH))

    def unit(self, x: Tensor) -> Tensor:
        """Unit length along the last axis, or x itself for a codebook without normalisation."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries (..., D) of codes (...)."""
        return self.unit(self.embedding(codes))

    def rows(self, z_BDHW: Tensor) -> Tensor:
        """Latents as rows (B, H, W, D) to compare with entries, in float32."""
        return self.unit(z_BDHW.float().permute(0, 2, 3, 1))

    @torch.no_grad()
    def search(self, z_BHWD: Tensor) -> Tensor:
        """Codes (B, H, W) int64 of the entries nearest to rows."""
        entries_VD = self.unit(self.embedding.weight.float())
        offset_V = entries_VD.square().sum(1)
        parts = z_BHWD.flatten(0, 2).split(max(1, SEARCH_ELEMENTS[z_BHWD.device.type] // len(entries_VD)))
        # |z - e|^2 without |z|^2, which does not change the order
        codes = [torch.addmm(offset_V, part_ND, entries_VD.T, alpha=-2).argmin(1) for part_ND in parts]
        return torch.cat(codes).view(z_BHWD.shape[:3])

    def codes(self, z_BDHW: Tensor) -> Tensor:
        """Codes (B, H, W) int64 of latents."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            return self.search(self.rows(z_BDHW))

    def forward(self, z_BDHW: Tensor) -> Quantised:
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BHWD = self.rows(z_BDHW)
            codes_BHW = self.search(z_BHWD)
            entries_BHWD = self.lookup(codes_BHW)
            loss = QuantiserLoss(
                F.mse_loss(entries_BHWD, z_BHWD.detach()),
                self.beta * F.mse_loss(z_BHWD, entries_BHWD.detach()),
                self.entropy_ratio * self._entropy(z_BHWD) if self.entropy_ratio else z_BHWD.new_zeros(()),
            )
            straight = z_BHWD + (entries_BHWD - z_BHWD).detach()
        return Quantised(straight.permute(0, 3, 1, 2), codes_BHW, loss)

    def _entropy(self, z_BHWD: Tensor) -> Tensor:
        """Mean entropy of a row's soft assignment less the entropy of the mean assignment (arXiv 2310.05737, eq. 4)."""
        entries_VD = self.unit(self.embedding.weight)
        distances_NV = torch.addmm(entries_VD.square().sum(1), z_BHWD.flatten(0, 2), entries_VD.T, alpha=-2)
        log_share_NV = F.log_softmax(-distances_NV / ENTROPY_TEMPERATURE, dim=-1)
        share_NV = log_share_NV.exp()
        mean_V = share_NV.mean(0)
        each = -(share_NV * log_share_NV).sum(1).mean()
        return each + (mean_V * torch.log(mean_V + 1e-5)).sum()

    @torch.no_grad()
    def record(self, codes: Tensor) -> None:
        """Append codes, in order, to the buffer of the last 65536; the oldest fall out."""
        codes = codes.flatten()[-USAGE_LENGTH:].to(self.codebook_used)
        self.codebook_used.copy_(torch.cat((self.codebook_used[len(codes) :], codes)))

    def counts(self, newest: int = USAGE_LENGTH) -> Tensor:
        """How often each entry is among the newest codes of the buffer (int64); a fresh buffer holds code 0."""
        return torch.bincount(self.codebook_used[-newest:].long(), minlength=self.embedding.num_embeddings)


def code_health(counts_V: Tensor) -> dict[str, float]:
    """Of how often each entry is used: the share of those in use, the perplexity (e to the entropy), the dead ones' number."""
    share_V, dead = counts_V.double() / counts_V.sum().clamp(min=1), int((counts_V == 0).sum())
    perplexity = torch.special.entr(share_V).sum().exp().item()
    return {"codebook_usage": (len(counts_V) - dead) / len(counts_V), "perplexity": perplexity, "dead_codes": dead}


class Output(NamedTuple):
    """What training needs of a forward pass; latents before normalisation, features before the decoder's last layer."""

    reconstruction_BCHW: Tensor
    codes_BHW: Tensor
    latents_BDHW: Tensor
    features_BCHW: Tensor
    loss: QuantiserLoss


class VQModel(nn.Module):
    """Encoder, quantiser, decoder. Images are float (B, 3, H, W), about -1..1; H and W multiples of `downsample`."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    @property
    def downsample(self) -> int:
        """Pixels of a code's side."""
        return self.config.downsample

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """Images -> (B, D, H / downsample, W / downsample), before normalisation. Raises ValueError for other sides."""
        height, width = images_BCHW.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"expected sides that are multiples of {self.downsample} px, got {height} x {width}")
        return self.quant_conv(self.encoder(images_BCHW))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images -> codes (B, H / downsample, W / downsample) int64."""
        return self.quantize.codes(self.latents(images_BCHW))

    def decode(self, values_BDHW: Tensor) -> Tensor:
        """Quantised latents -> images."""
        return self.decoder(self.post_quant_conv(values_BDHW))

    def decode_code(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W), or (B, L) of a square grid row by row, -> images."""
        if codes.dim() == 2:
            side = isqrt(codes.shape[1])
            if side * side != codes.shape[1]:
                raise ValueError(f"{codes.shape[1]} codes are no square grid; give them as (B, H, W)")
            codes = codes.unflatten(1, (side, side))
        return self.decode(self.quantize.lookup(codes).permute(0, 3, 1, 2))

    @torch.inference_mode()
    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        """Images through their codes and back."""
        return self.decode_code(self.encode(images_BCHW))

    def forward(self, images_BCHW: Tensor) -> Output:
        latents_BDHW = self.latents(images_BCHW)
        quantised = self.quantize(latents_BDHW)
        features_BCHW = self.decoder.features(self.post_quant_conv(quantised.values_BDHW))
        return Output(
            self.decoder.last_layer(features_BCHW), quantised.codes_BHW, latents_BDHW, features_BCHW, quantised.loss
        )


class Tokenizer(
    VQModel,
    Pretrained,
    library_name="pytorch",
    tags=["image-tokenizer", "vector-quantization", "next-patch-prediction"],
    paper_url="https://arxiv.org/abs/2406.06525",
):
    """A VQModel that was loaded, in float32: Tokenizer.from_pretrained("vq_ds16_c2i"); see Pretrained."""

    PRESETS, CONFIG, KIND, NAME, DTYPE = PRESETS, VQConfig, "tokenizer", "vq_model", torch.float32
    # What the command line of vq_train.py can change.
    OPEN = ("codebook_size", "codebook_embed_dim", "commit_loss_beta", "entropy_loss_ratio", "show_usage")

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        codebook = state.get("quantize.embedding.weight", torch.empty(0))
        if codebook.dim() != 2:
            return {}
        usage = "quantize.codebook_used" in state
        return {"codebook_size": len(codebook), "codebook_embed_dim": codebook.shape[1], "show_usage": usage}

    @classmethod
    def check_config(cls, config: VQConfig, state: Mapping[str, Tensor], what: str) -> None:
        whole = ("ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_embed_dim", "fold")
        levels = (*config.encoder_ch_mult, *config.decoder_ch_mult)
        sizes = {key: getattr(config, key) for key in whole} | {f"ch_mult {i}": level for i, level in enumerate(levels)}
        check_sizes(sizes, what)
        if len(levels) * config.num_res_blocks > len(state):
            raise InputError(
                f"{what} says {config.num_res_blocks} blocks for each of {len(levels)} levels, but it holds "
                f"{len(state)} tensors"
            )
