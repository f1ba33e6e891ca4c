"""`python -m pretrained_models.export`: EMA or raw weights out, with the config, readable again; a folder has a model card."""

import json
from types import SimpleNamespace

import pytest
import torch

from pretrained_models.export import main, write_folder
from utils import checkpoint, cli
from utils.files import file_lock
from utils.testing import ROOT, assert_refused

RAW = {"tok_embeddings.weight": torch.arange(6.0).view(2, 3), "norm.weight": torch.ones(3)}
EMA = {name: tensor + 0.5 for name, tensor in RAW.items()}
ABOUT = {"config": {"dim": 3}, "gpt_model": "GPT-B", "image_size": 32, "classes": ["a"], "steps": 20}
ARGS = {"lr": 1e-4, "epochs": 300, "patch_level": 2, "results_dir": "private/results", "patch_sizes": None}


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as training leaves it, with a checkpoint before the last step."""
    folder = tmp_path / "000-GPT-B"
    rows = [
        {"step": 10, "loss": 9.0},
        {"step": 20, "loss": 8.0},
        {"step": 20, "val_loss": 8.5},
        {"step": 30, "loss": 7.0},
    ]
    content = {**ABOUT, "model": RAW, "ema": EMA, "optimizer": {}, "args": ARGS, "recent": torch.zeros(1)}
    checkpoint.save(folder / "checkpoints" / "0000020.pt", content)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def export(monkeypatch, capsys):
    """Run the command in this process; gives what it printed, and its status."""

    def call(*arguments) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
        status = 0
        try:
            cli.run(main)
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return call


def found(path) -> tuple[dict, dict]:
    content = checkpoint.load(path)
    return checkpoint.about(content), checkpoint.state_dict(content)


@pytest.mark.parametrize("out", ["a.safetensors", "folder"])
def test_what_is_written_is_read(export, run_folder, tmp_path, out):
    source = run_folder / "checkpoints" / "0000020.pt"
    result = export(source, tmp_path / out)
    assert result.returncode == 0, result.stderr
    assert f"wrote {tmp_path / out} from {source}: " in result.stdout and "EMA weights, 20 steps" in result.stdout
    about, state = found(tmp_path / out)
    assert about == {**ABOUT, "weights": "ema"}  # no arguments: they name the user's folders
    assert all(state[name].equal(tensor) for name, tensor in EMA.items()) and len(state) == len(EMA)
    again = export(tmp_path / out, tmp_path / "again.safetensors", "--dtype", "bfloat16")
    assert "EMA weights" in again.stdout
    about, state = found(tmp_path / "again.safetensors")
    assert about == {**ABOUT, "weights": "ema"} and {t.dtype for t in state.values()} == {torch.bfloat16}


def test_raw_weights(export, run_folder, tmp_path):
    result = export(run_folder / "checkpoints" / "0000020.pt", tmp_path / "a.safetensors", "--weights", "model")
    assert "raw weights" in result.stdout
    about, state = found(tmp_path / "a.safetensors")
    assert about["weights"] == "model" and all(state[name].equal(tensor) for name, tensor in RAW.items())


def test_the_card_has_the_recipe_and_what_was_measured(export, run_folder, tmp_path):
    metrics = tmp_path / "s-cfg-2.0.metrics.json"
    metrics.write_text(json.dumps({"metrics": {"fid": 4.4712, "precision": 0.8}, "network": {"name": "Inception"}}))
    result = export(run_folder / "checkpoints" / "0000020.pt", tmp_path / "out", "--metrics", metrics)
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\ntags:\n- autoregressive-image-generation\n")
    for line in (
        "# GPT-B", "| lr | 0.0001 |", "| patch_level | 2 |", "| loss | 8.0000 | 20 |", "| val_loss | 8.5000 | 20 |",
        "| s-cfg-2.0 | Inception | fid 4.471, precision 0.8 |", "from autoregressive.models.gpt import GPT",
    ):  # fmt: skip
        assert line in card.splitlines(), f"{line!r} not in\n{card}"
    assert "private" not in card and "patch_sizes" not in card and "7.0" not in card


def test_a_bare_file_has_a_card_without_recipe(export, tmp_path):
    torch.save({"quantize.embedding.weight": torch.zeros(4, 2)}, tmp_path / "vq.pt")
    assert export(tmp_path / "vq.pt", tmp_path / "out").returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from tokenizer.tokenizer_image.vq_model import Tokenizer" in card
    assert not any(heading in card for heading in ("## Recipe", "## Training", "## Figures"))


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_folder(tmp_path / "out", RAW, {"config": {}, "no json": torch.zeros(1)}, "")
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "out", RAW, ABOUT, "# card")
    config = json.loads((tmp_path / "out" / "config.json").read_text())  # where the Hub expects it
    assert config == {"dim": 3, "next_patch_prediction": {key: ABOUT[key] for key in ABOUT if key != "config"}}
    assert (tmp_path / "out" / "README.md").read_text() == "# card"
    with pytest.raises(cli.InputError, match="out is there already"):
        write_folder(tmp_path / "out", RAW, ABOUT, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_inputs(export, run_folder, tmp_path):
    source = run_folder / "checkpoints" / "0000020.pt"
    (tmp_path / "there").mkdir()
    (tmp_path / "x.json").write_text("{}")
    assert_refused(export(source, tmp_path / "there"), "there is there already: give a new folder")
    assert_refused(export(tmp_path / "none.pt", tmp_path / "out"), "there is no file")
    assert_refused(export(source, tmp_path / "out", "--metrics", tmp_path / "x.json"), "is no SAMPLES.metrics.json")
    assert_refused(
        export(source, tmp_path / "o.safetensors", "--metrics", tmp_path / "x.json"), "goes into the model card"
    )
    checkpoint.save(tmp_path / "raw.pt", {"model": RAW})
    assert_refused(
        export(tmp_path / "raw.pt", tmp_path / "out", "--weights", "ema"), "no EMA weights in this checkpoint"
    )
    assert_refused(export(source, tmp_path / "x.json" / "out"), "cannot be made", "is no folder")
    assert_refused(export(source, tmp_path / "out", "--dtype", "int8"), "invalid choice")
    with file_lock(tmp_path / "out"):
        assert_refused(export(source, tmp_path / "out"), "is in use by process")
    assert not (tmp_path / "out").exists() and not (ROOT / "out").exists()
