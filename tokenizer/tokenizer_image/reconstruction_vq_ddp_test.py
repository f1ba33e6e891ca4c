"""Reconstruction: the same file and figures on any number of processes, once; skipped images; two commands at once."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.vq_model import VQModel, preset
from utils import checkpoint
from utils.cli import InputError
from utils.distributed import World
from utils.files import file_lock
from utils.samples import Samples
from utils.testing import fill_by_formula, run_script

SCRIPT = "tokenizer/tokenizer_image/reconstruction_vq_ddp.py"


@pytest.fixture(scope="module")
def vq_ckpt(tmp_path_factory):
    config = preset("VQ-4-small", codebook_size=32)
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    model = fill_by_formula(VQModel(config))
    checkpoint.save(path, {"model": model.state_dict(), "config": asdict(config), "vq_model": "VQ-4-small"})
    return path


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(14):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def command(images, vq_ckpt):
    return ("--data-path", images, "--vq-ckpt", vq_ckpt, "--image-size", "16", "--per-proc-batch-size", "4")


@pytest.fixture
def run(command, monkeypatch, capsys):
    """Reconstruct in this process; what was printed."""

    def call(*flags) -> str:
        monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, (*command, *flags))])
        reconstruction_vq_ddp.main()
        return capsys.readouterr().out

    return call


def figures(out: str) -> str:
    return next(line for line in out.splitlines() if "PSNR" in line).split("PSNR")[1]


def test_one_and_two_processes_with_images_that_cannot_be_read(command, images, tmp_path, run):
    """The four of a whole batch, and one more."""
    for i in (0, 2, 4, 6, 10):
        (images / "a" / f"{i:02d}.png").write_bytes(b"none")
    one = run("--out", tmp_path / "one.npz")
    assert "skipped 5 of 14 images that cannot be read: a/00.png" in one
    two = run_script(SCRIPT, *command, "--sample-dir", tmp_path / "dir", processes=2, OMP_NUM_THREADS="1")
    assert two.returncode == 0, two.stderr
    named = tmp_path / "dir" / "VQ-4-small-images-size-16-size-16-codebook-size-32-dim-8-seed-0.npz"
    assert figures(one) == figures(two.stdout)
    a, b = np.load(tmp_path / "one.npz"), np.load(named)
    np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    reference = np.load(named.with_name(f"{named.stem}-reference.npz"))
    for written in (a, b, reference):
        np.testing.assert_array_equal(written["arr_1"], [0] * 2 + [1] * 7)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".parts", ".lock"))]
    error = (reference["arr_0"].astype(float) - b["arr_0"]) / 255
    record = json.loads(named.with_suffix(".json").read_text())
    assert record["mse"] == pytest.approx((error**2).mean())
    assert record["psnr"] == pytest.approx((-10 * np.log10((error**2).mean((1, 2, 3)))).mean())
    assert record["ssim"] < record["ssim_published"] < 1
    assert record["dead_codes"] == round(32 * (1 - record["codebook_usage"])) and record["perplexity"] > 1
    with Image.open(named.with_suffix(".png")) as picture:
        assert picture.width > 8 * 64
    with pytest.raises(InputError, match="leave out --strict"):
        run("--out", tmp_path / "strict.npz", "--strict")


def test_a_part_at_another_size_is_made_once(images, tmp_path, run):
    out = tmp_path / "x.npz"
    flags = ("--image-size-eval", "24", "--num-images", "4", "--out", out)
    run(*flags)
    written = Samples(out)
    assert (written.shape, written.labels.tolist()) == ((4, 24, 24, 3), [0, 0, 1, 1])
    assert "is complete already" in run(*flags, "--per-proc-batch-size", "2")
    record = json.loads((tmp_path / "x.json").read_text())
    assert (record["images"], record["vq_model"]) == (4, "VQ-4-small")
    out.write_bytes(out.read_bytes()[:100])
    assert "wrote" in run(*flags)
    Image.new("RGB", (20, 20)).save(images / "a" / "00.png")
    assert "wrote" in run(*flags), "other images"


def test_what_was_cut_off_resumes_unless_it_was_of_other_settings(tmp_path, run, monkeypatch):
    read, made = reconstruction_vq_ddp.read_crops, []

    def cut_after(batches: int):
        def crops(folder, requests, **options):
            for i, batch in enumerate(read(folder, requests, **options)):
                if i == batches:
                    raise KeyboardInterrupt
                made.append(len(batch.images))
                yield batch

        return crops

    def cut(*flags) -> None:
        monkeypatch.setattr(reconstruction_vq_ddp, "read_crops", cut_after(2))
        with pytest.raises(KeyboardInterrupt):
            run("--out", tmp_path / "cut.npz", *flags)
        monkeypatch.setattr(reconstruction_vq_ddp, "read_crops", cut_after(99))
        made.clear()

    whole = figures(run("--out", tmp_path / "whole.npz"))
    cut()
    part = tmp_path / "cut.parts" / "00000004-00000008.npz"
    part.write_bytes(part.read_bytes()[:-9])
    assert figures(run("--out", tmp_path / "cut.npz", "--per-proc-batch-size", "3")) == whole
    assert made == [3, 3, 3, 1]  # images 4 to 7, whose file was damaged, and those behind
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    cut("--image-size-eval", "24")
    (tmp_path / "cut.parts" / "settings.json").write_text("{")
    assert "wrote" in run("--out", tmp_path / "cut.npz", "--image-size-eval", "32")
    assert made == [4, 4, 4, 2] and Samples(tmp_path / "cut.npz").shape == (14, 32, 32, 3)


def test_the_published_name_is_not_taken_from_another_checkpoint(vq_ckpt, tmp_path, run):
    flags = ("--sample-dir", tmp_path / "dir", "--dataset", "imagenet", "--no-reference", "--num-images", "3")
    out = run(*flags)
    assert "VQ-4-small-imagenet-size-16-size-16-codebook-size-32-dim-8-seed-0.npz" in out
    assert sorted(path.suffix for path in (tmp_path / "dir").iterdir()) == [".json", ".npz", ".png"]
    content = checkpoint.load(vq_ckpt)
    content["model"]["decoder.conv_out.bias"] += 0.1
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(
        InputError, match=r"was made with tokenizer_sha256 .*: give another name by --out, or delete it"
    ):
        run(*flags, "--vq-ckpt", tmp_path / "other.pt")


def test_the_worst_are_drawn_last(tmp_path):
    """The largest error first, whatever part it is in."""
    parts = []
    for i, error in enumerate(([0.1, 0.4], [0.3, 0.2])):
        pixels = np.full((2, 8, 8, 3), 50 * i, np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None, None]
        path = tmp_path / f"{i}.npz"
        np.savez(path, images=np.arange(2), originals=pixels, pixels=pixels + 100, mse=np.array(error))
        parts.append(path)
    reconstruction_vq_ddp.draw_pairs(tmp_path / "pairs.png", parts)
    with Image.open(tmp_path / "pairs.png") as picture:
        rows = [[picture.getpixel((2 + 66 * column + 30, y))[0] for column in range(4)] for y in middles(picture, 4)]
    assert rows == [[0, 1, 50, 51], [100, 101, 150, 151], [1, 50, 51, 0], [101, 150, 151, 100]]


def middles(picture, rows) -> list[int]:
    """A height within the tiles of each row."""
    return [2 + i * (picture.height - 2) // rows + 30 for i in range(rows)]


def test_lpips_where_it_is(run, tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean()

    monkeypatch.setattr(reconstruction_vq_ddp, "LPIPS", Distance)
    out = run("--out", tmp_path / "x.npz", "--lpips")
    arrays = [np.load(tmp_path / f"x{end}.npz")["arr_0"].astype(float) for end in ("", "-reference")]
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["lpips"] == pytest.approx(np.abs(arrays[0] - arrays[1]).mean() / 127.5, rel=1e-4)
    assert f"LPIPS {record['lpips']:.4f}" in out
    assert "wrote" in run("--out", tmp_path / "x.npz", "--no-lpips")
    assert json.loads((tmp_path / "x.json").read_text())["lpips"] is None


def test_wrong_inputs(tmp_path, run, monkeypatch):
    for flags, message in (
        (("--image-size", "18"), "--image-size 18 is no multiple of 4"),
        (("--codebook-size", "64"), "--codebook-size 64, but that of .* is 32"),
        (("--image-size", "4"), "images of 4 px are too small for SSIM, which takes 7 px and more"),
        (("--num-images", "15"), "--num-images 15 is more than the 14 images"),
        (("--out", tmp_path / "x.png"), "expected a name that ends in .npz"),
        (("--out", "/dev/null/x.npz"), "/dev/null is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)
    with (
        file_lock(tmp_path / "x.npz"),
        pytest.raises(InputError, match=r"x\.npz is in use by process \d+ on .*another name"),
    ):
        run("--out", tmp_path / "x.npz")

    def refuse(world, folder):
        raise InputError(f"{folder} is another folder for 1 of 2 processes")

    monkeypatch.setattr(World, "check_shared", refuse)
    with pytest.raises(InputError, match="rec is another folder"):
        run("--out", tmp_path / "rec" / "x.npz")
    assert not (tmp_path / "rec").exists()
