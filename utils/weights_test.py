"""Safetensors files and folders: what is written is read, shards too, and a folder appears whole or not at all."""

import json

import pytest
import torch

from utils import weights
from utils.cli import InputError

STATE = {
    "a.weight": torch.arange(600.0).view(20, 30),
    "a.bias": torch.ones(5, dtype=torch.bfloat16),
    "n": torch.zeros(3),
}
ABOUT = {"config": {"dim": 3, "levels": [1, 2]}, "gpt_model": "GPT-B", "steps": 7}


def test_shards_are_read_as_one(tmp_path):
    weights.fill_folder(tmp_path, STATE, ABOUT, shard=1000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "model.safetensors.index.json" in names and "model-00002-of-00002.safetensors" in names
    found = weights.read(tmp_path)
    assert {key: found[key] for key in ABOUT} == ABOUT
    assert found["model"].keys() == STATE.keys()
    assert all(found["model"][name].equal(tensor) for name, tensor in STATE.items())
    assert found["model"]["a.bias"].dtype == torch.bfloat16


def test_the_config_is_where_the_hub_expects_it(tmp_path):
    weights.write_folder(tmp_path / "out", STATE, ABOUT, "# card")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dim": 3, "levels": [1, 2], "next_patch_prediction": {"gpt_model": "GPT-B", "steps": 7}}
    assert (tmp_path / "out" / "README.md").read_text() == "# card"


def test_a_folder_without_our_key(tmp_path):
    """Written by others: the whole of config.json is the config."""
    weights.fill_folder(tmp_path, STATE, {})
    (tmp_path / "config.json").write_text('{"dim": 5}')
    found = weights.read(tmp_path)
    assert found["config"] == {"dim": 5} and set(found) == {"config", "model"}


def test_a_shard_that_is_missing_or_incomplete(tmp_path):
    weights.fill_folder(tmp_path, STATE, ABOUT, shard=1000)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    held = weights.read(shard)["model"]
    weights.write_file(shard, {"other": torch.zeros(1)}, {})
    with pytest.raises(InputError, match=f"lacks {next(iter(held))}"):
        weights.read(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name} \(0 bytes\) is missing"):
        weights.read(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    weights.write_file(tmp_path / "x.safetensors", STATE, {})
    (tmp_path / "in" / "model.safetensors.index.json").write_text('{"weight_map": {"n": "../x.safetensors"}}')
    with pytest.raises(InputError, match="names a file outside its folder"):
        weights.read(tmp_path / "in")


def test_wrong_folders(tmp_path):
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        weights.read(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        weights.read(tmp_path)


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        weights.write_folder(tmp_path / "out", STATE, {"config": {}, "no json": torch.zeros(1)}, "")
    assert list(tmp_path.iterdir()) == []
    weights.write_folder(tmp_path / "out", STATE, ABOUT, "")
    with pytest.raises(InputError, match="out is there already"):
        weights.write_folder(tmp_path / "out", STATE, ABOUT, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
