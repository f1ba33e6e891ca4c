"""The evaluation from images to figures: a reference batch, a classifier, the evaluator; every wrong input refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dataset.crops import center_crop, decode
from evaluations.c2i import checks, evaluator, report
from evaluations.c2i.classifier import Classifier, fused
from evaluations.c2i.inception import load_inception
from evaluations.c2i.testdata.stand_in import write_stand_in
from utils import cli, samples
from utils.files import file_lock, sha256
from utils.networks import save_network
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
         "--name", "colours", "--out", root / "net.pt2", "--epochs", 1, "--global-batch-size", 8],
    ):  # fmt: skip
        result = run_script(*command)
        assert result.returncode == 0, result.stderr
    images = [center_crop(decode(path), 16) for path in sorted(val.rglob("*.png"))]
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


@pytest.fixture
def measured(made, call, tmp_path):
    """Measure samples, by default a copy of val.npz, as they must: what was printed, and the record beside them."""

    def run(*flags, samples=None, reference=made / "ref.npz") -> tuple[subprocess.CompletedProcess, dict]:
        if samples is None:
            samples = tmp_path / "val.npz"
            samples.write_bytes((made / "val.npz").read_bytes())
        result = call(evaluator, reference, samples, "--network", made / "net.pt2", *flags)
        assert result.returncode == 0, result.stderr
        return result, json.loads(samples.with_name(f"{samples.name.removesuffix('.npz')}.metrics.json").read_text())

    return run


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

    def test_figures_do_not_depend_on_the_batch_size(self, measured, tmp_path):
        found = []
        for batch_size in (7, 256):
            found.append(measured("--batch-size", batch_size)[1]["metrics"])
            (tmp_path / "val.metrics.json").unlink()
        assert found[0] == pytest.approx(found[1], rel=1e-4)

    def test_precision_and_recall_of_a_part(self, measured):
        _, content = measured("--pr-images", 30)
        assert content["samples"]["precision_recall_images"] == content["reference"]["precision_recall_images"] == 30

    @pytest.mark.parametrize("labels", [None, np.arange(60), np.arange(60) - 1])
    def test_labels_that_are_no_classes_of_the_network(self, made, measured, tmp_path, labels):
        images = next(Samples(made / "val.npz").batches(60))
        np.savez(tmp_path / "x.npz", **{"arr_0": images} | ({} if labels is None else {"arr_1": labels}))
        result, content = measured(samples=tmp_path / "x.npz")
        assert "class_accuracy" not in content["metrics"] and "Class accuracy" not in result.stdout

    @pytest.mark.parametrize("labels", [None, np.eye(60), np.array(["a"] * 60)])
    def test_labels_that_cannot_be_used_are_ignored(self, made, measured, tmp_path, labels):
        np.savez(tmp_path / "x.npz", next(Samples(made / "val.npz").batches(60)), labels)
        result, content = measured(samples=tmp_path / "x.npz")
        assert result.stderr.count(f"warning: the labels of {tmp_path / 'x.npz'} are ignored") == 1
        assert "class_accuracy" not in content["metrics"] and "are ignored" in content["warnings"][1]

    def test_folders_of_images(self, made, measured, tmp_path):
        """Flat ones; the figures are those of an .npz of the same images."""
        images, figures = next(Samples(made / "val.npz").batches(60)), []
        for name in ("ref", "val.b"):
            (tmp_path / name).mkdir()
            for i, image in enumerate(images if name == "val.b" else images[::-1] // 2):
                Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
        np.savez(tmp_path / "ref.npz", images[::-1] // 2)
        np.savez(tmp_path / "val.b.npz", images)
        for suffix in ("", ".npz"):
            _, content = measured(samples=tmp_path / f"val.b{suffix}", reference=tmp_path / f"ref{suffix}")
            figures.append(content["metrics"])
            (tmp_path / "val.b.metrics.json").unlink()
        assert figures[0] == figures[1]

    def test_trap_samples_sorted_by_class(self, measured, monkeypatch):
        """Splits in order see some of the classes only: said, with the figure of shuffled samples beside it."""
        for module in (evaluator, checks):
            monkeypatch.setattr(module, "SPLIT", 20)
        result, content = measured()
        assert "the Inception Score of" in result.stderr and "the images are not in random order" in result.stderr
        found = content["metrics"]
        assert found["inception_score"] < 1.2 and found["inception_score_shuffled"] > 2.3
        assert found["inception_score_one_split"] > 2.5

    @pytest.mark.parametrize("damage", ["{", "[]", '{"metrics": {"fid": "x"}}'])
    def test_what_is_measured_is_not_measured_again(self, made, call, tmp_path, monkeypatch, damage):
        """Unless something that it depends on has changed; the reference is measured once in any case."""
        seen = []
        extract = evaluator.extract
        monkeypatch.setattr(evaluator, "extract", lambda *a, **b: (seen.append(a[1].path.name), extract(*a, **b))[1])
        for name in ("a.npz", "b.npz"):
            (tmp_path / name).write_bytes((made / "val.npz").read_bytes())
        given = (made / "ref.npz", tmp_path / "a.npz", tmp_path / "b.npz", "--network", made / "net.pt2")
        first = call(evaluator, *given)
        assert (first.returncode, seen) == (0, ["ref.npz", "a.npz", "b.npz"])
        (tmp_path / "b.metrics.json").write_text(damage)
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

    def test_a_damaged_cache_is_computed_again(self, measured, tmp_path, cache):
        figures = []
        for _ in range(2):
            figures.append(measured()[1]["metrics"])
            (tmp_path / "val.metrics.json").unlink()
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
        lines = [f"{report.LABELS[key]}: {found[key]}" for key in list(report.LABELS)[:5]]
        assert (tmp_path / "a.txt").read_text().splitlines() == lines
        assert result.stdout.splitlines() == [f"{tmp_path / 'a.npz'}:", *lines]
        assert (content["network"]["name"], content["network"]["backend"]) == ("Inception", "torch")
        assert result.stderr.count("no more than the 2048 features") == 2

    def test_statistics_of_the_reference(self, graph, call, tmp_path):
        """They give FID and sFID, here those of the samples themselves; its images give precision and recall."""
        reference, samples = self.files(tmp_path)
        pool, _, spatial = load_inception(graph)(np.load(samples)["arr_0"])
        arrays = {"mu": pool.mean(0, np.float64), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0, np.float64),
                  "sigma_s": np.cov(spatial.T)}  # fmt: skip
        self.files(tmp_path, **arrays)
        result = call(evaluator, reference, samples, "--inception", graph)
        assert result.returncode == 0, result.stderr
        content = json.loads((tmp_path / "a.metrics.json").read_text())
        assert content["metrics"]["fid"] < 1e-3 and content["metrics"]["sfid"] < 1e-2
        assert content["reference"]["statistics"] == "given"
        assert result.stderr.count("no more than the 2048 features") == 1

        figures = ("Inception Score", "FID", "sFID")  # and without images, as other projects leave them
        for n, more in ((4, "precision, recall"), (2, "sFID, precision, recall")):
            np.savez(reference, **dict(list(arrays.items())[:n]))
            alone = call(evaluator, reference, samples, "--inception", graph)
            assert f"ref.npz holds statistics and no images: {more} and KID cannot be measured" in alone.stderr
            lines = (tmp_path / "a.txt").read_text().splitlines()
            assert [line.partition(": ")[0] for line in lines] == list(figures[: 2 + n // 4])
            assert lines[1] in result.stdout

        def refused(*parts, **changes):
            (tmp_path / "a.metrics.json").unlink(missing_ok=True)
            self.files(tmp_path, **{k: v for k, v in (arrays | changes).items() if v is not None})
            assert_refused(call(evaluator, reference, samples, "--inception", graph), *parts)

        refused("ref.npz holds mu, but not all of sigma, mu_s and sigma_s", sigma_s=None)
        refused("ref.npz holds mu of float64 and shape (3,), expected numbers of shape (2048,)", mu=np.zeros(3))
        refused("statistics that cannot be used: NaN or infinity", mu=np.full(2048, np.nan))

    def test_wrong_options(self, graph, call, tmp_path):
        given = self.files(tmp_path)
        assert_refused(call(evaluator, *given, "--inception", tmp_path / "x.pb"), "there is no graph", "x.pb")
        for more in (("--inception", graph), ("--backend", "tensorflow")):
            assert_refused(call(evaluator, *given, "--network", "x.pt2", *more), "--network is another network than")


def array(value):
    """A maker of an .npz with this value as arr_0."""
    return lambda path, made: np.savez(path, arr_0=value)


def cut(name):
    """A maker of a file that lacks its last bytes."""
    return lambda path, made: path.write_bytes((made / name).read_bytes()[:-100])


def folder(*sizes):
    """A maker of a folder of images of these sizes; one of None is no image."""

    def make(path, made):
        path.mkdir()
        for i, size in enumerate(sizes):
            image = path / f"{i}.png"
            Image.new("RGB", size).save(image) if size else image.write_bytes(b"none")

    return make


NOISE = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
STATISTICS = {"mu": np.zeros(3), "sigma": np.eye(3)}


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
        result = run_script("evaluations/c2i/evaluator.py", made / "ref.npz", tmp_path / "x.npz")
        assert_refused(result, "there is no samples file", "x.npz")

    @pytest.mark.parametrize(
        ("argument", "name", "make", "message"),
        [
            ("samples", "x.npz", None, "there is no samples file"),
            ("reference", "x.npz", None, "there is no samples file"),
            ("network", "x.pt2", None, "there is no network"),
            ("samples", "x.png", None, "expected a file that ends in .npz, or a folder of images, got"),
            ("reference", "x.npz", cut("ref.npz"), "is damaged or not an .npz file"),
            ("network", "x.pt2", cut("net.pt2"), "is damaged, truncated or not a .pt2 file"),
            ("samples", "x.npz", array(NOISE / 255), "arr_0 is float64"),
            ("samples", "x.npz", array(NOISE[:3]), "holds 3 images; expected at least 4"),
            ("samples", "x.npz", array(NOISE[:, :8]), "holds images of 8x16"),
            ("samples", "x.npz", array(np.full_like(NOISE, 9)), "are of one colour each; --force"),
            ("samples", "x.npz", lambda path, _: np.savez(path, **STATISTICS), "as a reference for FID only"),
            ("reference", "x.npz", lambda path, _: np.savez(path, **STATISTICS), "statistics of Inception's features"),
            ("network", "x.pt2", lambda path, _: save_network(path, fused(Classifier(3)), 8, "small"), "takes 8x8"),
            ("samples", "x", folder(), "x"),
            ("samples", "x", folder((16, 16), (16, 18)), "images of different sizes: 0.png is 16x16, 1.png 16x18"),
            (
                "samples",
                "x",
                folder(*[(16, 18)] * 4),
                "compare images of one size (python -m evaluations.c2i.reference",
            ),
            ("reference", "x", folder((16, 16), None), "1.png cannot be read as an image"),
        ],
    )
    def test_inputs(self, refused, made, tmp_path, argument, name, make, message):
        if make:
            make(tmp_path / name, made)
        refused(name, message, **{argument: tmp_path / name})

    def test_settings(self, refused, made):
        refused("--pr-images: expected at least 4, got 3", more=("--pr-images", 3))
        with pytest.raises(
            ValueError, match=r"two of the samples would leave their figures in .*val\.txt: name each once"
        ):
            evaluator.EvaluatorSettings(reference=made / "ref.npz", samples=[made / "val.npz", made / "val.npz"])

    def test_places(self, refused, made, tmp_path):
        samples = tmp_path / "x.npz"
        samples.write_bytes((made / "val.npz").read_bytes())
        with file_lock(tmp_path / "x.metrics.json"):
            refused("x.metrics.json is in use by process", "wait for it", samples=samples)
        (tmp_path / "x.txt").mkdir()
        refused("x.txt is a folder; expected the name of a file to write", samples=samples)

    def test_several_processes(self, refused, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(cli, "one_of_several", lambda: False)
        refused("the evaluator is one process: start it without torchrun")

    def test_force(self, refused, made, call, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=NOISE[:, :8])  # the network takes one size only
        refused("x.npz holds images of 8x16, but colours", samples=tmp_path / "x.npz", more=("--force",))
        np.savez(tmp_path / "x.npz", arr_0=np.full_like(NOISE, 9))
        result = call(evaluator, made / "ref.npz", tmp_path / "x.npz", "--network", made / "net.pt2", "--force")
        assert result.returncode == 0, result.stderr
        assert "60 of the 60 images of" in result.stderr and "59 of the 60 images of" in result.stderr
