"""The evaluation from images to figures: a reference batch, a classifier, the evaluator; every wrong input refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dataset.images import load_image
from evaluations.c2i import checks, evaluator, reference, train_classifier
from evaluations.c2i.classifier import Classifier, fused
from evaluations.c2i.features import save_network
from evaluations.c2i.inception import InceptionNetwork
from evaluations.c2i.stand_in import write_stand_in
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


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "next-patch-prediction"


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("graph") / "stand-in.pb")


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
        record = json.loads((made / "ref.json").read_text())
        assert (record["images"], record["of"], record["data_path"]) == (120, 240, str(made / "train"))

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
            "name": "colours", "backend": "torch", "file": "net.pt2", "sha256": sha256(made / "net.pt2"),
            "dimensions": 96, "classes": 3,
        }  # fmt: skip
        assert content["samples"] == {
            "file": "val.npz", "sha256": sha256(made / "val.npz"), "images": 60, "precision_recall_images": 60,
            "statistics": "computed", "labels": {"classes": 3, "least": 20, "most": 20},
        }  # fmt: skip
        assert content["reference"]["sha256"] == sha256(made / "ref.npz")
        assert set(content["seconds"]) == {
            "reference_features", "hash", "features", "inception_score", "fid", "precision_recall",
        }  # fmt: skip

        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert sum("fewer than 10 for each of the 96 features" in line for line in warnings) == 2
        assert sum("val.npz holds 60 images, no more than the 96 features" in line for line in warnings) == 1
        assert sum(f"120 of the 120 images of {copy} are images of" in line for line in warnings) == 1
        assert len(warnings) == 4
        assert content["warnings"] == [line.removeprefix("warning: ") for line in warnings if "val.npz" in line or
                                       "ref.npz holds" in line]  # fmt: skip

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
        for module in (evaluator, checks):
            monkeypatch.setattr(module, "SPLIT", 20)
        (tmp_path / "val.npz").write_bytes((made / "val.npz").read_bytes())
        result = call(evaluator, made / "ref.npz", tmp_path / "val.npz", "--network", made / "net.pt2")
        assert "the Inception Score of" in result.stderr and "the images are not in random order" in result.stderr
        found = json.loads((tmp_path / "val.metrics.json").read_text())["metrics"]
        assert found["inception_score"] < 1.2 and found["inception_score_shuffled"] > 2.3
        assert found["inception_score_one_split"] > 2.5

    def test_what_is_measured_is_not_measured_again(self, made, call, tmp_path, monkeypatch):
        """Unless something that it depends on has changed; the reference is measured once in any case."""
        seen = []
        extract = evaluator.extract
        monkeypatch.setattr(evaluator, "extract", lambda *a, **b: (seen.append(a[1].path.name), extract(*a, **b))[1])
        for name in ("a.npz", "b.npz"):
            (tmp_path / name).write_bytes((made / "val.npz").read_bytes())
        given = (made / "ref.npz", tmp_path / "a.npz", tmp_path / "b.npz", "--network", made / "net.pt2")
        first = call(evaluator, *given)
        assert (first.returncode, seen) == (0, ["ref.npz", "a.npz", "b.npz"])
        (tmp_path / "b.metrics.json").write_text("{")
        again = call(evaluator, *given)
        assert seen == ["ref.npz", "a.npz", "b.npz", "b.npz"]
        assert again.stdout == first.stdout.replace("a.npz:", "a.npz: (measured before)", 1)
        (tmp_path / "a.npz").write_bytes((made / "ref.npz").read_bytes())
        call(evaluator, *given)
        assert seen[4:] == ["a.npz"]
        call(evaluator, *given, "--kid")
        assert seen[5:] == ["a.npz", "b.npz"]
        found = json.loads((tmp_path / "b.metrics.json").read_text())["metrics"]
        assert found["kid_deviation"] >= 0 and "KID(colours): " in (tmp_path / "b.txt").read_text()

    def test_a_damaged_cache_is_computed_again(self, made, call, tmp_path, cache):
        (tmp_path / "a.npz").write_bytes((made / "val.npz").read_bytes())
        given = (made / "ref.npz", tmp_path / "a.npz", "--network", made / "net.pt2")
        figures = []
        for _ in range(2):
            assert call(evaluator, *given).returncode == 0
            figures.append((tmp_path / "a.txt").read_text())
            (tmp_path / "a.metrics.json").unlink()
            [entry] = (cache / "references").iterdir()
            entry.write_bytes(entry.read_bytes()[:1000])
        assert figures[0] == figures[1]

    def test_a_sweep_is_drawn(self, made, call, tmp_path):
        rng = np.random.default_rng(0)
        names = [f"model-cfg-{scale}-seed-0.npz" for scale in ("1.0", "1.5", "10.0")]
        for name in names:
            np.savez(tmp_path / name, arr_0=rng.integers(0, 256, (30, 16, 16, 3), np.uint8))
        result = call(evaluator, made / "ref.npz", *(tmp_path / n for n in names), "--network", made / "net.pt2")
        assert f"wrote {tmp_path}/model-cfg-sweep-seed-0.png" in result.stdout
        with Image.open(tmp_path / "model-cfg-sweep-seed-0.png") as image:
            assert image.width > 1000


class TestInception:
    """The published command, with the stand-in's weights."""

    def files(self, folder, **arrays):
        rng = np.random.default_rng(0)
        for name in ("ref", "a"):
            np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (6, 20, 20, 3), np.uint8),
                     **(arrays if name == "ref" else {}))  # fmt: skip
        return folder / "ref.npz", folder / "a.npz"

    def test_the_published_lines(self, graph, call, tmp_path):
        result = call(evaluator, *self.files(tmp_path), "--inception", graph)
        assert result.returncode == 0, result.stderr
        content = json.loads((tmp_path / "a.metrics.json").read_text())
        found = content["metrics"]
        labels = {"Inception Score": "inception_score", "FID": "fid", "sFID": "sfid", "Precision": "precision",
                  "Recall": "recall"}  # fmt: skip
        lines = [f"{label}: {found[key]}" for label, key in labels.items()]
        assert (tmp_path / "a.txt").read_text().splitlines() == lines
        assert result.stdout.splitlines() == [f"{tmp_path / 'a.npz'}:", *lines]
        assert (content["network"]["name"], content["network"]["backend"]) == ("Inception", "torch")
        assert result.stderr.count("no more than the 2048 features") == 2

    def test_statistics_of_the_reference(self, graph, call, tmp_path):
        """They give FID and sFID, here those of the samples themselves; its images give precision and recall."""
        reference, samples = self.files(tmp_path)
        pool, _, spatial = InceptionNetwork(graph)(np.load(samples)["arr_0"])
        arrays = {"mu": pool.mean(0, np.float64), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0, np.float64),
                  "sigma_s": np.cov(spatial.T)}  # fmt: skip
        self.files(tmp_path, **arrays)
        result = call(evaluator, reference, samples, "--inception", graph)
        assert result.returncode == 0, result.stderr
        content = json.loads((tmp_path / "a.metrics.json").read_text())
        assert content["metrics"]["fid"] < 1e-3 and content["metrics"]["sfid"] < 1e-2
        assert content["reference"]["statistics"] == "given"
        assert result.stderr.count("no more than the 2048 features") == 1

        def refused(*parts, **changes):
            (tmp_path / "a.metrics.json").unlink(missing_ok=True)
            self.files(tmp_path, **{k: v for k, v in (arrays | changes).items() if v is not None})
            assert_refused(call(evaluator, reference, samples, "--inception", graph), *parts)

        refused("ref.npz holds mu, but not all of sigma, mu_s and sigma_s", sigma_s=None)
        refused("ref.npz holds mu of 3 values, expected 2048", mu=np.zeros(3), sigma=np.eye(3))
        refused("statistics that cannot be used: NaN or infinity", mu=np.full(2048, np.nan))
        refused("statistics that cannot be used", "shape", mu=np.zeros(3))

    def test_wrong_options(self, graph, call, tmp_path):
        given = self.files(tmp_path)
        assert_refused(call(evaluator, *given, "--inception", tmp_path / "x.pb"), "there is no graph", "x.pb")
        for more in (("--inception", graph), ("--backend", "tensorflow")):
            assert_refused(call(evaluator, *given, "--network", "x.pt2", *more), "--network is another network than")


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
        refused("x.npz holds images of 8x16", "ref.npz of 16x16", "--force", samples=tmp_path / "x.npz")
        forced = ("--force",)  # the network takes one size only
        refused("x.npz holds images of 8x16, but colours", "takes 16x16", samples=tmp_path / "x.npz", more=forced)

    def test_images_of_one_colour(self, refused, made, call, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.full((60, 16, 16, 3), 9, np.uint8))
        refused("the first 60 images of", "x.npz are of one colour each; --force", samples=tmp_path / "x.npz")
        given = (made / "ref.npz", tmp_path / "x.npz", "--network", made / "net.pt2", "--force")
        result = call(evaluator, *given)
        assert result.returncode == 0, result.stderr
        assert "60 of the 60 images of" in result.stderr and "59 of the 60 images of" in result.stderr

    def test_a_network_for_another_size(self, refused, tmp_path):
        save_network(tmp_path / "small.pt2", fused(Classifier(3)), 8, "of-8-px")
        refused("ref.npz holds images of 16x16, but of-8-px", "takes 8x8", network=tmp_path / "small.pt2")

    def test_too_few_images_for_precision(self, refused):
        refused("--pr-images: expected at least 4, got 3", more=("--pr-images", 3))
