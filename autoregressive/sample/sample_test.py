"""Both samplers: the same images for any batch size and number of processes, a run that was cut off, wrong inputs."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.generate import generate
from autoregressive.models.gpt import PRESETS, Transformer, preset
from autoregressive.models.load import load_gpt
from autoregressive.sample import sample_c2i_ddp
from tokenizer.tokenizer_image import vq_model
from tokenizer.tokenizer_image.load import load_tokenizer
from utils import checkpoint, cli, streams
from utils.pixels import to_uint8
from utils.samples import Samples
from utils.testing import ROOT, assert_refused, fill_by_formula, run_script

MANY = "autoregressive/sample/sample_c2i_ddp.py"
GRID = "autoregressive/sample/sample_c2i.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer and a GPT of 4x4 codes and three classes, as the stages before write them."""
    root = tmp_path_factory.mktemp("models")
    vq = vq_model.preset("VQ-4-small", codebook_size=60)
    tokenizer = fill_by_formula(vq_model.VQModel(vq))
    checkpoint.save(root / "vq.pt", {"model": tokenizer.state_dict(), "config": asdict(vq), "vq_model": "VQ-4-small"})
    config = preset("GPT-XXS", vocab_size=60, num_classes=3, block_size=16)
    content = {"config": asdict(config), "gpt_model": "GPT-XXS", "image_size": 16, "classes": ["ant", "bee", "cat"]}
    gpt = fill_by_formula(Transformer(config))
    ema = {name: value * 0.5 for name, value in gpt.state_dict().items()}
    checkpoint.save(root / "gpt.pt", {**content, "model": gpt.state_dict(), "ema": ema})
    return {"vq": root / "vq.pt", "gpt": root / "gpt.pt"}


def command(models, folder, *flags, images=11) -> list[str]:
    flags = (
        "--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"], "--num-fid-samples", images,
        "--per-proc-batch-size", 4, "--cfg-scale", 2.0, "--sample-dir", folder, *flags,
    )  # fmt: skip
    return [str(flag) for flag in flags]


def sample(models, folder, *flags, images=11, **options):
    return run_script(MANY, *command(models, folder, *flags, images=images), **options)


@pytest.fixture
def here(monkeypatch, models, tmp_path):
    """Samples into tmp_path within this process, which saves the start of another."""

    def run(*flags, images=11) -> None:
        monkeypatch.setattr(sys, "argv", [MANY, *command(models, tmp_path, *flags, images=images)])
        sample_c2i_ddp.main()

    return run


NAME = "GPT-XXS-gpt-size-16-size-16-VQ-4-small-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz"


@pytest.fixture(scope="module")
def drawn(models, tmp_path_factory) -> Path:
    """The file of a whole run on one process."""
    folder = tmp_path_factory.mktemp("samples")
    result = sample(models, folder)
    assert result.returncode == 0, result.stderr
    return folder / NAME


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def test_images_are_those_of_their_labels_and_streams(models, drawn):
    images, labels = arrays(drawn)
    assert (images.shape, images.dtype, labels.dtype) == ((11, 16, 16, 3), np.uint8, np.int64)
    assert set(labels) <= {0, 1, 2}
    gpt, about = load_gpt(models["gpt"])
    assert about["weights"] == "ema"
    tokenizer, _ = load_tokenizer(models["vq"])
    uniforms = streams.uniform(0, streams.SAMPLE, np.arange(11)[:, None], np.arange(16))
    codes = generate(gpt, torch.from_numpy(labels), torch.from_numpy(uniforms), cfg_scale=2.0)
    with torch.inference_mode():
        assert np.array_equal(to_uint8(tokenizer.decode_code(codes)), images)
    assert sorted(path.name for path in drawn.parent.iterdir()) == [NAME.replace(".npz", ".json"), NAME]


def test_any_batch_size_and_number_of_processes_draws_the_same(models, drawn, tmp_path):
    result = sample(models, tmp_path, "--per-proc-batch-size", "3", processes=2)
    assert result.returncode == 0, result.stderr
    for one, other in zip(arrays(drawn), arrays(tmp_path / NAME), strict=True):
        assert np.array_equal(one, other)


def test_a_run_that_was_cut_off_draws_only_what_is_missing(models, drawn, tmp_path):
    """Its images lie beside the .npz; they are taken as they are (here: marked by a pixel), whatever the batch size now."""
    record = json.loads(drawn.with_suffix(".json").read_text())
    parts = tmp_path / NAME.replace(".npz", ".parts")
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(record))
    marked = arrays(drawn)[0].copy()
    marked[[0, 5], 0, 0] = (1, 2, 3)
    np.save(parts / "00000000-00000002.npy", marked[:2])
    np.save(parts / "00000005-00000008.npy", marked[5:8])
    result = sample(models, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(arrays(tmp_path / NAME)[0], marked)
    assert not parts.exists()


def test_a_killed_run_goes_on_to_the_same_file(models, drawn, tmp_path):
    """kill -9 once some images are there; then the same command, with another batch size."""
    parts = tmp_path / NAME.replace(".npz", ".parts")
    run = subprocess.Popen(
        [sys.executable, MANY, *command(models, tmp_path, "--per-proc-batch-size", 1)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while len(list(parts.glob("0*.npy"))) < 2 and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in parts.glob("0*.npy")}
    assert there
    result = sample(models, tmp_path)
    assert result.returncode == 0, result.stderr
    for one, other in zip(arrays(drawn), arrays(tmp_path / NAME), strict=True):
        assert np.array_equal(one, other)


def test_finished_work_is_not_redone_and_other_settings_are_refused(models, drawn, here, tmp_path, capsys):
    for path in drawn.parent.iterdir():
        shutil.copy(path, tmp_path)
    here()
    assert "is complete already" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match=r"other settings \(labels differ"):
        here("--labels", "balanced")
    with pytest.raises(cli.InputError, match=r"other settings \(num_fid_samples differ"):
        here(images=12)
    (tmp_path / NAME.replace(".npz", ".json")).unlink()
    with pytest.raises(cli.InputError, match=r"without its \.json.*move or delete it"):
        here()


def test_a_sweep_writes_a_file_a_scale(drawn, here, tmp_path, capsys):
    here("--cfg-scale", "1.0", "2.0", "3.5", "--save-png")
    files = {scale: tmp_path / NAME.replace("cfg-2.0", f"cfg-{scale}") for scale in ("1.0", "2.0", "3.5")}
    images = {scale: arrays(path)[0] for scale, path in files.items()}
    assert np.array_equal(images["2.0"], arrays(drawn)[0])
    assert not np.array_equal(images["1.0"], images["2.0"]) and not np.array_equal(images["3.5"], images["2.0"])
    for scale, path in files.items():
        pngs = sorted(path.with_suffix("").iterdir())
        assert [png.name for png in pngs] == [f"{i:06d}.png" for i in range(11)]
        assert np.array_equal(np.stack([np.array(Image.open(png)) for png in pngs]), images[scale])
    here("--cfg-scale", "1.0", "2.0")
    assert capsys.readouterr().out.count("is complete already") == 2


def test_schedules_have_names_and_effects(drawn, here, tmp_path):
    flags = {
        "cfg-2.0-linear": ("--cfg-schedule", "linear"),
        "cfg-2.0-power-cosine-3.0": ("--cfg-schedule", "power-cosine", "--cfg-power", "3"),
        "cfg-2.0-interval-4-12": ("--cfg-interval", "4", "12"),
        "cfg-2.0-interval-3": ("--cfg-interval", "3"),
    }
    found = [arrays(drawn)[0]]
    for name, these in flags.items():
        here(*these)
        found.append(arrays(tmp_path / NAME.replace("cfg-2.0", name))[0])
    assert len({images.tobytes() for images in found}) == len(found)


def test_chosen_labels_are_taken_in_turn(here, tmp_path):
    here("--labels", "2", "0", images=5)
    assert arrays(tmp_path / NAME)[1].tolist() == [2, 0, 2, 0, 2]


def test_balanced_labels_raw_weights_and_another_size(models, drawn, tmp_path):
    flags = ("--labels", "balanced", "--weights", "model", "--image-size-eval", "24", "--global-seed", "3")
    result = sample(models, tmp_path, *flags, images=4)
    assert result.returncode == 0, result.stderr
    name = NAME.replace("16-size-16", "16-size-24").replace("seed-0", "seed-3").replace("gpt-size", "gpt-raw-size")
    samples = Samples(tmp_path / name)
    assert samples.shape == (4, 24, 24, 3)
    assert samples.labels.tolist() == [0, 1, 2, 0]


def test_a_grid_of_chosen_classes(models, tmp_path):
    flags = ("--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"], "--out", tmp_path / "grid.png")
    result = run_script(GRID, *flags, "--class-ids", "2", "0", "--per-class", "3", "--scale", "2")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "grid.png") as page:
        assert page.height > 2 * (2 * 16 + 2 + 10)  # a line of words under each row
        assert page.width == 3 * (2 * 16 + 2) + 2
    assert_refused(run_script(GRID, *flags, "--class-ids", "1", "3"), "--class-ids 3 is out of range", "classes 0 to 2")


@pytest.mark.slow
def test_published_files_by_the_published_command(tmp_path, monkeypatch, capsys):
    """Weights without a config, wrapped as published; the file gets the published name, also where flags are left out."""
    folder = tmp_path / "pretrained_models"
    folder.mkdir()
    gpt, tokenizer = Transformer(PRESETS["GPT-B"]), vq_model.VQModel(vq_model.PRESETS["VQ-16"])
    for name, model in (("c2i_B_256", gpt), ("vq_ds16_c2i", tokenizer)):
        content = {"model": fill_by_formula(model).state_dict(), "steps": 1, "args": Namespace(global_seed=0)}
        torch.save(content, folder / f"{name}.pt")
    command = (
        "--vq-ckpt", folder / "vq_ds16_c2i.pt", "--gpt-ckpt", folder / "c2i_B_256.pt", "--gpt-model", "GPT-B",
        "--image-size", "256", "--image-size-eval", "256", "--cfg-scale", "2.0", "--num-fid-samples", "1",
        "--sample-dir", tmp_path / "samples",
    )  # fmt: skip
    result = run_script(MANY, *command)
    assert result.returncode == 0, result.stderr
    name = "GPT-B-c2i_B_256-size-256-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz"
    assert Samples(tmp_path / "samples" / name).shape == (1, 256, 256, 3)
    short = (*command[:4], "--num-fid-samples", "1", "--sample-dir", tmp_path / "samples")
    monkeypatch.setattr(sys, "argv", [MANY, *map(str, short)])
    sample_c2i_ddp.main()
    out, error = capsys.readouterr()
    assert f"{name} is complete already" in out
    assert "--image-size 256 --image-size-eval 256 --cfg-scale 2.0: as published for" in error


class TestWrongInputs:
    def refused(self, models, tmp_path, flags, *parts):
        """In this process, as the entry point does it."""
        error = io.StringIO()
        with (
            patch.object(sys, "argv", [MANY, *command(models, tmp_path / "out", *flags)]),
            redirect_stderr(error),
            pytest.raises(SystemExit) as stopped,
        ):
            cli.run(sample_c2i_ddp.main)
        assert_refused(CompletedProcess(MANY, stopped.value.code, "", error.getvalue()), *parts)
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_of_another_preset(self, models, tmp_path):
        flags = ("--gpt-model", "GPT-XS")
        self.refused(models, tmp_path, flags, "loaded as GPT-XS) does not fit", "tok_embeddings.weight is (60, 128)")

    def test_a_truncated_checkpoint(self, models, tmp_path):
        broken = tmp_path / "broken.pt"
        broken.write_bytes(models["gpt"].read_bytes()[:9000])
        self.refused(models, tmp_path, ("--gpt-ckpt", broken), "broken.pt", "truncated")

    def test_a_size_that_the_gpt_does_not_draw(self, models, tmp_path):
        self.refused(models, tmp_path, ("--image-size", "32"), "64 codes of VQ-4-small", "draws 16")

    def test_a_tokenizer_with_more_codes(self, models, tmp_path):
        config = vq_model.preset("VQ-4-small", codebook_size=61)
        state = vq_model.VQModel(config).state_dict()
        checkpoint.save(tmp_path / "vq.pt", {"model": state, "config": asdict(config), "vq_model": "VQ-4-small"})
        self.refused(models, tmp_path, ("--vq-ckpt", tmp_path / "vq.pt"), "knows 60 codes", "has 61")

    def test_no_ema_in_the_file(self, models, tmp_path):
        content = checkpoint.load(models["gpt"])
        del content["ema"]
        checkpoint.save(tmp_path / "raw.pt", content)
        self.refused(models, tmp_path, ("--gpt-ckpt", tmp_path / "raw.pt", "--weights", "ema"), "no EMA weights")

    def test_guidance(self, models, tmp_path):
        self.refused(models, tmp_path, ("--cfg-scale", "0.5"), "--cfg-scale", "at least 1 (1 is off)", "0.5")
        self.refused(models, tmp_path, ("--cfg-interval", "4", "17"), "--cfg-interval 4 17", "STOP <= 16")
        self.refused(models, tmp_path, ("--cfg-interval", "16"), "--cfg-interval 16", "from -1 to 15")
        self.refused(models, tmp_path, ("--cfg-power", "2"), "--cfg-power 2.0", "power-cosine", "not constant")

    def test_labels(self, models, tmp_path):
        self.refused(models, tmp_path, ("--labels", "1", "3"), "--labels 3 is out of range", "classes 0 to 2")
        self.refused(models, tmp_path, ("--labels", "balanced", "1"), "balanced 1", "only classes")

    def test_a_folder_that_cannot_be_written(self, models, tmp_path):
        (tmp_path / "file").write_text("")
        self.refused(models, tmp_path, ("--sample-dir", tmp_path / "file" / "x"), "file", "--sample-dir")

    def test_flags(self, models, tmp_path):
        self.refused(models, tmp_path, ("--top-p", "0"), "--top-p", "(0, 1]")
        self.refused(models, tmp_path, ("--temperature", "0"), "--temperature", "above 0")
