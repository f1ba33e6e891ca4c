"""The experiment with tokenizers: which commands a variant gets, and the table of what was measured."""

import json
import os
import subprocess

import pytest

from scripts.experiments.tokenizers_report import report
from utils.cli import InputError
from utils.testing import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sys.prefix*) dirname "$0" ;;
    *) echo "$*" >> "$(dirname "$0")/asked" ;;
esac
case "$*" in
    *dataset.emoji*) mkdir -p "$3/a" "$3/b"; for i in $(seq 10 30); do touch "$3/a/$i.png" "$3/b/$i b.png"; done ;;
esac
"""


@pytest.fixture
def experiment(tmp_path):
    """Run the script with a Python that only notes what it is asked for."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(PYTHON)
    path.chmod(0o755)

    def run(**env):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(path), "RUN": str(tmp_path / "run"), **env}
        command = ["bash", str(ROOT / "scripts/experiments/tokenizers.sh")]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60, check=False)
        return done, (path.parent / "asked").read_text().splitlines() if (path.parent / "asked").is_file() else []

    return run


def test_commands_of_each_variant(experiment, tmp_path):
    done, asked = experiment(SETS="fashion-4 emoji-4")
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
    again, more = experiment(SETS="fashion-4 emoji-4")
    assert again.returncode == 0
    assert not [line for line in more[len(asked) :] if "vq_train.py" in line or "evaluator.py" in line]


def test_an_unknown_set(experiment):
    done, _ = experiment(SETS="mnist")
    assert done.returncode == 2 and "there is no set mnist" in done.stderr


def test_the_table(tmp_path):
    with pytest.raises(InputError, match="holds no finished tokenizer"):
        report(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "a-plain-evaluate").write_text("3\n1 2\n")
    (tmp_path / "done" / "a-plain-train").write_text("70\n1 2\n")
    figures = {"psnr": 26.2, "ssim": 0.91, "codebook_usage": 0.95, "perplexity": 300.4}
    (tmp_path / "a-plain.json").write_text(json.dumps(figures))
    (tmp_path / "a-plain.metrics.json").write_text(json.dumps({"metrics": {"fid": 0.95}}))
    text = report(tmp_path)
    assert "| a-plain | 70 | 26.20 | 0.9100 | 95.0% | 300 | 0.950 |" in text
    assert "![a-plain](a-plain.png)" in text
