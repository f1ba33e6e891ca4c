"""GPT files of every kind: published ones under their names and shapes, ours, safetensors, the Hub; wrong ones in one line."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from autoregressive.models.gpt import GPT, PRESETS, GPTConfig, Transformer, preset, rope_grid
from autoregressive.models.patches import patch_loss, to_patches
from pretrained_models.catalogue import CATALOGUE
from utils import checkpoint
from utils.cli import InputError
from utils.testing import close, fill_by_formula, formula

DATA = Path(__file__).parent / "testdata"
STATE_DICTS = json.loads((DATA / "gpt_state_dicts.json").read_text())
CONFIG = preset("GPT-XXS", vocab_size=8, num_classes=2, block_size=4)
NAMESPACE = argparse.Namespace(
    gpt_model="GPT-B", epochs=300, lr=1e-4, ema=False, results_dir="results", mixed_precision="bf16"
)


def small() -> Transformer:
    return fill_by_formula(Transformer(CONFIG))


def hollow(name: str) -> dict[str, torch.Tensor]:
    """Weights of a preset under their published names, shapes and dtype, each made of one stored number."""
    shapes = {k: v.shape for k, v in GPT.empty(PRESETS[name]).state_dict().items()}
    shapes = STATE_DICTS[name]["state_dict"] if name in STATE_DICTS else shapes
    return {key: torch.full((1,), 0.01).expand(tuple(shape)) for key, shape in shapes.items()}


def wrapped(state: dict[str, torch.Tensor], kind: str) -> dict:
    """As the published training scripts save: DDP's dict with a Namespace, DeepSpeed's, FSDP's consolidated weights."""
    if kind == "fsdp":
        return state
    beside = {"optimizer": {}, "steps": 1500000, "args": NAMESPACE}
    return {"model" if kind == "ddp" else "module": state, **beside}


@pytest.mark.parametrize("kind", ["ddp", "deepspeed", "fsdp"])
@pytest.mark.parametrize("name", [name for name, row in CATALOGUE.items() if row.model.startswith("GPT")])
def test_every_published_file(tmp_path, capsys, monkeypatch, name, kind):
    """Its names and shapes load strictly without a word about which model it is; the sizes are the published ones."""
    monkeypatch.setattr(checkpoint, "first_not_finite", lambda state: None)  # billions of one stored number
    row = CATALOGUE[name]
    torch.save(wrapped(hollow(row.model), kind), tmp_path / row.file)
    model = GPT.from_pretrained(tmp_path / row.file, defaults={"block_size": (row.image_size // 16) ** 2})
    assert model.about == {"gpt_model": row.model, "weights": "model", **({} if kind == "fsdp" else {"steps": 1500000})}
    assert (model.config.vocab_size, model.config.num_classes) == (16384, 1000)
    assert model.config.block_size == (row.image_size // 16) ** 2
    assert not any(value.is_meta for value in [*model.state_dict().values(), *model.buffers()])
    line = capsys.readouterr().err
    assert f"loaded {row.model} from {tmp_path / row.file}: " in line and "float32, raw weights" in line
    millions = float(line.split("M parameters")[0].split()[-1])
    size = row.parameters
    assert round(millions / 1000, 1) == float(size[:-1]) if size.endswith("B") else round(millions) == int(size[:-1])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A stand-in for c2i_B_256.pt: the published names and shapes by formula, wrapped as published."""
    path, expected = tmp_path_factory.mktemp("published") / "c2i_B_256.pt", STATE_DICTS["GPT-B"]["state_dict"]
    state = {name: torch.from_numpy(formula(name, tuple(shape))) for name, shape in expected.items()}
    torch.save(wrapped({**state, "freqs_cis": torch.zeros(257, 32, 2)}, "ddp"), path)
    return path


@torch.inference_mode()
def golden_difference(model: Transformer) -> None:
    golden = np.load(DATA / "gpt_b.npz")
    patches = to_patches(torch.from_numpy(golden["idx"].astype(np.int64)), 1)
    logits = model(patches, torch.from_numpy(golden["cls"].astype(np.int64)))
    close(patch_loss(logits, patches), golden["loss_p1"])
    at = torch.from_numpy(golden["positions_p1"].astype(np.int64))
    close(logits[:, at][..., torch.from_numpy(golden["vocab"])], golden["logits_p1"])


def test_a_published_file_gives_the_published_numbers(published):
    golden_difference(GPT.from_pretrained(published))


def test_it_still_does_after_an_export_to_the_hub(published, tmp_path):
    """Through a folder for the Hub, by the mixin."""
    model = GPT.from_pretrained(published)
    model.save_pretrained(tmp_path / "hub")
    again = GPT.from_pretrained(tmp_path / "hub")
    assert again.about["gpt_model"] == "GPT-B" and "args" not in again.about
    golden_difference(again)


def test_ours_load_in_code_that_reads_published_files(tmp_path):
    """A plain weights-only torch.load and `["model"]`; nothing of this project is needed to read it."""
    content = {"model": small().state_dict(), "config": asdict(CONFIG), "args": {"lr": 0.1}, "steps": 3}
    checkpoint.save(tmp_path / "a.pt", content)
    found = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    assert all(value.equal(small().state_dict()[name]) for name, value in found.items())


def test_no_second_copy(tmp_path):
    """The model has the mapped file's tensors, and its rotary table is real."""
    checkpoint.save(tmp_path / "gpt.pt", {"model": small().state_dict(), "config": asdict(CONFIG)})
    model = GPT.from_pretrained(tmp_path / "gpt.pt")
    assert str(tmp_path / "gpt.pt") in Path("/proc/self/maps").read_text()
    codes, labels = torch.arange(4).view(1, 4, 1), torch.tensor([1])
    with torch.no_grad():
        assert model(codes, labels).equal(small().eval()(codes, labels))


@pytest.mark.parametrize("name", PRESETS)
def test_the_rotary_table_of_an_empty_model_is_real(name):
    model = GPT.empty(preset(name, n_layer=1))
    assert model.output.weight.is_meta
    assert model.rope.equal(rope_grid(model.config))


def test_what_is_pushed_to_the_hub_is_loaded_again(tmp_path, monkeypatch):
    content = {"config": asdict(CONFIG), "gpt_model": "GPT-XXS", "image_size": 32, "classes": ["a", "b"], "steps": 5}
    checkpoint.save(tmp_path / "gpt.pt", {**content, "model": small().state_dict(), "args": {"lr": 1}})
    model = GPT.from_pretrained(tmp_path / "gpt.pt")
    pushed = {}

    def upload(self, *, repo_id, folder_path, **_):
        pushed[repo_id] = [path.name for path in Path(folder_path).iterdir()]
        Path(folder_path).rename(tmp_path / "pushed")
        return "url"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: argparse.Namespace(repo_id="user/repo"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model.push_to_hub("user/repo")
    assert sorted(pushed["user/repo"]) == ["README.md", "config.json", "model.safetensors"]
    again = GPT.from_pretrained(tmp_path / "pushed")
    assert again.about == {**content, "weights": "model"} and again.config == CONFIG
    assert all(value.equal(small().state_dict()[name]) for name, value in again.state_dict().items())
    half = GPT.from_pretrained(tmp_path / "pushed", dtype=torch.bfloat16)
    assert half.output.weight.dtype == torch.bfloat16 and not half.training


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("n_layer", 10**9),
            ("n_layer", 5),
            ("dim", "128"),
            ("block_size", 10**12),
            ("vocab_size", 9),
            ("n_head", 3),
            ("n_head", 64),
        ],
    )
    def test_a_config_unlike_its_tensors(self, tmp_path, key, value):
        """Refused before anything of that size is built."""
        content = {"model": small().state_dict(), "config": {**asdict(CONFIG), key: value}}
        checkpoint.save(tmp_path / "gpt.pt", content)
        with pytest.raises(InputError, match=r"gpt\.pt: .*config"):
            GPT.from_pretrained(tmp_path / "gpt.pt")

    def test_a_preset_that_does_not_exist(self):
        with pytest.raises(InputError, match="there is no GPT GPT-Q"):
            GPT.from_pretrained({"model": small().state_dict(), "config": asdict(CONFIG)}, "GPT-Q")

    @pytest.mark.parametrize("gpt_model", [None, "GPT-XXS"])
    def test_a_file_of_another_kind_of_model(self, tmp_path, gpt_model):
        """A tokenizer's, say: it has a config too."""
        checkpoint.save(tmp_path / "vq.pt", {"model": {}, "config": {"ch": 32, "codebook_size": 8}})
        with pytest.raises(InputError, match=r"vq\.pt is no GPT of this code: its config does not fit"):
            GPT.from_pretrained(tmp_path / "vq.pt", gpt_model)

    def test_another_preset_is_asked_for(self, tmp_path):
        checkpoint.save(tmp_path / "gpt.pt", {"model": small().state_dict()})
        with pytest.raises(
            InputError,
            match=r"loaded as GPT-XS\) does not fit .*; they are those of GPT-XXS .vocab_size 8, num_classes 2",
        ):
            GPT.from_pretrained(tmp_path / "gpt.pt", "GPT-XS")

    def test_a_missing_tensor(self, tmp_path):
        state = small().state_dict()
        state.pop("norm.weight")
        checkpoint.save(tmp_path / "gpt.pt", {"model": state, "config": asdict(CONFIG)})
        with pytest.raises(InputError, match=r"norm\.weight is missing; no GPT preset has these tensors"):
            GPT.from_pretrained(tmp_path / "gpt.pt")


def test_what_a_file_does_not_say_is_read_off_its_tensors(tmp_path):
    checkpoint.save(tmp_path / "gpt.pt", {"model": small().state_dict()})
    loaded = GPT.from_pretrained(tmp_path / "gpt.pt", defaults={"block_size": 4})
    assert loaded.config == CONFIG and loaded.about["gpt_model"] == "GPT-XXS"
    assert GPT.from_pretrained(tmp_path / "gpt.pt").config.block_size == 256


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_told_apart_by_their_tensors(name):
    config = GPTConfig(**{**asdict(PRESETS[name]), "vocab_size": 11, "num_classes": 3})
    assert GPT.preset_of(GPT.empty(config).state_dict()) == name
