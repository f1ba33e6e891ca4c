"""The evaluation from images to figures: a reference batch, a classifier, the evaluator; every wrong input refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dataset.images import load_image
from evaluations.c2i import evaluator, reference, train_classifier
from evaluations.c2i.classifier import Classifier, fused
from evaluations.c2i.features import save_network
from utils import cli, samples
from utils.files import sha256
from utils.samples import Samples
from utils.testing import assert_refused, run_script

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_images(root, each: int, seed: int):
    """`each` noisy images of 20x16 a colour; the ImageFolder's path."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(rng.normal(colour, 40, (20, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which all stages have been run, by their commands: train/, val/, ref.npz, val.npz, net.pt2."""
    root = tmp_path_factory.mktemp("evaluation")
    train, val = write_images(root / "train", 80, 0), write_images(root / "val", 20, 1)
    for command in (
        ["evaluations/c2i/reference.py", train, root / "ref.npz", "--image-size", 16, "--num-images", 120],
        ["evaluations/c2i/train_classifier.py", "--data-path", train, "--val-path", val, "--image-size", 16,
         "--name", "colours", "--out", root / "net.pt2", "--epochs", 1, "--batch-size", 8],
    ):  # fmt: skip
        result = run_script(*command)
        assert result.returncode == 0, result.stderr
    images = [load_image(path, 16) for path in sorted(val.rglob("*.png"))]
    samples.write(root / "val.npz", [np.stack(images)], (60, 16, 16, 3), np.arange(60) // 20)
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """Run an entry point's main in this process, as its command would."""

    def run(module, *arguments) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
        status = 0
        try:
            cli.run(module.main)
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, said.out, said.err)

    return run


class TestReference:
    def test_evenly_spaced_centre_crops(self, made):
        batch = Samples(made / "ref.npz")
        assert batch.shape == (120, 16, 16, 3)
        assert np.array_equal(batch.labels, np.arange(120) // 40)
        paths = sorted((made / "train").rglob("*.png"))
        expected = [np.array(Image.open(path))[2:18] for path in paths[::2]]
        assert np.array_equal(np.concatenate(list(batch.batches(50))), expected)

    def test_what_is_there_is_left_alone(self, made, call):
        before = (made / "ref.npz").stat().st_mtime_ns
        given = (made / "train", made / "ref.npz", "--image-size", 16, "--num-images", 120)
        assert "ref.npz is complete already" in call(reference, *given).stdout
        other = "ref.npz holds 120 images of 16x16"
        assert_refused(call(reference, *given[:-1], 60), other, "asked for are 60 of 16x16", "delete it")
        assert_refused(call(reference, *given[:-3], 8, *given[-2:]), other, "asked for are 120 of 8x8")
        write_images(made / "one" / "two", 40, 0)
        assert_refused(call(reference, made / "one", *given[1:]), other, "with other labels")
        assert (made / "ref.npz").stat().st_mtime_ns == before

    def test_wrong_inputs(self, made, call, tmp_path):
        given = (made / "val", tmp_path / "x.npz")
        assert_refused(call(reference, *given, "--num-images", 61), "--num-images 61 is more than the 60 images in")
        assert_refused(call(reference, tmp_path / "nowhere", *given[1:]), "there is no folder")
        assert_refused(call(reference, made / "val", tmp_path / "x"), "expected a name that ends in .npz")
        assert_refused(call(reference, *given, "--num-images", 0), "at least 1, got 0")
        write_images(tmp_path / "images", 2, 0)
        (tmp_path / "images" / "red" / "001.png").write_bytes(b"none")
        assert_refused(call(reference, tmp_path / "images", *given[1:]), "red/001.png cannot be read as an image")
        assert not given[1].exists()


class TestTrainClassifier:
    def test_what_it_leaves(self, made):
        record = json.loads((made / "net.json").read_text())
        assert record["val_accuracy"] > 0.95
        assert record["classes"] == ["blue", "green", "red"]
        assert record["sha256"] == sha256(made / "net.pt2")
        assert record["settings"]["name"] == "colours"

    def test_what_is_there_is_left_alone(self, made, call):
        given = {"--data-path": made / "train", "--val-path": made / "val", "--image-size": 16, "--name": "colours",
                 "--out": made / "net.pt2", "--epochs": 1, "--batch-size": 8}  # fmt: skip

        def words(**changes):
            return [word for pair in (given | {f"--{k}": v for k, v in changes.items()}).items() for word in pair]

        assert "net.pt2 is complete already" in call(train_classifier, *words()).stdout
        refused = call(train_classifier, *words(epochs=2, seed=1))
        assert_refused(refused, "net.pt2 was trained with other settings (epochs 1, now 2; seed 0, now 1)")
        assert_refused(call(train_classifier, *words(out=made / "net.pt")), "ends in .pt2, got")
        assert_refused(call(train_classifier, *words(name="two words")), "--name: expected letters")


class TestEvaluator:
    def test_figures_of_several_files(self, made):
        """By the command: lines a file, a table, and what is left beside the samples."""
        copy = made / "cfg-2.0-copy.npz"
        copy.write_bytes((made / "ref.npz").read_bytes())
        command = ["evaluations/c2i/evaluator.py", made / "ref.npz", made / "val.npz", copy]
        result = run_script(*command, "--network", made / "net.pt2")
        assert result.returncode == 0, result.stderr
        lines = (made / "val.txt").read_text().splitlines()
        names = ("Inception Score", "FID", "Precision", "Recall", "Class accuracy")
        assert [line.partition(": ")[0] for line in lines] == [f"{name}(colours)" for name in names]
        assert "\n".join(lines) in result.stdout
        assert "In the features of colours:" in result.stdout
        assert result.stdout.splitlines()[-1].split() == ["120", *self.cells(copy), copy.name]

        same = json.loads(copy.with_suffix(".metrics.json").read_text())["metrics"]
        assert same["fid"] < 1e-9 and (same["precision"], same["recall"]) == (1, 1)
        content = json.loads((made / "val.metrics.json").read_text())
        found = content["metrics"]
        assert 0 < found["fid"] < 96 and 2.5 < found["inception_score"] < 3.01
        assert 0.3 < found["precision"] <= 1 and 0.3 < found["recall"] <= 1
        assert found["class_accuracy"] == json.loads((made / "net.json").read_text())["val_accuracy"]
        assert content["network"] == {
            "name": "colours", "file": "net.pt2", "sha256": sha256(made / "net.pt2"), "dimensions": 96, "classes": 3,
        }  # fmt: skip
        assert content["samples"] == {
            "file": "val.npz", "sha256": sha256(made / "val.npz"), "images": 60, "precision_recall_images": 60,
        }  # fmt: skip
        assert content["reference"]["sha256"] == sha256(made / "ref.npz")
        assert set(content["seconds"]) == {
            "reference_features", "features", "inception_score", "fid", "precision_recall",
        }  # fmt: skip

        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert sum("fewer than 10 for each of the 96 features" in line for line in warnings) == 3
        assert sum(f"{copy} is the reference, byte for byte" in line for line in warnings) == 1
        assert len(warnings) == 4

    @staticmethod
    def cells(path) -> list[str]:
        return [line.split()[-1] for line in path.with_suffix(".txt").read_text().splitlines()]

    def test_figures_do_not_depend_on_the_batch_size(self, made, call, tmp_path):
        found = []
        for batch_size in (7, 256):
            (tmp_path / "val.npz").write_bytes((made / "val.npz").read_bytes())
            arguments = (made / "ref.npz", tmp_path / "val.npz", "--network", made / "net.pt2")
            assert call(evaluator, *arguments, "--batch-size", batch_size).returncode == 0
            found.append(json.loads((tmp_path / "val.metrics.json").read_text())["metrics"])
        assert found[0] == pytest.approx(found[1], rel=1e-4)

    def test_precision_and_recall_of_a_part(self, made, call, tmp_path):
        (tmp_path / "val.npz").write_bytes((made / "val.npz").read_bytes())
        result = call(
            evaluator, made / "ref.npz", tmp_path / "val.npz", "--network", made / "net.pt2", "--pr-images", 30
        )
        assert result.returncode == 0, result.stderr
        content = json.loads((tmp_path / "val.metrics.json").read_text())
        assert content["samples"]["precision_recall_images"] == content["reference"]["precision_recall_images"] == 30

    @pytest.mark.parametrize("labels", [None, np.arange(60), np.arange(60) - 1])
    def test_labels_that_are_no_classes_of_the_network(self, made, call, tmp_path, labels):
        images = next(Samples(made / "val.npz").batches(60))
        np.savez(tmp_path / "x.npz", **{"arr_0": images} | ({} if labels is None else {"arr_1": labels}))
        result = call(evaluator, made / "ref.npz", tmp_path / "x.npz", "--network", made / "net.pt2")
        assert result.returncode == 0, result.stderr
        assert "class_accuracy" not in json.loads((tmp_path / "x.metrics.json").read_text())["metrics"]
        assert "Class accuracy" not in result.stdout

    def test_trap_samples_sorted_by_class(self, made, call, tmp_path, monkeypatch):
        """Splits in order see some of the classes only: said, with the figure of shuffled samples beside it."""
        monkeypatch.setattr(evaluator, "SPLIT", 20)
        (tmp_path / "val.npz").write_bytes((made / "val.npz").read_bytes())
        result = call(evaluator, made / "ref.npz", tmp_path / "val.npz", "--network", made / "net.pt2")
        assert "val.npz is sorted by class, so its Inception Score" in result.stderr
        found = json.loads((tmp_path / "val.metrics.json").read_text())["metrics"]
        assert found["inception_score"] < 1.2 and found["inception_score_shuffled"] > 2.3


class TestRefusals:
    """Before any work: nothing is written."""

    @pytest.fixture
    def refused(self, made, call, tmp_path):
        def check(*parts, reference=made / "ref.npz", samples=made / "val.npz", network=made / "net.pt2", more=()):
            before = sorted(tmp_path.iterdir())
            assert_refused(call(evaluator, reference, samples, "--network", network, *more), *parts)
            assert sorted(tmp_path.iterdir()) == before

        return check

    def test_by_the_command(self, made, tmp_path):
        result = run_script(
            "evaluations/c2i/evaluator.py", made / "ref.npz", tmp_path / "x.npz", "--network", made / "net.pt2"
        )
        assert_refused(result, "there is no samples file", "x.npz")

    def test_missing(self, refused, tmp_path):
        refused("there is no samples file", "x.npz", samples=tmp_path / "x.npz")
        refused("there is no samples file", "x.npz", reference=tmp_path / "x.npz")
        refused("there is no network", "x.pt2", network=tmp_path / "x.pt2")

    def test_not_an_npz(self, refused, made, tmp_path):
        refused("expected a file that ends in .npz, got", "train", samples=made / "train")
        (tmp_path / "x.npz").write_text("<html>")
        refused("x.npz is damaged or not an .npz file", reference=tmp_path / "x.npz")

    def test_truncated(self, refused, made, tmp_path):
        (tmp_path / "x.npz").write_bytes((made / "val.npz").read_bytes()[:-100])
        refused("x.npz is damaged or not an .npz file", samples=tmp_path / "x.npz")
        (tmp_path / "x.pt2").write_bytes((made / "net.pt2").read_bytes()[:-100])
        refused("x.pt2 is damaged, truncated or not a .pt2 file", network=tmp_path / "x.pt2")

    def test_no_images(self, refused, tmp_path):
        np.savez(tmp_path / "x.npz", images=np.zeros((60, 16, 16, 3), np.uint8))
        refused("x.npz holds images.npy; expected arr_0", samples=tmp_path / "x.npz")
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((60, 16, 16, 3), np.float32))
        refused("arr_0 is float32", "expected uint8", samples=tmp_path / "x.npz")
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
        refused("x.npz holds 3 images; expected at least 4", samples=tmp_path / "x.npz")

    def test_sizes_that_differ(self, refused, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((60, 8, 16, 3), np.uint8))
        refused("x.npz holds images of 8x16", "ref.npz of 16x16", samples=tmp_path / "x.npz")

    def test_a_network_for_another_size(self, refused, tmp_path):
        save_network(tmp_path / "small.pt2", fused(Classifier(3)), 8, "of-8-px")
        refused("ref.npz holds images of 16x16, but of-8-px", "takes 8x8", network=tmp_path / "small.pt2")

    def test_too_few_images_for_precision(self, refused):
        refused("--pr-images: expected at least 4, got 3", more=("--pr-images", 3))
