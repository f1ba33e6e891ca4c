"""Extraction: the codes of every view in both layouts, any number of processes, a run that was cut off, wrong inputs."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.codes import Codes
from dataset.codes.toy import unfinish
from dataset.images import VIEWS, ImageFolder, cut_views, load_image
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import PRESETS, VQModel, preset
from utils import checkpoint
from utils.pixels import to_float
from utils.testing import assert_refused, fill_by_formula, run_script

SCRIPT = "autoregressive/train/extract_codes_c2i.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven pictures of several shapes in three classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(11):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8))
        small.resize((20 + 3 * i, 50 - 2 * i), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def vq_ckpt(tmp_path_factory):
    """A small tokenizer as vq_train.py writes it."""
    config = preset("VQ-4-small", codebook_size=300)
    model = fill_by_formula(VQModel(config))
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    checkpoint.save(path, {"model": model.state_dict(), "config": asdict(config), "vq_model": "VQ-4-small"})
    return path


def extract(images, vq_ckpt, code_path, *flags, **options):
    return run_script(
        SCRIPT, "--data-path", images, "--vq-ckpt", vq_ckpt, "--code-path", code_path, "--dataset", "toy",
        "--image-size", "16", "--shard-size", "4", "--batch-size", "8", *flags, **options,
    )  # fmt: skip


def views_of(path, size: int, mode: str, crop_range: float = 1.1) -> torch.Tensor:
    """(views, size, size, 3) uint8."""
    side = int(size * crop_range) if mode == "ten-crop" else size
    return cut_views(torch.from_numpy(load_image(path, side))[None], size, mode)[0]


def one_by_one(images, vq_ckpt, mode: str, crop_range: float = 1.1) -> np.ndarray:
    """(images, views, tokens): each view encoded on its own."""
    tokenizer, _ = load_tokenizer(vq_ckpt)
    views = [views_of(path, 16, mode, crop_range) for path in ImageFolder(images).paths]
    with torch.inference_mode():
        return np.array([[tokenizer.encode(to_float(v[None])).flatten().numpy() for v in image] for image in views])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("flip", ()), ("single", ("--no-flip",)), ("ten-crop", ("--ten-crop", "--crop-range", "1.1"))],
)
@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_codes_are_those_of_each_view(images, vq_ckpt, tmp_path, mode, flags, layout):
    result = extract(images, vq_ckpt, tmp_path, *flags, "--layout", layout)
    assert result.returncode == 0, result.stderr
    expected, folder = one_by_one(images, vq_ckpt, mode), ImageFolder(images)
    codes = Codes(tmp_path, "toy", 16)
    assert (len(codes), codes.views, codes.tokens) == (11, VIEWS[mode], 16)
    for view in range(codes.views):
        got, labels = codes.batch(np.arange(11), np.full(11, view))
        assert np.array_equal(got, expected[:, view])
        assert np.array_equal(labels, folder.labels)
    m = codes.manifest
    assert (m.codebook_size, m.classes, m.vq_model, m.view_mode) == (300, ["a", "b", "c"], "VQ-4-small", mode)
    first = np.load(tmp_path / "toy16_codes" / ("00000.npy" if layout == "packed" else "0.npy"))
    assert (first.dtype, len(first)) == ((np.uint16, 4) if layout == "packed" else (np.int64, 1))


def test_a_run_that_was_cut_off_is_completed_to_the_same_bytes_by_any_number_of_processes(images, vq_ckpt, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for root in (whole, cut):
        assert extract(images, vq_ckpt, root).returncode == 0
    unfinish(cut, "toy16")
    (cut / "toy16_codes" / "00001.npy").unlink()
    (cut / "toy16_labels" / "00002.npy").unlink()
    kept = (cut / "toy16_codes" / "00000.npy").stat().st_mtime_ns
    result = extract(images, vq_ckpt, cut, "--batch-size", "3", "--num-workers", "1", processes=2)
    assert result.returncode == 0, result.stderr
    assert contents(cut) == contents(whole)
    assert (cut / "toy16_codes" / "00000.npy").stat().st_mtime_ns == kept
    assert "is complete already" in extract(images, vq_ckpt, cut).stdout


def test_a_published_tokenizer_by_the_published_command(images, tmp_path):
    """A file without a config, wrapped as published, is VQ-16 unless --vq-model says otherwise."""
    path, few = tmp_path / "vq_ds16_c2i.pt", tmp_path / "few"
    (few / "n0").mkdir(parents=True)
    (few / "n0" / "x.png").write_bytes(Path(ImageFolder(images).paths[0]).read_bytes())
    model = fill_by_formula(VQModel(PRESETS["VQ-16"])).eval()
    torch.save({"model": model.state_dict(), "args": Namespace(vq_model="VQ-16")}, path)
    flags = ("--vq-ckpt", path, "--data-path", few, "--image-size", "32", "--ten-crop", "--crop-range", "1.1")
    result = run_script(SCRIPT, *flags, "--code-path", tmp_path / "codes")
    assert result.returncode == 0, result.stderr
    views = views_of(few / "n0" / "x.png", 32, "ten-crop")
    with torch.inference_mode():
        expected = model.encode(to_float(views)).flatten(1)
    codes = np.load(tmp_path / "codes" / "imagenet32_codes" / "00000.npy")
    assert np.array_equal(codes[0], expected)
    refused = run_script(SCRIPT, *flags, "--code-path", tmp_path / "other", "--vq-model", "VQ-8")
    assert_refused(refused, "loaded as VQ-8) does not fit", "encoder.conv_blocks")
    assert not (tmp_path / "other").exists()


class TestWrongInputs:
    def refused(self, images, vq_ckpt, tmp_path, flags, *parts):
        assert_refused(extract(images, vq_ckpt, tmp_path / "out", *flags), *parts)
        assert not (tmp_path / "out").exists()

    def test_flags(self, images, vq_ckpt, tmp_path):
        self.refused(images, vq_ckpt, tmp_path, ("--image-size", "18"), "--image-size 18", "multiple")
        flags = ("--ten-crop", "--crop-range", "0.9")
        self.refused(images, vq_ckpt, tmp_path, flags, "--crop-range 0.9", "at least 1")

    def test_folders(self, vq_ckpt, tmp_path):
        self.refused(tmp_path / "nowhere", vq_ckpt, tmp_path, (), "there is no folder", "nowhere")
        (tmp_path / "images" / "empty").mkdir(parents=True)
        self.refused(tmp_path / "images", vq_ckpt, tmp_path, (), "no images in class folder empty")

    def test_truncated_tokenizer(self, images, vq_ckpt, tmp_path):
        broken = tmp_path / "broken.pt"
        broken.write_bytes(vq_ckpt.read_bytes()[:4000])
        self.refused(images, broken, tmp_path, (), "broken.pt", "truncated")

    @pytest.mark.parametrize(("workers", "processes"), [("0", 1), ("1", 1), ("0", 2)])
    def test_strict_names_the_first_image_that_is_unreadable(self, images, vq_ckpt, tmp_path, workers, processes):
        """Also by the second of two processes, which has it in its shard."""
        (tmp_path / "a").mkdir()
        source = Path(ImageFolder(images).paths[0]).read_bytes()
        for i in range(5):
            (tmp_path / "a" / f"{i}.png").write_bytes(source if i < 4 else source[:-40])
        flags = ("--num-workers", workers, "--strict")
        result = extract(tmp_path, vq_ckpt, tmp_path / "out", *flags, processes=processes)
        assert_refused(result, "4.png cannot be read as an image", "leave out --strict")

    def test_a_lost_shard_is_restored_by_the_same_command(self, images, vq_ckpt, tmp_path):
        assert extract(images, vq_ckpt, tmp_path).returncode == 0
        whole = contents(tmp_path)
        (tmp_path / "toy16_codes" / "00001.npy").unlink()
        assert extract(images, vq_ckpt, tmp_path).returncode == 0
        assert contents(tmp_path) == whole

    def test_codes_of_other_settings_are_not_mixed(self, images, vq_ckpt, tmp_path):
        assert extract(images, vq_ckpt, tmp_path).returncode == 0
        result = extract(images, vq_ckpt, tmp_path, "--no-flip")
        assert_refused(result, "codes of other settings", "views 2, now 1")
        assert json.loads((tmp_path / "toy16.json").read_text())["views"] == 2
