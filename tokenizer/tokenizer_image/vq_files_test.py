"""Tokenizer files: published ones under their names and shapes, ours, safetensors, the Hub; wrong ones in one line."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.tokenizer_image.vq_model import PRESETS, Tokenizer, VQModel, preset
from utils import checkpoint
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
    model = Tokenizer.from_pretrained(path)
    assert model.about["vq_model"] == name and model.config == PRESETS[name]
    assert (
        f"loaded {name} from {path}: 7" in (said := capsys.readouterr().err)
        and "float32, raw weights, 200000 steps" in said
    )
    golden_difference(name, model)


def test_it_still_does_after_an_export_to_the_hub(published, tmp_path):
    name, path = published
    Tokenizer.from_pretrained(path).save_pretrained(tmp_path / "hub")
    golden_difference(name, Tokenizer.from_pretrained(tmp_path / "hub"))


def small_file(folder: Path, **changes) -> Path:
    content = {"model": fill_by_formula(VQModel(SMALL)).state_dict(), "config": asdict(SMALL), "vq_model": "VQ-4-small"}
    checkpoint.save(folder / "vq.pt", {**content, **changes})
    return folder / "vq.pt"


def test_what_a_file_says_of_itself_is_checked(tmp_path):
    for config in ({"num_res_blocks": 10**5}, {"num_res_blocks": 10**9}, {"ch": "32"}, {"encoder_ch_mult": (1,)}):
        with pytest.raises(InputError, match=r"vq\.pt.* config"):
            Tokenizer.from_pretrained(small_file(tmp_path, config={**asdict(SMALL), **config}))
    with pytest.raises(InputError, match="vq_model: expected a short name"):
        Tokenizer.from_pretrained(small_file(tmp_path, vq_model="../../x"))
    state = VQModel(SMALL).state_dict()
    state["quant_conv.bias"][0] = float("nan")
    with pytest.raises(InputError, match=r"quant_conv\.bias has values that are not finite"):
        Tokenizer.from_pretrained(small_file(tmp_path, model=state))


def test_a_codebook_of_another_size_is_read_off_the_tensors(tmp_path):
    checkpoint.save(tmp_path / "vq.pt", {"model": VQModel(SMALL).state_dict()})
    model = Tokenizer.from_pretrained(tmp_path / "vq.pt")
    assert model.config == SMALL and model.about["vq_model"] == "VQ-4-small"


def test_half_precision_files_compute_in_float32(tmp_path):
    half = {name: value.half() for name, value in VQModel(SMALL).state_dict().items()}
    model = Tokenizer.from_pretrained(small_file(tmp_path, model=half))
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4)


def test_folders_keep_what_the_file_said(tmp_path):
    model = Tokenizer.from_pretrained(small_file(tmp_path, image_size=32, steps=9, args={"lr": 1}))
    assert "args" not in model.about
    model.save_pretrained(tmp_path / "hub")
    again = Tokenizer.from_pretrained(tmp_path / "hub")
    assert (again.about["vq_model"], again.about["image_size"], again.about["steps"]) == ("VQ-4-small", 32, 9)
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


def test_ema_is_preferred_and_said_after_an_export(tmp_path, capsys):
    moved = {name: value + 1 for name, value in VQModel(SMALL).state_dict().items()}
    model = Tokenizer.from_pretrained(small_file(tmp_path, ema=moved, args={}))
    assert model.about["weights"] == "ema" and model.quant_conv.bias.equal(moved["quant_conv.bias"])
    model.save_pretrained(tmp_path / "hub")
    assert Tokenizer.from_pretrained(tmp_path / "hub").about["weights"] == "ema"
    assert capsys.readouterr().err.count("EMA weights") == 2


def test_the_preset_that_would_fit_is_named(published):
    name, path = published
    other = "VQ-8" if name == "VQ-16" else "VQ-16"
    with pytest.raises(
        InputError, match=rf"loaded as {other}\) does not fit .*; they are those of {name} .codebook_size 16384,"
    ):
        Tokenizer.from_pretrained(path, other)
    with pytest.raises(InputError, match="there is no tokenizer VQ-4; choose one of VQ-16"):
        Tokenizer.from_pretrained(path, "VQ-4")


def test_what_of_a_file_does_not_fit_is_named(tmp_path):
    with pytest.raises(InputError, match=r"loaded as VQ-16\) does not fit this model: encoder.conv_in.weight is"):
        Tokenizer.from_pretrained(small_file(tmp_path), "VQ-16")
    path = small_file(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"vq\.pt.*truncated"):
        Tokenizer.from_pretrained(path)


def test_no_tokenizer_at_all(tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"model": {"weight": torch.zeros(2)}})
    with pytest.raises(InputError, match="no tokenizer preset has these tensors"):
        Tokenizer.from_pretrained(tmp_path / "x.pt")
