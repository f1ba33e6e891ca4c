"""The classifier's training: a function of its seed; augmentation, export and settings."""

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i import train_classifier
from evaluations.c2i.classifier import Classifier, fused, shifted
from evaluations.c2i.train_classifier import Settings, augmented, check, is_there, learning_rate, network_name, train
from utils.cli import InputError

CPU = torch.device("cpu")
SETTINGS = Settings(
    data_path=Path("train"), val_path=Path("val"), image_size=16, name="colours", epochs=1, batch_size=8, lr=4e-3,
    max_shift=2, flip=True, seed=0,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
LABELS = np.arange(40) % 3


def weights(settings: Settings = SETTINGS) -> torch.Tensor:
    model = train(settings, IMAGES, LABELS, 3, CPU)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_a_function_of_its_settings():
    first = weights()
    torch.rand(1)
    assert first.equal(weights())
    for change in ({"seed": 1}, {"lr": 1e-3}, {"max_shift": 0}, {"flip": False}):
        assert not first.equal(weights(replace(SETTINGS, **change)))


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    weights()
    assert torch.rand(1).equal(expected)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(InputError, match=r"the loss is nan after epoch 1: give a lower --lr"):
        weights(replace(SETTINGS, lr=1e30))


def test_shifted_repeats_the_border():
    images = torch.from_numpy(IMAGES[:3])
    offsets = torch.tensor([[0, 0], [2, -3], [-1, 20]])
    found = shifted(images, offsets).numpy()
    padded = np.pad(IMAGES[:3], ((0, 0), (20, 20), (20, 20), (0, 0)), mode="edge")
    for i, (rows, columns) in enumerate(offsets.tolist()):
        assert np.array_equal(found[i], padded[i, 20 - rows : 36 - rows, 20 - columns : 36 - columns])


def test_augmentation_belongs_to_the_image_and_the_epoch():
    indices, images = np.arange(40), torch.from_numpy(IMAGES)
    whole = augmented(images, indices, 2, SETTINGS)
    some = np.array([7, 0, 33])
    assert augmented(images[some], some, 2, SETTINGS).equal(whole[some])
    assert not augmented(images, indices, 3, SETTINGS).equal(whole)
    assert augmented(images, indices, 2, replace(SETTINGS, max_shift=0, flip=False)).equal(images)
    mirrored = augmented(images, indices, 2, replace(SETTINGS, max_shift=0)).eq(images.flip(2)).flatten(1).all(1)
    assert 10 < mirrored.sum() < 30


def test_the_export_is_the_classifier():
    model = Classifier(5)
    images = torch.from_numpy(IMAGES)
    for _ in range(5):
        model(images)  # moves the batch norms' statistics
    copy = fused(model)
    assert model.training and not any(isinstance(m, torch.nn.BatchNorm2d) for m in copy.modules())
    for found, expected in zip(copy(images), model.eval()(images), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_learning_rate(steps):
    rates = [learning_rate(step, steps, 2.0) for step in range(steps)]
    top = rates.index(2.0)
    assert top == steps // 5 and min(rates) > 0
    assert all(a < b for a, b in pairwise(rates[: top + 1])) and all(a > b for a, b in pairwise(rates[top:]))


class Folder:
    """As much of an ImageFolder as check() looks at."""

    def __init__(self, *classes: str, images: int = 10) -> None:
        self.classes, self.images = list(classes), images

    def __len__(self) -> int:
        return self.images


def test_wrong_folders(monkeypatch):
    check(SETTINGS, Folder("a", "b"), Folder("a", "b"))
    with pytest.raises(InputError, match="different classes: b, c in one of them only"):
        check(SETTINGS, Folder("a", "b"), Folder("a", "c"))
    for size in (1, 11):
        with pytest.raises(InputError, match=rf"--batch-size {size}: expected at least 2, at most the 10 images"):
            check(replace(SETTINGS, batch_size=size), Folder("a"), Folder("a"))
    monkeypatch.setattr(train_classifier.os, "sysconf", lambda name: 100_000)
    with pytest.raises(
        InputError, match=r"images of 16 px take 15 GB of memory, more than half of the 10 GB there are"
    ):
        check(SETTINGS, Folder("a", images=20_000_000), Folder("a"))


def test_what_is_there_already(tmp_path):
    out, wanted = tmp_path / "x.pt2", SETTINGS.plain()
    assert not is_there(out, wanted)
    out.write_text("")
    with pytest.raises(
        InputError, match=r"x\.pt2 is there without a record in .*x\.json: give another --out, or delete it"
    ):
        is_there(out, wanted)
    for content in ("{", "[]", "{}"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match="is there without a record"):
            is_there(out, wanted)
    (tmp_path / "x.json").write_text(json.dumps({"settings": wanted}))
    assert is_there(out, wanted)
    with pytest.raises(
        InputError, match=r"trained with other settings \(epochs 1, now 2; seed 0, now 1\): give another"
    ):
        is_there(out, wanted | {"epochs": 2, "seed": 1})


def test_names_are_words():
    assert network_name("fashion-mnist_v1.0+a") == "fashion-mnist_v1.0+a"
    for name in ("", "two words", "line\nbreak", "a/b", "a(b)"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected letters, digits"):
            network_name(name)
