"""One way to load, for every kind of model: from a path, a dict or a name; dtype, gradients, and what is printed."""

from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

from pretrained_models.loader import Pretrained, check_sizes
from utils import checkpoint
from utils.cli import InputError


@dataclass(frozen=True)
class Config:
    width: int = 3
    rate: float = 0.0


class Net(nn.Module, Pretrained):
    PRESETS, CONFIG, OPEN, KIND, NAME = {"small": Config(), "large": Config(6)}, Config, ("rate",), "net", "net_model"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.fc = config, nn.Linear(config.width, 2)

    @classmethod
    def sizes_of(cls, state):
        return {}

    @classmethod
    def check_config(cls, config, state, what):
        check_sizes({"width": config.width}, what)


STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.5, -2.0])}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "net.pt", {"model": STATE, "args": {"lr": 1}, "steps": 3})
    return tmp_path / "net.pt"


def test_a_path_and_its_content_give_the_same(path, capsys):
    model = Net.from_pretrained(path)
    assert model.about == {"steps": 3, "net_model": "small", "weights": "model"} and not model.training
    assert f"loaded small from {path}: 0.0M parameters, float32, raw weights, 3 steps" in capsys.readouterr().err
    content = checkpoint.load(path)
    again = Net.from_pretrained(content, quiet=True)
    assert again.about == model.about and capsys.readouterr().err == ""
    assert again.fc.weight.equal(model.fc.weight)
    assert again.fc.weight.data_ptr() == content["model"]["fc.weight"].data_ptr()  # no second copy


def test_gradients_are_asked_for(path):
    assert not any(p.requires_grad for p in Net.from_pretrained(path).parameters())
    assert all(p.requires_grad for p in Net.from_pretrained(path, frozen=False).parameters())


@pytest.mark.parametrize(
    ("weight", "bias", "asked", "expected"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_one_dtype(weight, bias, asked, expected):
    state = {"fc.weight": STATE["fc.weight"].to(weight), "fc.bias": STATE["fc.bias"].to(bias)}
    assert {p.dtype for p in Net.from_pretrained({"model": state}, dtype=asked).parameters()} == {expected}


def test_defaults_are_for_files_without_a_config(path):
    assert Net.from_pretrained(path, defaults={"rate": 0.5}).config.rate == 0.5
    content = {"model": STATE, "config": asdict(Config(rate=0.25))}
    assert Net.from_pretrained(content, defaults={"rate": 0.5}).config.rate == 0.25
    assert Net.from_pretrained(content, "small").config.rate == 0.25


@pytest.mark.parametrize("options", [{"dtpye": torch.float16}, {"defaults": {"rat": 1}}])
def test_a_misspelt_keyword_is_an_error(path, options):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Net.from_pretrained(path, **options)


def test_what_does_not_fit(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in (
        ({"model": {"w": STATE["fc.bias"]}}, "does not say which model it is, and no net preset has these tensors"),
        ({"model": STATE, "config": {"width": 10**9}}, "config: expected width to be a whole number"),
        ({"model": STATE, "net_model": "../x"}, "net_model: expected a short name"),
        ({"model": {**STATE, "fc.bias": torch.tensor([1.0, torch.inf])}}, r"fc\.bias has values that are not finite"),
        (tmp_path / "none.pt", "there is no file"),
        ("results/none.pt", "there is no file"),
        ("user/repo", "user/repo is no file here, and was not fetched from the Hub"),
    ):
        with pytest.raises(InputError, match=message):
            Net.from_pretrained(source)
    with pytest.raises(InputError, match=r"loaded as large\) does not fit .*; they are those of small"):
        Net.from_pretrained(path, "large")
