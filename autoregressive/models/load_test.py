"""What is no checkpoint of the GPT asked for ends in one line."""

from dataclasses import asdict

import pytest

from autoregressive.models.gpt import Transformer, preset
from autoregressive.models.load import load_gpt
from utils import checkpoint
from utils.cli import InputError

CONFIG = preset("GPT-XXS", vocab_size=8, num_classes=2, block_size=4)


@pytest.mark.parametrize("gpt_model", [None, "GPT-XXS"])
def test_a_file_of_another_kind_of_model(tmp_path, gpt_model):
    """A tokenizer's, say: it has a config too."""
    checkpoint.save(tmp_path / "vq.pt", {"model": {}, "config": {"ch": 32, "codebook_size": 8}})
    with pytest.raises(InputError, match=r"vq\.pt is no GPT of this code: its config does not fit"):
        load_gpt(tmp_path / "vq.pt", gpt_model)


def test_a_file_that_does_not_say_which_model_it_is(tmp_path):
    model = Transformer(CONFIG)
    checkpoint.save(tmp_path / "gpt.pt", {"model": model.state_dict()})
    with pytest.raises(InputError, match="does not say which model it is; give --gpt-model"):
        load_gpt(tmp_path / "gpt.pt")
    loaded, about = load_gpt(tmp_path / "gpt.pt", "GPT-XXS", vocab_size=8, num_classes=2, block_size=4)
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert about["weights"] == "model"


def test_dropouts_of_training_are_off(tmp_path):
    config = asdict(preset("GPT-XXS", vocab_size=8, num_classes=2, block_size=4, resid_dropout_p=0.5))
    checkpoint.save(tmp_path / "gpt.pt", {"model": Transformer(CONFIG).state_dict(), "config": config})
    assert not load_gpt(tmp_path / "gpt.pt")[0].training
