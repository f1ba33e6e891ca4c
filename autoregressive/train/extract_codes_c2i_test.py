"""Extraction: the codes of every view in both layouts, any number of processes, a run that was cut off, wrong inputs."""

import io
import json
import random
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i
from autoregressive.train.extract_codes_c2i import Encoder, convolution_precision, fitting_batch
from dataset import images as images_module
from dataset.codes import Codes, Writer
from dataset.codes import __main__ as codes_command
from dataset.codes.toy import files, unfinish
from dataset.crops import VIEWS, center_crop, cut_views, decode
from dataset.images import ImageFolder
from tokenizer.tokenizer_image.vq_model import PRESETS, Tokenizer, VQModel, preset
from utils import checkpoint, cli
from utils.cli import InputError
from utils.distributed import World
from utils.fake_gpu import GPU, fake_gpu
from utils.files import file_lock
from utils.pixels import to_float
from utils.testing import assert_refused, fill_by_formula, run_on_machines, run_script, start_forks, wait_for

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


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Extract in this process, which is fast; returns what was printed. InputError where the command would say so."""

    def run(images, vq_ckpt, code_path, *flags) -> str:
        monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, arguments(images, vq_ckpt, code_path, *flags))])
        extract_codes_c2i.main()
        return capsys.readouterr().out

    return run


def arguments(images, vq_ckpt, code_path, *flags) -> tuple:
    return (
        "--data-path", images, "--vq-ckpt", vq_ckpt, "--code-path", code_path, "--dataset", "toy",
        "--image-size", "16", "--shard-size", "4", "--batch-size", "8", *flags,
    )  # fmt: skip


def views_of(path, size: int, mode: str, crop_range: float = 1.1) -> torch.Tensor:
    """(views, size, size, 3) uint8."""
    side = int(size * crop_range) if mode == "ten-crop" else size
    return cut_views(torch.from_numpy(center_crop(decode(path), side))[None], size, mode)[0]


def one_by_one(images, vq_ckpt, mode: str, crop_range: float = 1.1) -> np.ndarray:
    """(images, views, tokens): each view encoded on its own."""
    tokenizer = Tokenizer.from_pretrained(vq_ckpt)
    views = [views_of(path, 16, mode, crop_range) for path in ImageFolder(images).paths]
    with torch.inference_mode():
        return np.array([[tokenizer.encode(to_float(v[None])).flatten().numpy() for v in image] for image in views])


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("flip", ()), ("single", ("--no-flip",)), ("ten-crop", ("--ten-crop", "--crop-range", "1.1"))],
)
@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_codes_are_those_of_each_view(images, vq_ckpt, tmp_path, in_process, mode, flags, layout):
    in_process(images, vq_ckpt, tmp_path, *flags, "--layout", layout)
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


def test_a_run_that_was_cut_off_is_completed_to_the_same_bytes_by_any_number_of_processes(
    images, vq_ckpt, tmp_path, in_process
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for root in (whole, cut):
        in_process(images, vq_ckpt, root)
    unfinish(cut, "toy16")
    (cut / "toy16_codes" / "00001.npy").unlink()
    (cut / "toy16_labels" / "00002.npy").unlink()
    kept = (cut / "toy16_codes" / "00000.npy").stat().st_mtime_ns
    flags = ("--batch-size", "3", "--num-workers", "1")
    result = run_script(SCRIPT, *arguments(images, vq_ckpt, cut, *flags), processes=2)
    assert result.returncode == 0, result.stderr
    assert files(cut) == files(whole)
    assert (cut / "toy16_codes" / "00000.npy").stat().st_mtime_ns == kept
    assert "is complete already" in in_process(images, vq_ckpt, cut)


@pytest.mark.slow
def test_two_machines_with_a_shared_folder_write_what_one_process_does(images, vq_ckpt, tmp_path, in_process):
    in_process(images, vq_ckpt, tmp_path / "one")
    run_on_machines(SCRIPT, *arguments(images, vq_ckpt, tmp_path / "two"))
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_parts_that_are_merged_are_what_one_machine_writes(images, vq_ckpt, tmp_path, in_process, monkeypatch, layout):
    """Three shards in two parts; one image cannot be read, and each machine has its own copy of the images."""
    for name in ("whole", "a", "b"):
        shutil.copytree(images, tmp_path / f"images-{name}")
        (tmp_path / f"images-{name}" / "b" / "01.png").write_bytes(b"broken")
    in_process(tmp_path / "images-whole", vq_ckpt, tmp_path / "whole", "--layout", layout)
    for name, part in (("a", "1/2"), ("b", "2/2")):
        in_process(tmp_path / f"images-{name}", vq_ckpt, tmp_path / name, "--layout", layout, "--part", part)
    with pytest.raises(InputError, match=r"holds part 1/2 of the codes: .* merge"):
        Codes(tmp_path / "a", "toy", 16)
    monkeypatch.setattr("sys.argv", ["", "merge", *(str(tmp_path / name) for name in ("merged", "b", "a"))])
    codes_command.main()
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("part", "line"), [("3/2", "--part 3/2: expected K/N"), ("1", "expected K/N"), ("1/9", "there are 3 shards")]
)
def test_a_part_that_is_none_is_refused(images, vq_ckpt, tmp_path, in_process, capsys, part, line):
    with pytest.raises((SystemExit, InputError)) as refused:
        in_process(images, vq_ckpt, tmp_path / "codes", "--part", part)
    assert line in capsys.readouterr().err + str(refused.value)
    assert not (tmp_path / "codes").exists()


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


def test_several_crop_ranges_from_one_reading(images, vq_ckpt, tmp_path, in_process, monkeypatch):
    """Each in its folder with the codes that it has alone; a range that is there is not made again."""
    read = []
    decode = images_module.decode
    monkeypatch.setattr(images_module, "decode", lambda path, *options: read.append(path) or decode(path, *options))
    flags = ("--ten-crop", "--crop-range", "1.1", "1.25")
    out = in_process(images, vq_ckpt, tmp_path, *flags)
    assert len(read) == 11
    roots = [tmp_path / "crop-1.1", tmp_path / "crop-1.25"]
    assert f"--code-path {roots[0]} {roots[1]}" in out
    codes = Codes(roots, "toy", 16)
    assert (codes.views, len(codes)) == (20, 11)
    for k, crop_range in enumerate((1.1, 1.25)):
        expected = one_by_one(images, vq_ckpt, "ten-crop", crop_range)
        for view in range(10):
            assert np.array_equal(codes.batch(np.arange(11), np.full(11, 10 * k + view))[0], expected[:, view])
        assert Codes(roots[k], "toy", 16).manifest.crop_range == crop_range
    whole = files(tmp_path)
    kept = (roots[0] / "toy16_codes" / "00001.npy").stat().st_mtime_ns
    (roots[1] / "toy16_codes" / "00001.npy").unlink()
    read.clear()
    out = in_process(images, vq_ckpt, tmp_path, *flags)
    assert f"{roots[0] / 'toy16_codes'} is complete already" in out
    assert f"{roots[1] / 'toy16_codes'} is written" in out
    assert files(tmp_path) == whole
    assert (roots[0] / "toy16_codes" / "00001.npy").stat().st_mtime_ns == kept
    assert len(read) == 4


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def damages(rng: random.Random) -> dict[str, bytes]:
    """Over forty files that are no good: cut, altered, of wrong headers, or nothing at all."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))
    bad = {"empty": b"", "text": b"not an image\n", "zeros": bytes(500), "noise": rng.randbytes(900)}
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        good = encoded(pixels, kind)
        for share in (0.001, 0.1, 0.5, 0.9):
            bad[f"{kind}-cut-{share}"] = good[: max(1, int(share * len(good)))]
        bad[f"{kind}-zeroed"] = bytes(len(good))
        bad[f"{kind}-no-header"] = good[16:]
        bad[f"{kind}-magic"] = b"\x00\xff" + good[2:]
        bad[f"{kind}-twice"] = good[:10] + good[:20]
    return {**bad, "bomb": encoded(Image.new("1", (20000, 20000)), "PNG")}


@pytest.mark.parametrize("layout", ["packed", "per-image"])
def test_damaged_files_are_recorded_and_shift_nothing(images, vq_ckpt, tmp_path, in_process, layout):
    """Among good ones, which keep their numbers, labels and codes; also by worker processes, and when run again."""
    expected = one_by_one(images, vq_ckpt, "single")
    good, bad = ImageFolder(images), damages(random.Random(0))
    assert len(bad) > 40
    shutil.copytree(images, tmp_path / "images")
    for i, (name, content) in enumerate(bad.items()):
        (tmp_path / "images" / "abc"[i % 3] / f"{i % 11:02d}-{name}.jpg").write_bytes(content)
    mixed = ImageFolder(tmp_path / "images")
    out = in_process(tmp_path / "images", vq_ckpt, tmp_path / "out", "--no-flip", "--layout", layout)
    whole = files(tmp_path / "out")
    codes = Codes(tmp_path / "out", "toy", 16)
    m = codes.manifest
    broken = {name for name in mixed.names if Path(name).suffix == ".jpg"}
    assert {row["path"] for row in m.skipped} == broken
    assert all(mixed.names[row["image"]] == row["path"] and row["reason"] for row in m.skipped)
    assert f"skipped {len(bad)} of {len(mixed)} images" in out
    assert [mixed.names[i] for i in codes.folders[0].numbers] == good.names
    got, labels = codes.batch(np.arange(11))
    assert np.array_equal(got, expected[:, 0])
    assert np.array_equal(labels, good.labels)
    flags = ("--no-flip", "--layout", layout, "--num-workers", "1")
    assert "is complete already" in in_process(tmp_path / "images", vq_ckpt, tmp_path / "out", *flags)
    in_process(tmp_path / "images", vq_ckpt, tmp_path / "again", *flags)
    assert files(tmp_path / "again") == whole


def test_flipped_bytes_never_stop_it(images, vq_ckpt, tmp_path, in_process):
    """A file with random wrong bytes is read as something or skipped, as Pillow has it; the others are as ever."""
    rng, good = random.Random(0), Path(ImageFolder(images).paths[0])
    (tmp_path / "images" / "a").mkdir(parents=True)
    buffers = [encoded(Image.open(good), kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF")]
    for i in range(60):
        content = bytearray(rng.choice(buffers))
        for _ in range(rng.choice((1, 5, 50))):
            content[rng.randrange(len(content) if i % 2 else 40)] = rng.randrange(256)
        (tmp_path / "images" / "a" / f"{i:02d}.jpg").write_bytes(content)
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "good.png").write_bytes(good.read_bytes())
    in_process(tmp_path / "images", vq_ckpt, tmp_path / "out", "--no-flip")
    codes = Codes(tmp_path / "out", "toy", 16)
    assert 0 < len(codes.manifest.skipped) < 60
    assert len(codes) + len(codes.manifest.skipped) == 61
    got, labels = codes.batch(np.array([len(codes) - 1]))
    assert np.array_equal(got[0], one_by_one(images, vq_ckpt, "single")[0, 0])
    assert labels.tolist() == [1]


def test_no_readable_image_at_all_is_one_line_and_no_manifest(vq_ckpt, tmp_path, in_process):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images can be read; a/x\.png: no image of a known format"):
        in_process(tmp_path / "images", vq_ckpt, tmp_path / "out")
    assert not (tmp_path / "out" / "toy16.json").exists()


def test_a_changed_tree_is_not_mixed_in(images, vq_ckpt, tmp_path, in_process):
    in_process(images, vq_ckpt, tmp_path / "out")
    copied = shutil.copytree(images, tmp_path / "images")
    assert "is complete already" in in_process(copied, vq_ckpt, tmp_path / "out")
    (copied / "a" / "00.png").rename(copied / "a" / "zz.png")
    with pytest.raises(InputError, match=r"other settings \(paths_sha256"):
        in_process(copied, vq_ckpt, tmp_path / "out")


@pytest.mark.slow
def test_killed_at_any_moment_it_is_completed_to_the_same_bytes(images, vq_ckpt, tmp_path, in_process):
    in_process(images, vq_ckpt, tmp_path / "whole", "--layout", "per-image")
    rng = random.Random(0)
    command = [SCRIPT, *map(str, arguments(images, vq_ckpt, tmp_path / "cut", "--layout", "per-image"))]
    begun = tmp_path / "cut" / "toy16.unfinished.json"
    for _ in range(4):
        with start_forks(command) as (fork,):
            wait_for("the extraction has begun or ended", lambda fork=fork: fork.exitcode is not None or begun.exists())
            fork.join(rng.uniform(0, 0.3))
    in_process(images, vq_ckpt, tmp_path / "cut", "--layout", "per-image")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("failing", [0, 2])
def test_a_write_that_fails_is_heard_of(images, vq_ckpt, tmp_path, in_process, monkeypatch, failing):
    """Of the first of three shards, which is waited for before the next one is written, and of the last."""

    def write(self, shard, *_):
        if shard == failing:
            raise InputError("the disk is full")
        assert shard < failing

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(InputError, match="the disk is full"):
        in_process(images, vq_ckpt, tmp_path)


def test_batches_fit_and_are_powers_of_two():
    cpu = torch.device("cpu")
    sizes = [fitting_batch(PRESETS["VQ-16"], size, cpu) for size in (64, 128, 256, 384, 2048)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (16, 1)
    assert all(n & (n - 1) == 0 for n in sizes)
    assert fitting_batch(PRESETS["VQ-4-small"], 32, cpu) == 128


def test_bf16_and_any_batch_give_whole_codes():
    model = fill_by_formula(VQModel(preset("VQ-4-small", codebook_size=300))).eval()
    crops = [torch.randint(256, (3, 18, 18, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    make = lambda dtype, batch: Encoder(  # noqa: E731
        model, torch.device("cpu"), batch_size=batch, precision=dtype, compiled=False
    ).codes(crops, 16, "ten-crop")
    plain = make(torch.float32, 4)
    assert plain.shape == (3, 10, 16)
    assert plain.equal(make(torch.float32, 64))
    assert 0.5 < (make(torch.bfloat16, 4) == plain).float().mean() <= 1


def test_on_a_gpu_the_host_does_not_wait_for_codes(monkeypatch):
    """Of a batch that is filled up, too, since compiled code has one shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, crops = VQModel(preset("VQ-4-small", codebook_size=300)).eval(), torch.zeros(3, 18, 18, 3, dtype=torch.uint8)
    with fake_gpu() as gpu:
        encoder = Encoder(model, GPU, batch_size=4, precision=torch.bfloat16, compiled=True)
        codes = encoder.codes([crops], 16, "ten-crop")
        assert codes.device == GPU and codes.shape == (3, 10, 16)
    assert not gpu.waits


class TestWrongInputs:
    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            (("--image-size", "18"), ("--image-size 18", "multiple")),
            (("--ten-crop", "--crop-range", "0.9"), ("--crop-range 0.9", "at least 1")),
            (("--crop-range", "1.1"), ("--crop-range has no effect without --ten-crop",)),
            (("--crop-range", "1.1", "1.05"), ("--crop-range has no effect without --ten-crop",)),
            (("--no-flip", "--ten-crop"), ("--no-flip has no effect with --ten-crop",)),
            (("--ten-crop", "--crop-range", "1.07", "1.1", "1.12"), ("1.1 1.12: ", "the same crop of 17 px")),
            (("--num-workers", "-1"), ("--num-workers", "from 0 to")),
            (("--dataset", "../x"), ("--dataset '../x'", "without /")),
            (("--data-path", "nowhere"), ("there is no folder nowhere",)),
            (("--code-path", "/dev/null/x"), ("/dev/null is no folder",)),
        ],
    )
    def test_flags(self, images, vq_ckpt, tmp_path, in_process, capsys, flags, parts):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: in_process(images, vq_ckpt, tmp_path / "out", *flags))
        error = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2
        assert error.startswith("error: ")
        assert all(part in error for part in parts), error
        assert not (tmp_path / "out").exists()

    def test_a_truncated_tokenizer_and_folders_without_images(self, images, vq_ckpt, tmp_path, in_process):
        broken = tmp_path / "broken.pt"
        broken.write_bytes(vq_ckpt.read_bytes()[:4000])
        with pytest.raises(InputError, match=r"broken\.pt.*truncated"):
            in_process(images, broken, tmp_path / "out")
        (tmp_path / "images" / "empty").mkdir(parents=True)
        with pytest.raises(InputError, match="no images in"):
            in_process(tmp_path / "images", vq_ckpt, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("workers", "processes"), [("0", 1), ("1", 1), ("1000", 2)])
    def test_strict_names_the_first_image_that_is_unreadable(
        self, images, vq_ckpt, tmp_path, in_process, workers, processes
    ):
        """Also by the second of two processes, which has it in its shard."""
        (tmp_path / "a").mkdir()
        source = Path(ImageFolder(images).paths[0]).read_bytes()
        for i in range(5):
            (tmp_path / "a" / f"{i}.png").write_bytes(source if i < 4 else source[:-40])
        flags = ("--num-workers", workers, "--strict")
        if processes == 2:
            result = run_script(SCRIPT, *arguments(tmp_path, vq_ckpt, tmp_path / "out", *flags), processes=processes)
            assert_refused(result, "4.png cannot be read as an image", "leave out --strict")
        else:
            with pytest.raises(ValueError, match=r"4\.png cannot be read as an image .*leave out --strict"):
                in_process(tmp_path, vq_ckpt, tmp_path / "out", *flags)

    def test_codes_of_other_settings_are_not_mixed(self, images, vq_ckpt, tmp_path, in_process):
        in_process(images, vq_ckpt, tmp_path)
        for flags, message in (
            (("--no-flip",), "views 2, now 1"),
            (("--background", "black"), "background white, now black"),
            (("--exif-orientation",), "exif_orientation False, now True"),
        ):
            with pytest.raises(InputError, match=f"codes of other settings .*{message}"):
                in_process(images, vq_ckpt, tmp_path, *flags)
        assert json.loads((tmp_path / "toy16.json").read_text())["views"] == 2

    def test_two_extractions_at_once(self, images, vq_ckpt, tmp_path, in_process):
        with (
            file_lock(tmp_path / "toy16.json"),
            pytest.raises(InputError, match=r"toy16\.json is in use by process \d+ on .*another --code-path"),
        ):
            in_process(images, vq_ckpt, tmp_path)
        in_process(images, vq_ckpt, tmp_path)

    def test_machines_without_a_shared_folder_end_before_the_work(
        self, images, vq_ckpt, tmp_path, in_process, monkeypatch
    ):
        def refuse(world, folder):
            raise InputError(f"{folder} is another folder for 1 of 2 processes")

        monkeypatch.setattr(World, "check_shared", refuse)
        with pytest.raises(InputError, match="out is another folder"):
            in_process(images, vq_ckpt, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_tf32_is_recorded(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    kinds = [convolution_precision(precision, device) for precision in ("fp32", "bf16") for device in (gpu, cpu)]
    assert kinds == ["tf32", "fp32", "bf16", "bf16"]
