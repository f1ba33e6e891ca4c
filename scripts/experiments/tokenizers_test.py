"""The experiment with tokenizers: which commands a variant gets, and the table of what was measured."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.experiments.tokenizers_report import report
from utils import samples
from utils.cli import InputError

SCRIPT = "tokenizers.sh"


def test_commands_of_each_variant(experiment, tmp_path):
    done, asked = experiment(SCRIPT, SETS="fashion-4 emoji-4")
    assert done.returncode == 0, done.stderr
    split = {name: sorted((tmp_path / "run" / "emoji" / name).rglob("*.png")) for name in ("train", "test")}
    assert len(split["train"]) == 38
    assert [path.name for path in split["test"]] == ["19.png", "29.png", "18 b.png", "28 b.png"]
    trained = {
        line.split("--results-dir ")[1].split()[0].split("/")[-1]: line for line in asked if "vq_train.py" in line
    }
    variants = ("plain", "plain-longer", "perceptual", "adversarial", "both")
    assert list(trained) == [f"{name}-{variant}" for name in ("fashion-4", "emoji-4") for variant in variants]
    for name, line in trained.items():
        assert ("--perceptual-network" in line) == name.endswith(("perceptual", "both"))
        assert ("--disc-weight" in line) == name.endswith(("adversarial", "both"))
        assert ("--vq-model VQ-4-small" in line) and (("/fashion/train" in line) == name.startswith("fashion"))
        epochs = 2 if name.endswith("longer") else 1
        assert f"--epochs {epochs * (30 if name.startswith('emoji') else 1)} " in line
    assert len([line for line in asked if "evaluator.py" in line]) == 10
    again, more = experiment(SCRIPT, SETS="fashion-4 emoji-4")
    assert again.returncode == 0
    assert not [line for line in more[len(asked) :] if "vq_train.py" in line or "evaluator.py" in line]


def test_an_unknown_set(experiment):
    done, _ = experiment(SCRIPT, SETS="mnist")
    assert done.returncode == 2 and "there is no set mnist" in done.stderr


def test_the_table(tmp_path):
    with pytest.raises(InputError, match="holds no finished tokenizer"):
        report(tmp_path)
    (tmp_path / "done").mkdir()
    pixels = np.zeros((30, 8, 8, 3), np.uint8)
    for name in ("a-1-plain-longer", "a-1-plain"):
        (tmp_path / "done" / f"{name}-evaluate").write_text("3\n1 2\n")
        (tmp_path / "done" / f"{name}-train").write_text("70\n1 2\n")
        figures = {"psnr": 26.2, "ssim": 0.91, "codebook_usage": 0.95, "perplexity": 300.4}
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
        (tmp_path / f"{name}.metrics.json").write_text(json.dumps({"metrics": {"fid": 0.95}}))
        samples.write(tmp_path / f"{name}-reference.npz", [pixels], pixels.shape, np.zeros(30))
        samples.write(tmp_path / f"{name}.npz", [pixels + 255], pixels.shape, np.zeros(30))
    lines = report(tmp_path).splitlines()
    rows = [
        lines.index(f"| a-1-{name} | 70 | 26.20 | 0.9100 | 95.0% | 300 | 0.950 |") for name in ("plain", "plain-longer")
    ]
    assert rows[0] + 1 == rows[1]
    assert "![A row a tokenizer](a-1.png)" in lines
    with Image.open(tmp_path / "a-1.png") as picture:
        assert len(picture.getcolors()) > 2
