"""Perceptual distances of images and their reconstructions, float (B, 3, H, W), about -1..1, with gradients.

LPIPS (arXiv 1801.03924) with a VGG that was trained on photographs, or the same distance without learned weights in the
layers of any network that the evaluator takes (`.pt2`), for images that are no photographs.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.cli import InputError
from utils.networks import read_network

ACTIVATIONS = ("relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "silu_", "hardswish", "hardtanh")
VGG = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
OTHERWISE = "give --perceptual-network NETWORK.pt2, or --perceptual-weight 0 to go without a perceptual loss"


def lpips_is_here() -> bool:
    """Whether LPIPS can be had without a download."""
    return find_spec("lpips") is not None and VGG.is_file()


class LPIPS(nn.Module):
    """The lpips package's distance in the layers of VGG16, averaged over the batch.

    Raises InputError, with what to do, where the package or VGG's weights are missing and cannot be downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips  # here, since other trainings go without it
        except ImportError:
            raise InputError(f"LPIPS is not installed: pip install lpips; or {OTHERWISE}") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's, of how the package calls it
                self.distance = lpips.LPIPS(net="vgg", verbose=False)
        except (OSError, RuntimeError) as error:  # no network, or a damaged download
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"the weights of LPIPS's VGG16 cannot be downloaded ({reason}): put "
                f"https://download.pytorch.org/models/{VGG.name} into {VGG.parent}; or {OTHERWISE}"
            ) from None
        self.requires_grad_(False).eval()

    def forward(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        return self.distance(images_BCHW, others_BCHW).mean()


class NetworkDistance(nn.Module):
    """The squared distance of unit vectors along the channels, of the last activations at each resolution and of the
    features: the mean over positions, these layers and the batch.

    path: a feature network (see utils/networks.py). Raises InputError for one that takes other images, or whose features
    have no gradients at the pixels.
    """

    def __init__(self, path: str | Path, image_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        network = read_network(path, device)
        for side in (network.height, network.width):
            if side not in (None, image_size):
                raise InputError(
                    f"--perceptual-network {path} takes images of {network.height}x{network.width}, not of "
                    f"--image-size {image_size}"
                )
        self.layers = layers_of(network.program)
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        images, others = (torch.rand(2, 2, 3, image_size, image_size, generator=generator) * 2 - 1).to(device)
        try:
            (gradient,) = torch.autograd.grad(self(images.requires_grad_(), others), images)
            reason = "" if gradient.isfinite().all() and gradient.any() else "it is not finite, or 0"
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:120]
        if reason:
            raise InputError(
                f"--perceptual-network {path} cannot be trained with: no gradient at the pixels ({reason})"
            )

    def forward(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        pairs = zip(self._units(images_BCHW), self._units(others_BCHW), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _units(self, images_BCHW: Tensor) -> list[Tensor]:
        pixels_BHWC = (images_BCHW.float() * 127.5 + 127.5).permute(0, 2, 3, 1)  # as uint8 ones, but not rounded
        return [F.normalize(layer.float(), dim=1, eps=1e-6) for layer in self.layers(pixels_BHWC)]


def layers_of(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as float images (B, H, W, 3) in 0..255 -> the last activations (B, C, h, w) at each resolution, and the
    features (B, D), with gradients.

    An export from uint8 images checks its input's type and may compute parts without gradients; both are undone.
    """
    module = program.module(check_guards=False)
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                node.args = (True, *node.args[1:])
            elif node.target is torch.ops.aten._assert_tensor_metadata.default:
                part.graph.erase_node(node)
            elif node.target is torch.ops.aten.detach.default:
                node.replace_all_uses_with(node.args[0])
        if isinstance(part, torch.fx.GraphModule):
            part.recompile()
    nodes = list(module.graph.nodes)
    names = [f"aten.{name}.default" for name in ACTIVATIONS]
    last = {}
    for node in nodes:
        value = node.meta.get("val")
        if str(node.target) in names and isinstance(value, Tensor) and value.dim() == 4:
            last[str(value.shape[2:])] = node
    output = nodes[-1]
    features = torch.utils._pytree.tree_leaves(output.args)[0]
    output.args = ((*last.values(), features),)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
