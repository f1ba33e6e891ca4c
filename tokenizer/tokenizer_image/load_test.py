"""Tokenizer files: published ones under their names and shapes, ours, safetensors, the Hub; wrong ones in one line."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.tokenizer_image.load import Tokenizer, load_tokenizer
from tokenizer.tokenizer_image.vq_model import PRESETS, VQModel, preset
from utils import checkpoint, weights
from utils.cli import InputError
from utils.pixels import to_float
from utils.testing import close, fill_by_formula, formula

DATA = Path(__file__).parent / "testdata"
STATE_DICTS = json.loads((DATA / "vq_state_dicts.json").read_text())
FILES = {"VQ-16": "vq_ds16_c2i.pt", "VQ-8": "vq_ds8_c2i.pt"}
SMALL = preset("VQ-4-small", codebook_size=16)


@pytest.fixture(scope="module", params=FILES)
def published(request, tmp_path_factory) -> tuple[str, Path]:
    """A stand-in for a published file: its names and shapes by formula, with the Namespace of the training command."""
    shapes = STATE_DICTS[request.param]["state_dict"]
    state = {name: torch.from_numpy(formula(name, tuple(shape))) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("published") / FILES[request.param]
    args = argparse.Namespace(vq_model=request.param, codebook_size=16384, image_size=256, ema=True, finetune=False)
    torch.save({"model": state, "optimizer": {}, "optimizer_disc": {}, "steps": 200000, "args": args}, path)
    return request.param, path


@torch.inference_mode()
def golden_difference(name: str, model: VQModel) -> None:
    golden = np.load(DATA / f"{name.lower().replace('-', '')}.npz")
    close(model.latents(to_float(torch.from_numpy(golden["img_small"]))), golden["latent_small"])
    close(model.decode_code(torch.from_numpy(golden["codes_small"])), golden["recon_small"], rtol=0, atol=2e-4)


def test_a_published_file_gives_the_published_numbers(published, capsys):
    """Without --vq-model: the tensors tell which one it is."""
    name, path = published
    model, about = load_tokenizer(path)
    assert about["vq_model"] == name and model.config == PRESETS[name]
    assert (
        f"loaded {name} from {path}: 7" in (said := capsys.readouterr().err)
        and "float32, raw weights, 200000 steps" in said
    )
    golden_difference(name, model)


def test_it_still_does_after_an_export_to_the_hub(published, tmp_path):
    name, path = published
    load_tokenizer(path)[0].save_pretrained(tmp_path / "hub")
    golden_difference(name, Tokenizer.from_pretrained(tmp_path / "hub"))


def small_file(folder: Path, **changes) -> Path:
    content = {"model": fill_by_formula(VQModel(SMALL)).state_dict(), "config": asdict(SMALL), "vq_model": "VQ-4-small"}
    checkpoint.save(folder / "vq.pt", {**content, **changes})
    return folder / "vq.pt"


def test_a_codebook_of_another_size_is_read_off_the_tensors(tmp_path):
    checkpoint.save(tmp_path / "vq.pt", {"model": VQModel(SMALL).state_dict()})
    model, about = load_tokenizer(tmp_path / "vq.pt")
    assert model.config == SMALL and about["vq_model"] == "VQ-4-small"


def test_half_precision_files_compute_in_float32(tmp_path):
    half = {name: value.half() for name, value in VQModel(SMALL).state_dict().items()}
    model, _ = load_tokenizer(small_file(tmp_path, model=half))
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4)


def test_folders_keep_what_the_file_said(tmp_path):
    model, about = load_tokenizer(small_file(tmp_path, image_size=32, steps=9, args={"lr": 1}))
    assert about["args"] == {"lr": 1} and "args" not in model.about
    model.save_pretrained(tmp_path / "hub")
    again, about = load_tokenizer(tmp_path / "hub")
    assert (about["image_size"], about["steps"], about["vq_model"]) == (32, 9, "VQ-4-small")
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


def test_ema_is_preferred_and_said_after_an_export(tmp_path, capsys):
    moved = {name: value + 1 for name, value in VQModel(SMALL).state_dict().items()}
    model, about = load_tokenizer(small_file(tmp_path, ema=moved))
    assert about["weights"] == "ema" and model.quant_conv.bias.equal(moved["quant_conv.bias"])
    weights.write_folder(tmp_path / "hub", model.state_dict(), {**model.about, "config": asdict(SMALL)}, "")
    assert load_tokenizer(tmp_path / "hub")[1]["weights"] == "ema"
    assert capsys.readouterr().err.count("EMA weights") == 2


def test_the_preset_that_would_fit_is_named(published):
    name, path = published
    other = "VQ-8" if name == "VQ-16" else "VQ-16"
    with pytest.raises(
        InputError, match=rf"loaded as {other}\) does not fit .*; they are those of {name} with 16384 codes"
    ):
        load_tokenizer(path, other)


def test_no_tokenizer_at_all(tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"model": {"weight": torch.zeros(2)}})
    with pytest.raises(InputError, match="no tokenizer preset has these tensors"):
        load_tokenizer(tmp_path / "x.pt")
