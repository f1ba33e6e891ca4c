"""From weights to a model, for GPTs and tokenizers alike: `Pretrained` is the base of both.

A file says which model it is by its config (our files) or by the names and shapes of its tensors (published ones). The model
is built without memory, then has the file's own tensors, mapped.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from pretrained_models.catalogue import CATALOGUE, find_weights
from utils import checkpoint
from utils.cli import InputError, note
from utils.download import reason

Model = TypeVar("Model", bound=nn.Module)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)(@[\w.-]+)?")
LARGEST_SIZE = 1 << 20  # of any one size in a file's config


class Pretrained(PyTorchModelHubMixin, ABC):
    """A model that comes from weights, and goes to the Hub by save_pretrained and push_to_hub.

    A subclass is a model whose only argument is its config, a dataclass.
    """

    PRESETS: ClassVar[Mapping[str, Any]]  # configs by name
    CONFIG: ClassVar[type]
    OPEN: ClassVar[tuple[str, ...]]  # the fields of a config that a preset leaves open
    KIND: ClassVar[str]  # what messages call it
    NAME: ClassVar[str]  # a file's key for the preset's name
    DTYPE: ClassVar[torch.dtype | None] = None  # of the weights; None: as in the file, float32 where it has several

    about: Mapping[str, Any] = {}  # the plain data of its file, but for the run's arguments

    @classmethod
    def from_pretrained(
        cls, source: str | Path | Mapping[str, Any], preset: str | None = None, *, weights: str = "auto",
        dtype: torch.dtype | None = None, frozen: bool = True, quiet: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> Self:  # fmt: skip
        """Read weights strictly; the model, in eval mode on the CPU, whose `about` says what it came from.

        source: a path, a published name, hf://user/repo/file, a repository user/repo[@revision], or what checkpoint.load
        gave. preset: one to insist on; by default the file's config, or the preset that its tensors are of. weights: model,
        ema, or auto (see checkpoint.chosen). dtype: of the weights, by default DTYPE. frozen: its weights take no
        gradients. quiet: without the line that says what was loaded. defaults: fields of the config, for files that don't
        say. `about` is the file's plain data, `weights`, and the model's name (gpt_model or vq_model).
        Raises InputError if the weights are not that model, naming the first tensors that differ and the preset that would
        fit.
        """
        content, what = _read(source)
        state, about = checkpoint.state_dict(content, weights), checkpoint.about(content)
        name, config = cls.find_config(about, state, preset, defaults or {}, what)
        model = cls.check_weights(state, config, f"{what} (loaded as {name})")
        adopt_weights(model, state, dtype or cls.DTYPE)
        kind = about.get("weights") or checkpoint.chosen(content, weights)  # an export says which it was made of
        about |= {cls.NAME: name, "weights": kind}
        model.about = {key: value for key, value in about.items() if key != "args"}
        if not quiet:
            note(f"loaded {name} from {checkpoint.describe(what, content, weights, state)}")
        return model.eval().requires_grad_(not frozen)

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save_folder(save_directory, self.state_dict(), {**self.about, "config": vars(self.config)})

    @classmethod
    def empty(cls, config: Any) -> Self:
        """A model on the meta device, to be given a file's tensors."""
        return on_meta(lambda: cls(config))

    @classmethod
    def check_weights(cls, state: Mapping[str, Tensor], config: Any, what: str) -> Self:
        """The empty model of a config. Raises InputError for weights that do not fit it, or are not finite."""
        model = cls.empty(config)
        checkpoint.check_fit(model, state, what, lambda: cls.advice(state))
        checkpoint.check_finite(state, what)
        return model

    @classmethod
    def find_config(
        cls, about: Mapping[str, Any], state: Mapping[str, Tensor], preset: str | None, defaults: Mapping[str, Any],
        what: str,
    ) -> tuple[str, Any]:  # fmt: skip
        """The name and the config of a file's model. Raises InputError where nothing says it."""
        if preset is not None and preset not in cls.PRESETS:
            raise InputError(f"there is no {cls.KIND} {preset}; choose one of {', '.join(cls.PRESETS)}")
        check_name(about.get(cls.NAME), f"{what}: {cls.NAME}")
        if "config" not in about:
            name = preset or cls.preset_of(state)
            if name is None:
                raise InputError(f"{what} does not say which model it is, and {cls.advice(state)}")
            return name, replace(cls.PRESETS[name], **{**defaults, **cls.sizes_of(state)})
        try:
            config = cls.CONFIG(**about["config"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} is no {cls.KIND} of this code: its config does not fit ({error})") from None
        cls.check_config(config, state, f"{what}: config")
        if preset is None:
            return about.get(cls.NAME) or cls.preset_of(state) or cls.KIND, config
        return preset, replace(cls.PRESETS[preset], **{key: getattr(config, key) for key in cls.OPEN})

    @classmethod
    def preset_of(cls, state: Mapping[str, Tensor]) -> str | None:
        """The preset that has these tensors' names and shapes, whatever the sizes that presets leave open."""
        configs = {name: replace(cls.PRESETS[name], **cls.sizes_of(state)) for name in cls.candidates(state)}
        return next((n for n, c in configs.items() if not checkpoint.misfits(cls.empty(c), state)), None)

    @classmethod
    def advice(cls, state: Mapping[str, Tensor]) -> str:
        """What to say of weights that do not fit: the preset that would, with its sizes."""
        if name := cls.preset_of(state):
            return (
                f"they are those of {name} ({', '.join(f'{key} {size}' for key, size in cls.sizes_of(state).items())})"
            )
        return f"no {cls.KIND} preset has these tensors"

    @classmethod
    def candidates(cls, state: Mapping[str, Tensor]) -> Sequence[str]:
        """Names of presets that may have these tensors."""
        return tuple(cls.PRESETS)

    @classmethod
    @abstractmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of the config that are read off the tensors, as far as those are there."""

    @classmethod
    @abstractmethod
    def check_config(cls, config: Any, state: Mapping[str, Tensor], what: str) -> None:
        """Raise InputError for sizes in a file's config that no model has, or its tensors have not; nothing is built."""


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """A checkpoint's content, and what messages call it."""
    if isinstance(source, Mapping):
        return source, "the checkpoint"
    text = str(source)
    is_repository = REPOSITORY.fullmatch(text) and text not in CATALOGUE and not Path(text).exists()
    path = _repository(*text.partition("@")[::2]) if is_repository else find_weights(text)
    return checkpoint.load(path, mmap=True), text if is_repository else str(path)


def _repository(name: str, revision: str) -> Path:
    """The safetensors of a repository of the Hub, in its own cache. Raises InputError if they cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the HTTP client has errors of its own
        raise InputError(
            f"{name} is no file here, and was not fetched from the Hub ({reason(error)}): check the name and the connection"
        ) from None


def check_name(name: Any, what: str) -> None:
    """Raise InputError for a name in a file that is no plain name: it may become part of a path. None is none."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w[\w.+ -]{0,99}", name)):
        raise InputError(f"{what}: expected a short name of letters, digits, dots and dashes, got {str(name)[:60]!r}")


def check_sizes(sizes: Mapping[str, Any], what: str) -> None:
    """Raise InputError, naming the first, for sizes that are no whole numbers from 1 to LARGEST_SIZE."""
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise InputError(
                f"{what}: expected {key} to be a whole number from 1 to {LARGEST_SIZE}, got {str(value)[:60]}"
            )


class _NoInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it changes nothing, but costs PyTorch seconds of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[[], Model]) -> Model:
    """What build() makes, with all its tensors on the meta device: names and shapes without memory."""
    with torch.device("meta"), _NoInitialisation():
        return build()


def adopt_weights(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Give a model on the meta device the tensors themselves, so that no second copy of them exists; names must fit.

    dtype: of all floating-point weights; by default the file's, float32 where it holds several.
    """
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if dtype is None and len(floating) > 1:
        dtype = torch.float32
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(cast if dtype else state, strict=True, assign=True)
