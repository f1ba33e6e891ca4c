"""The quickstart: what it asks of each stage, with a Python that only notes what it is asked for."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.pipeline.settings import parse_flags
from utils.testing import ROOT

PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *sys.prefix*) dirname "$0" ;;
    "-m scripts.pipeline"*) exec {shlex.quote(sys.executable)} "$@" --dry-run ;;
    *) echo "$*" >> "$(dirname "$0")/asked" ;;
esac
"""
VQ, IMAGES = "RUN/tokenizer/vq.pt", "RUN/images"
# What the README's figures were made with: every flag that is not a default.
EXPECTED = {
    "reference": f"{IMAGES}/train RUN/reference.npz --image-size 32 --num-images 160",
    "test_images": f"{IMAGES}/test RUN/test.npz --image-size 32 --num-images 20",
    "classifier": f"--data-path {IMAGES}/train --val-path {IMAGES}/test --image-size 32 --name fashion-mnist-classifier "
    "--out RUN/classifier.pt2 --epochs 3 --global-batch-size 128",
    "tokenizer": f"--data-path {IMAGES}/train --vq-model VQ-4-small --image-size 32 --results-dir RUN/tokenizer --no-flip "
    "--global-batch-size BATCH --lr 6e-3 --restart-dead-codes 25 --ckpt-every 500 --epochs 1 --ema-decay 0.999",
    "reconstruct": f"--data-path {IMAGES}/test --vq-ckpt {VQ} --image-size 32 --num-images 20 --out RUN/reconstructions.npz",
    "codes": f"--vq-ckpt {VQ} --dataset fashion --data-path {IMAGES}/train --code-path RUN/codes/train --image-size 32 "
    "--no-flip",
    "test_codes": f"--vq-ckpt {VQ} --dataset fashion --data-path {IMAGES}/test --code-path RUN/codes/test --image-size 32 "
    "--no-flip",
    "train": "--code-path RUN/codes/train --val-code-path RUN/codes/test --dataset fashion --image-size 32 "
    "--results-dir RUN/gpt --gpt-model GPT-XXS --patch-level 2 --epoch-rate 0.5 --scheduler --warmup-epochs 0.1 "
    "--decay-ratio 0.4 --lr 3e-3 --end-lr 1e-5 --global-batch-size BATCH "
    "--dropout-p 0 --token-dropout-p 0 --ema --log-every 25 --ckpt-every 500 "
    f"--vq-ckpt {VQ} --sample-every 1 --epochs 2 --val-images 1000 --val-every 180 --ema-decay 0.99",
    "sample": f"--vq-ckpt {VQ} --gpt-ckpt RUN/gpt/*-GPT-XXS/checkpoints/*.pt --cfg-scale 2 --labels balanced "
    "--num-fid-samples 5000 --per-proc-batch-size 500 --sample-dir RUN/samples",
    "grid": f"--vq-ckpt {VQ} --gpt-ckpt RUN/gpt/*-GPT-XXS/checkpoints/*.pt --cfg-scale 2 --per-class 12 --scale 2 "
    "--out RUN/samples.png",
    "evaluate": "RUN/reference.npz RUN/samples/*.npz RUN/reconstructions.npz RUN/test.npz --network RUN/classifier.pt2",
}  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A Python beside a run with few images, so that numbers of images are those there are."""
    root = tmp_path_factory.mktemp("quickstart")
    rng = np.random.default_rng(0)
    for split, n in (("train", 160), ("test", 20)):
        for i in range(n):
            path = root / "my run" / "images" / split / f"class {i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    path = root / "bin" / "python"
    path.parent.mkdir()
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def commands(python: Path, **env: str) -> dict[str, list[str]]:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(python),
        "RUN": "my run",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")], cwd=python.parents[1], env=environment, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = str(python.parents[1] / "my run")
    lines = [line.removeprefix("== ").partition(": ") for line in done.stdout.splitlines() if line.startswith("== ")]
    return {name: command.replace(run, "RUN").split() for name, _, command in lines}


def same(words: list[str], expected: str, batch: int) -> None:
    """Whether a command has these files and flags; 0.01 is 1e-2."""
    start = next(i for i, word in enumerate(words) if word.endswith((".sh", ".py", "reference"))) + 1
    got = parse_flags(shlex.join(["--files", *words[start:]]))
    wanted = parse_flags(f"--files {expected.replace('BATCH', str(batch))}")
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        for value, other in zip(got[name], values, strict=True):
            assert value == other or float(value) == float(other), (name, value, other)


def test_every_stage_is_asked_for_what_the_figures_were_made_with(python):
    found = commands(python)
    assert list(found) == list(EXPECTED)
    for name, words in found.items():
        same(words, EXPECTED[name], 64)
    asked = (python.parent / "asked").read_text().splitlines()
    assert asked[-1] == f"-m dataset.fashion_mnist {python.parents[1] / 'my run' / 'images'}"


def test_the_slice_is_another_plan_and_processes_share_the_batch(python):
    words = commands(python, QUICKSTART_SMOKE="1", NPROC_PER_NODE="5")["train"]
    assert words[words.index("--epochs") + 1] == "6"
    assert words[words.index("--global-batch-size") + 1] == "60"
