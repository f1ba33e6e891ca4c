"""Stand-ins for the published files go through every stage: by name, by the published path, and wrapped as published."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import PRESETS, Transformer
from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.codes import __main__ as codes_tool
from tokenizer.tokenizer_image import reconstruction_vq_ddp, vq_model, vq_train
from tokenizer.tokenizer_image.vq_model import Tokenizer
from utils import cli
from utils.pixels import to_float
from utils.samples import Samples
from utils.testing import formula, run_script

SIDE = 32  # pixels: 2 x 2 codes of VQ-16, because no tensor's shape depends on it


def stand_in(path: Path, model: torch.nn.Module, **args) -> None:
    """The model's names and shapes by formula, with the Namespace of a training command."""
    state = {name: torch.from_numpy(formula(name, tuple(t.shape))) for name, t in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "steps": 1, "args": argparse.Namespace(**args)}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of weights that a user filled by hand, and six images of two classes."""
    root = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        for name, preset in (("vq_ds16_c2i", "VQ-16"), ("vq_ds8_c2i", "VQ-8")):
            stand_in(root / f"{name}.pt", vq_model.VQModel(vq_model.PRESETS[preset]), vq_model=preset)
        stand_in(root / "c2i_B_256.pt", Transformer(PRESETS["GPT-B"]), gpt_model="GPT-B")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / "images" / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    return root


def stage(folder: Path, script: str, **options) -> str:
    """Run a stage with this folder of weights; what it printed. It must succeed."""
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    result = run_script(script, *[flag for flag in flags if flag is not True], PRETRAINED_MODELS=str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def extract(folder: Path, codes: Path, **options) -> str:
    return stage(
        folder, "autoregressive/train/extract_codes_c2i.py", data_path=folder / "images", code_path=codes,
        image_size=SIDE, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_published_files_through_every_stage(folder, tmp_path):
    codes = tmp_path / "codes"
    said = extract(folder, codes, vq_ckpt="vq_ds16_c2i")
    assert f"loaded VQ-16 from {folder / 'vq_ds16_c2i.pt'}" in said
    said = stage(
        folder, "tokenizer/tokenizer_image/reconstruction_vq_ddp.py", data_path=folder / "images", image_size=SIDE,
        vq_ckpt="vq_ds8_c2i", out=tmp_path / "r.npz",
    )  # fmt: skip
    assert "loaded VQ-8 from" in said and Samples(tmp_path / "r.npz").shape == (6, SIDE, SIDE, 3)
    said = stage(
        folder, "autoregressive/train/train_c2i.py", code_path=codes, image_size=SIDE, results_dir=tmp_path / "results",
        gpt_model="GPT-B", gpt_ckpt="c2i_B_256", num_classes=1000, global_batch_size=6, patch_level=1, epochs=1,
    )  # fmt: skip
    assert f"starting from {folder / 'c2i_B_256.pt'}: 1" in said and "not recorded" in said
    metrics = (next((tmp_path / "results").iterdir()) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["loss"] > 0
    stage(
        folder, "autoregressive/sample/sample_c2i_ddp.py", vq_ckpt=folder / "vq_ds16_c2i.pt",
        gpt_ckpt=folder / "c2i_B_256.pt", gpt_model="GPT-B", image_size=SIDE, num_fid_samples=2, cfg_scale=2.0,
        sample_dir=tmp_path / "samples",
    )  # fmt: skip
    (samples,) = (tmp_path / "samples").glob("GPT-B-c2i_B_256-size-32-size-32-VQ-16-*-cfg-2.0-seed-0.npz")
    assert Samples(samples).shape == (2, SIDE, SIDE, 3)


@pytest.mark.slow
def test_per_image_codes_have_the_published_form(folder, tmp_path):
    """{i}.npy: int64 (1, views, tokens) and labels int64 (1,), as the published extraction writes and training reads."""
    extract(folder, tmp_path, vq_ckpt=folder / "vq_ds16_c2i.pt", layout="per-image")
    names = [f"{i}.npy" for i in range(6)]
    assert sorted(path.name for path in (tmp_path / f"imagenet{SIDE}_codes").iterdir()) == names
    codes = [np.load(tmp_path / f"imagenet{SIDE}_codes" / name) for name in names]
    labels = [np.load(tmp_path / f"imagenet{SIDE}_labels" / name) for name in names]
    assert {(a.dtype.name, a.shape) for a in codes} == {("int64", (1, 2, 4))}
    assert {(a.dtype.name, a.shape) for a in labels} == {("int64", (1,))}
    assert [int(a[0]) for a in labels] == [0, 0, 0, 1, 1, 1]
    pixels = np.array(Image.open(folder / "images" / "b" / "1.png"))
    picture = to_float(torch.from_numpy(pixels)[None])
    with torch.inference_mode():
        expected = Tokenizer.from_pretrained(folder / "vq_ds16_c2i.pt").encode(picture)
    assert codes[4][0, 0].tolist() == expected.flatten().tolist()


@pytest.mark.parametrize(
    ("stage", "flag"),
    [
        (extract_codes_c2i, "--vq-ckpt"),
        (train_c2i, "--vq-ckpt"),
        (train_c2i, "--gpt-ckpt"),
        (vq_train, "--vq-ckpt"),
        (reconstruction_vq_ddp, "--vq-ckpt"),
        (codes_tool, "--vq-ckpt"),
    ],
)
def test_every_stage_says_how_to_get_weights_that_are_not_there(tmp_path, monkeypatch, capsys, stage, flag):
    required = {
        codes_tool: ("check",),
        extract_codes_c2i: ("--code-path", "x", "--data-path"),
        reconstruction_vq_ddp: ("--data-path",),
        train_c2i: ("--code-path",),
        vq_train: ("--data-path",),
    }
    command = [*required[stage], str(tmp_path)]
    monkeypatch.setenv("PRETRAINED_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["stage", *command, flag, "c2i_L_384"])
    with pytest.raises(SystemExit) as exit:
        cli.run(stage.main)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"argument {flag}: c2i_L_384.pt was not fetched" in line and f"by hand and put it at {tmp_path}/Found" in line
    )
