"""The whole command on a small folder, and again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.records import read_json
from utils.testing import ROOT, assert_refused

FLAGS = (
    "--image-size", "16", "--epochs", "2", "--batch-size", "8", "--samples", "24", "--classifier-flags=--epochs 1",
    "--tokenizer-flags=--epochs 1 --codebook-size 32", "--time-budget", "5m",
)  # fmt: skip


def pipeline(folder: Path, *flags: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = [sys.executable, "-m", "scripts.pipeline", "--images", str(folder), *map(str, flags)]
    return subprocess.run(
        command, cwd=folder.parent, env=environment, text=True, capture_output=True, timeout=900, check=False
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("été", 45), ("b c", 45), ("three", 3)):
        for i in range(n):
            path = tmp_path / "My photos" / name / f"{i} x.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(18, 20, 3), dtype=np.uint8)).save(path)
    (tmp_path / "My photos" / "b c" / "7 x.png").write_bytes(b"no image")
    (tmp_path / "My photos" / "b c" / "notes.txt").touch()
    return tmp_path / "My photos"


@pytest.mark.slow
def test_a_folder_becomes_a_report_and_the_same_command_has_nothing_left_to_do(folder, tmp_path):
    run = tmp_path / "a run"
    first = pipeline(folder, "--run", run, *FLAGS)
    assert first.returncode == 0, first.stderr[-3000:]
    plan = read_json(run / "plan.json")
    assert plan["classes"] == ["b c", "three", "été"] and (plan["train_images"], plan["test_images"]) == (84, 9)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # samples, reconstructions, three classes, losses
    for part in ("été", "b c", ".txt files", "cannot be read", "nearest", "pretrained_models.export"):
        assert part in page
    again = pipeline(folder, "--run", run, *FLAGS)
    assert again.returncode == 0 and "measuring" not in again.stderr
    ran = re.findall(r"^== (\w+): (.*)$", again.stdout, re.MULTILINE)
    assert len(ran) == 11 and all(what == "done before" for _, what in ran)
    Image.new("RGB", (30, 30)).save(folder / "été" / "new.png")
    assert_refused(pipeline(folder, "--run", run, *FLAGS), "is of other images", "--run")


def test_a_dry_run_prints_the_plan_and_leaves_nothing(folder, tmp_path):
    result = pipeline(folder, "--run", tmp_path / "run", *FLAGS, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "plan for My-photos: 84 images to train on, 9 held out, 3 classes, 16 px" in result.stdout
    assert "== train: bash scripts/autoregressive/train_c2i.sh" in result.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
