"""The classifier's training: a function of its settings; augmentation, export, and runs that are cut off or finished."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.c2i import train_classifier
from evaluations.c2i.classifier import Classifier, fused, shifted
from evaluations.c2i.train_classifier import (
    ClassifierRecord,
    ClassifierSettings,
    ClassifierTask,
    augmented,
    learning_rate,
    main,
)
from utils.cli import InputError
from utils.distributed import World, autocast
from utils.fake_gpu import GPU, fake_gpu, train_steps
from utils.log import read_metrics

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 images of three classes, each of its own brightness."""
    root = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(IMAGES):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels // 3 + 80 * (i % 3)).save(path)
    return root


def flags(images, out, **changes) -> list[str]:
    given = {
        "data-path": images, "val-path": images, "image-size": 16, "name": "brightness", "out": out, "epochs": 2,
        "global-batch-size": 8, "log-every": 1, "max-shift": 2,
    }  # fmt: skip
    given |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def losses(out) -> list[float]:
    return [row["loss"] for row in read_metrics(out.with_suffix(".run")) if "loss" in row]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "x.pt2"
    main(flags(images, out))
    return out


def test_on_a_gpu_the_host_waits_for_validation_only(images, tmp_path):
    settings = ClassifierSettings.from_command_line("Test.", flags(images, tmp_path / "x.pt2"))
    data = IMAGES[:16], np.zeros(16, np.int64)
    world, amp = World(0, 1, GPU), partial(autocast, GPU, torch.bfloat16)
    with fake_gpu() as gpu:
        with torch.device("cuda"):
            task = ClassifierTask(settings, data, data, 3, {})
        train_steps(task, settings, list(task.batches(0, 0, world)))
        assert not gpu.waits
        task.validate(task.model, 1, world, amp)
    assert len(gpu.waits) == 1


def test_what_a_run_leaves(finished, images, capsys):
    record = ClassifierRecord.read(finished.with_suffix(".json"))
    assert (record.classes, record.images, record.val_images) == (["a", "b", "c"], 40, 40)
    rows = read_metrics(finished.with_suffix(".run"))
    assert len(losses(finished)) == 10 and len([row for row in rows if "val_accuracy" in row]) == 2
    assert record.val_accuracy == [row for row in rows if "val_accuracy" in row][-1]["val_accuracy"]
    before = finished.stat().st_mtime_ns
    main(flags(images, finished))
    assert "is finished already" in capsys.readouterr().out and finished.stat().st_mtime_ns == before


def test_a_damaged_export_is_made_again(finished, images):
    content = finished.read_bytes()
    finished.write_bytes(content[:100])
    main(flags(images, finished))
    assert len(finished.read_bytes()) == len(content) and train_classifier.is_complete(finished)


def test_training_is_a_function_of_its_settings(finished, images, tmp_path):
    torch.rand(1)
    main(flags(images, tmp_path / "same.pt2"))
    assert losses(tmp_path / "same.pt2") == losses(finished)
    main(flags(images, tmp_path / "other.pt2", global_seed=1))
    assert losses(tmp_path / "other.pt2") != losses(finished)


def test_a_run_that_is_cut_off_continues(finished, images, tmp_path, monkeypatch):
    out, loss = tmp_path / "x.pt2", ClassifierTask.loss

    def stop(self, objective, batch, step):
        if step == 7:
            raise ZeroDivisionError
        return loss(self, objective, batch, step)

    monkeypatch.setattr(ClassifierTask, "loss", stop)
    with pytest.raises(ZeroDivisionError):
        main(flags(images, out, ckpt_every=3))
    monkeypatch.undo()
    main(flags(images, out, ckpt_every=3))
    assert losses(out) == losses(finished)


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    with pytest.raises(SystemExit, match=r"(loss|gradient norm) is (nan|inf) at step"):
        main(flags(images, tmp_path / "x.pt2", lr=1e30))
    assert not (tmp_path / "x.pt2").exists()


def test_shifted_repeats_the_border():
    images = torch.from_numpy(IMAGES[:3])
    offsets = torch.tensor([[0, 0], [2, -3], [-1, 20]])
    moved = shifted(images, offsets).numpy()
    padded = np.pad(IMAGES[:3], ((0, 0), (20, 20), (20, 20), (0, 0)), mode="edge")
    for i, (rows, columns) in enumerate(offsets.tolist()):
        assert np.array_equal(moved[i], padded[i, 20 - rows : 36 - rows, 20 - columns : 36 - columns])


def test_augmentation_belongs_to_the_image_and_the_epoch():
    indices, images = np.arange(40), torch.from_numpy(IMAGES)
    both, flip = {"seed": 0, "max_shift": 2, "flip": True}, {"seed": 0, "max_shift": 0, "flip": True}
    whole = augmented(images, indices, 2, **both)
    some = np.array([7, 0, 33])
    assert augmented(images[some], some, 2, **both).equal(whole[some])
    assert not augmented(images, indices, 3, **both).equal(whole)
    assert augmented(images, indices, 2, seed=0, max_shift=0, flip=False).equal(images)
    mirrored = augmented(images, indices, 2, **flip).eq(images.flip(2)).flatten(1).all(1)
    assert 10 < mirrored.sum() < 30


def test_the_export_is_the_classifier():
    model = Classifier(5)
    images = torch.from_numpy(IMAGES)
    for _ in range(5):
        model(images)  # moves the batch norms' statistics
    copy = fused(model)
    assert model.training and not any(isinstance(m, torch.nn.BatchNorm2d) for m in copy.modules())
    for value, expected in zip(copy(images), model.eval()(images), strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_learning_rate(steps):
    rates = [learning_rate(step, steps, 2.0) for step in range(steps)]
    top = rates.index(2.0)
    assert top == steps // 5 and min(rates) > 0
    assert all(a < b for a, b in pairwise(rates[: top + 1])) and all(a > b for a, b in pairwise(rates[top:]))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"global_batch_size": 1}, "--global-batch-size 1: expected at least 2"),
        ({"global_batch_size": 41}, "--global-batch-size 41 is more than the 40 images there are"),
        ({"image_size": 4}, "--image-size 4: expected at least 8"),
        ({"out": "x.pt"}, r"x.pt: expected a name that ends in .pt2"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(images, tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        main(flags(images, changes.pop("out", tmp_path / "x.pt2"), **changes))
    assert not list(tmp_path.iterdir())


def test_images_that_do_not_fit_the_memory_are_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}[name])
    with pytest.raises(InputError, match="80 images of 8192 px take 16 GB of memory, more than half of"):
        main(flags(images, tmp_path / "x.pt2", image_size=8192))
    assert not list(tmp_path.iterdir())


def test_folders_of_other_classes_and_outputs_of_others(images, finished, tmp_path):
    (tmp_path / "val" / "d").mkdir(parents=True)
    Image.fromarray(IMAGES[0]).save(tmp_path / "val" / "d" / "0.png")
    with pytest.raises(InputError, match="different classes: a, b, c in one of them only"):
        main(flags(images, tmp_path / "x.pt2", val_path=tmp_path / "val"))
    (tmp_path / "y.pt2").touch()
    with pytest.raises(InputError, match=r"y.pt2 exists without its run"):
        main(flags(images, tmp_path / "y.pt2"))
    with pytest.raises(InputError, match="is finished and was started with epochs 2, now 3"):
        main(flags(images, finished, epochs=3))


@pytest.mark.parametrize("name", ["two words", "line\nbreak", "a/b", "a(b)", "../x"])
def test_names_are_words(images, tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        main(flags(images, tmp_path / "x.pt2", name=name))
    assert "argument --name: expected letters, digits and ._+- only" in capsys.readouterr().err
