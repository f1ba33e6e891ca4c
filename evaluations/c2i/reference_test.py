"""References: which pixels, what is skipped, and when an existing file is the one that is asked for."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset.crops import center_crop, decode
from evaluations.c2i import reference
from utils.cli import InputError
from utils.files import file_lock
from utils.samples import Samples


def write_images(root, seed=0, each=8):
    rng = np.random.default_rng(seed)
    for name in "abc":
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            Image.fromarray(rng.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def run(monkeypatch, capsys):
    """Make a reference in this process; what was printed."""

    def call(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["reference", *map(str, arguments)])
        reference.main()
        return capsys.readouterr().out

    return call


def test_evenly_spaced_centre_crops(images, tmp_path, run):
    out = tmp_path / "ref.npz"
    run(images, out, "--image-size", 16, "--num-images", 12)
    batch = Samples(out)
    assert batch.shape == (12, 16, 16, 3)
    assert np.array_equal(batch.labels, np.arange(12) // 4)
    expected = np.stack([center_crop(decode(path), 16) for path in sorted(images.rglob("*.png"))[::2]])
    assert np.array_equal(np.concatenate(list(batch.batches(5))), expected)
    record = json.loads((tmp_path / "ref.json").read_text())
    assert (record["images"], record["of"], record["data_path"]) == (12, 24, str(images))
    assert (record["classes"], record["skipped"], record["bytes"]) == (["a", "b", "c"], [], out.stat().st_size)


def test_only_the_same_reference_is_complete_already(images, tmp_path, run):
    out = tmp_path / "ref.npz"
    given = (out, "--image-size", 16, "--num-images", 12)
    run(images, *given)
    before = out.read_bytes()
    images.rename(tmp_path / "moved")
    assert "ref.npz is complete already" in run(tmp_path / "moved", *given)
    for arguments, message in (
        ((tmp_path / "moved", out, "--image-size", 16), r"other settings \(chosen 12, now 24\)"),
        ((tmp_path / "moved", out, "--image-size", 8, "--num-images", 12), r"image_size 16, now 8"),
        ((tmp_path / "moved", *given, "--background", "black"), r"background white, now black"),
        ((write_images(tmp_path / "others", 1), *given), r"other images \(content_id"),
    ):
        with pytest.raises(InputError, match=rf"ref\.npz is of .*{message}.*: delete it or give another name"):
            run(*arguments)
    assert out.read_bytes() == before
    out.write_bytes(before[:100])
    with pytest.raises(InputError, match=r"ref\.npz is damaged"):
        run(tmp_path / "moved", *given)
    out.write_bytes(before)
    (tmp_path / "ref.json").write_text("{")
    with pytest.raises(InputError, match=r"ref\.json is damaged or not a record"):
        run(tmp_path / "moved", *given)
    (tmp_path / "ref.json").unlink()
    with pytest.raises(InputError, match="without its record"):
        run(tmp_path / "moved", *given)


def test_unreadable_images_are_skipped_and_listed_or_stop_it(images, tmp_path, run):
    (images / "b" / "3.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"b/3\.png cannot be read as an image .*leave out --strict"):
        run(images, tmp_path / "ref.npz", "--image-size", 16, "--strict")
    assert not list(tmp_path.glob("*.npz"))
    out = run(images, tmp_path / "ref.npz", "--image-size", 16)
    assert "skipped 1 of 24 images that cannot be read: b/3.png (no image of a known format)" in out
    assert Samples(tmp_path / "ref.npz").labels.tolist() == [0] * 8 + [1] * 7 + [2] * 8
    assert json.loads((tmp_path / "ref.json").read_text())["skipped"][0]["path"] == "b/3.png"
    assert "is complete already" in run(images, tmp_path / "ref.npz", "--image-size", 16)
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 24 images"):
        run(images, tmp_path / "other.npz", "--image-size", 16)


def test_wrong_inputs(images, tmp_path, run):
    for arguments, message in (
        ((tmp_path / "x.npz", "--num-images", 25), "--num-images 25 is more than the 24 images in"),
        ((tmp_path / "x",), "expected a name that ends in .npz"),
        (("/dev/null/x.npz",), "/dev/null is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            run(images, *arguments)
    with file_lock(tmp_path / "x.npz"), pytest.raises(InputError, match="in use by process"):
        run(images, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
