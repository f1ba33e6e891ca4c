"""Files of networks that could run code are refused before anything of them runs."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evaluations.c2i.features import FeatureNetwork
from utils.cli import InputError
from utils.networks import save_network

MODEL, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"


class Deep(nn.Module):
    """Layers of the usual kinds, a part without gradients, sizes that are formulas of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 5)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() / 255 - self.mean
        x = F.interpolate(x, size=(images.shape[1] * 2 + 1, images.shape[2] // 2), mode="bilinear", antialias=True)
        with torch.no_grad():
            x = F.scaled_dot_product_attention(*[self.layers(x).flatten(2).transpose(1, 2)] * 3).mean(1)
        return x, self.head(x)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "deep.pt2"
    save_network(path, Deep(), 16, "deep")
    return path


def changed(source, path, name, change) -> None:
    """Copy a network's file, with the content of one entry changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if info.filename == f"archive/{name}" else content)


class Command:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def edited(edit):
    """A change of a JSON entry, in place."""

    def change(content: bytes) -> bytes:
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def first_node(**values):
    return edited(lambda model: model["graph_module"]["graph"]["nodes"][0].update(values))


def size(text):
    def edit(model):
        tensors = model["graph_module"]["graph"]["tensor_values"]
        tensors["images"]["sizes"][0]["as_expr"]["expr_str"] = text

    return edited(edit)


@pytest.mark.parametrize("dynamic", ["batch", "all sizes"])
def test_networks_of_usual_layers_are_read(tmp_path, dynamic):
    path, module = tmp_path / "a.pt2", Deep().eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    if dynamic == "batch":
        save_network(path, module, 16, "a")
    else:
        axes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
        torch.export.save(torch.export.export(module, (torch.from_numpy(images),), dynamic_shapes=(axes,)), path)
    found, expected = FeatureNetwork.load(path)(images), module(torch.from_numpy(images))
    for part, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_sample_inputs_are_not_needed(network_file, tmp_path):
    changed(network_file, tmp_path / "a.pt2", INPUTS, lambda _: b"")
    assert FeatureNetwork.load(tmp_path / "a.pt2").name == "deep"


@pytest.mark.parametrize(
    ("entry", "make", "message"),
    [
        (INPUTS, lambda mark: lambda _: pickled(((Command(mark),), {})), "its sample inputs hold Python objects"),
        (WEIGHTS, lambda _: edited(lambda c: c["config"]["head.bias"].update(use_pickle=True)), "holds a Python object"),
        (WEIGHTS, lambda _: edited(lambda c: c["config"]["head.bias"].update(path_name="custom_obj_0")), "custom_obj_0"),
        (MODEL, lambda _: first_node(target="torch.hub.os.system"), r"it calls torch\.hub\.os\.system, which is none of"),
        (MODEL, lambda _: first_node(target="torch.ops.aten.from_file.default"), "it calls torch.ops.aten.from_file"),
        (MODEL, lambda _: first_node(target="torch.ops.aten.save.default"), "it calls torch.ops.aten.save.default"),
        (MODEL, lambda _: first_node(target="torch.ops.aten.__class__.mro"), "it calls torch.ops.aten.__class__.mro"),
        (MODEL, lambda _: size("9**9**9**9"), r"a size in it is 9\*\*9"),
        (MODEL, lambda _: size("Pow(Integer(9), Integer(999999999))"), "a size in it is Pow"),
        (MODEL, lambda mark: size(f"__import__('os').system('touch {mark}')"), "a size in it is __import__"),
        (MODEL, lambda mark: size(f"Symbol('s0').func.__class__('touch {mark}')"), r"a size in it is Symbol\('s0'\)\.func"),
    ],
)  # fmt: skip
def test_what_could_run_code_is_refused(network_file, tmp_path, entry, make, message):
    mark, path = tmp_path / "command-has-run", tmp_path / "a.pt2"
    changed(network_file, path, entry, make(mark))
    with pytest.raises(InputError, match=rf"a\.pt2 is refused, as reading it could run code .*{message}"):
        FeatureNetwork.load(path)
    assert not mark.exists()


def test_code_of_checks_is_left_out(network_file, tmp_path):
    mark, path = tmp_path / "command-has-run", tmp_path / "a.pt2"
    code = f"__import__('os').system('touch {mark}') == 0"
    changed(network_file, path, MODEL, edited(lambda model: model.update(guards_code=[code])))
    FeatureNetwork.load(path)(np.zeros((1, 16, 16, 3), np.uint8))
    assert not mark.exists()


def test_weights_larger_than_their_entry_are_refused(network_file, tmp_path):
    def edit(config):
        config["config"]["head.bias"]["tensor_meta"].update(sizes=[{"as_int": 10**15}], strides=[{"as_int": 0}])

    changed(network_file, tmp_path / "a.pt2", WEIGHTS, edited(edit))
    with pytest.raises(InputError, match=r"a\.pt2 is damaged.*head\.bias has 1000000000000000 values"):
        FeatureNetwork.load(tmp_path / "a.pt2")


def test_an_archive_that_unfolds_is_refused(network_file, tmp_path):
    with zipfile.ZipFile(network_file) as old, zipfile.ZipFile(tmp_path / "a.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(InputError, match=r"a\.pt2 is refused.*is compressed"):
        FeatureNetwork.load(tmp_path / "a.pt2")
