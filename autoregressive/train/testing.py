"""For tests: a small folder of codes, and the training command on it."""

from collections.abc import Collection
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from dataset.codes import toy
from tokenizer.tokenizer_image.vq_model import VQModel, preset
from utils import checkpoint
from utils.log import read_metrics
from utils.testing import run_script

SCRIPT = "autoregressive/train/train_c2i.py"


def write_codes(root: Path, seed: int = 0) -> Path:
    """48 images of 4x4 codes of 64 in two views and three classes, each class favouring its own codes; returns root."""
    labels = np.arange(48) % 3
    codes = np.random.default_rng(seed).integers(16, size=(48, 2, 16)) + 16 * labels[:, None, None]
    toy.write_codes(root, images=48, codebook=64, shard_size=20, vq_model="VQ-4-small", codes=codes, labels=labels)
    return root


def flags(code_path: Path, results: Path, without: Collection[str] = ()) -> list[str]:
    """A training of 4 epochs of 6 steps, half of them on patches of side 2. without: names of flags to leave out."""
    values = {
        "code-path": code_path, "val-code-path": code_path, "dataset": "toy", "image-size": 32, "results-dir": results,
        "gpt-model": "GPT-XXS", "global-batch-size": 8, "epochs": 4, "patch-level": 2, "lr": 1e-3, "log-every": 1,
    }  # fmt: skip
    words = [(f"--{name}", str(value)) for name, value in values.items() if name not in without]
    return ["--scheduler", *chain.from_iterable(words)]


def completed(*arguments: str | Path, processes: int = 1) -> str:
    """Run the training command, which must end well; what it prints."""
    result = run_script(SCRIPT, *arguments, processes=processes, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(folder: Path, key: str) -> list[float]:
    """The values of a key in a run's metrics, also while it is writing them."""
    return [row[key] for row in read_metrics(folder) if key in row]


def save_tokenizer(path: Path, codebook_size: int) -> Path:
    """An untrained VQ-4-small as vq_train.py writes it; returns path."""
    config = preset("VQ-4-small", codebook_size=codebook_size)
    checkpoint.save(path, {"model": VQModel(config).state_dict(), "config": asdict(config), "vq_model": "VQ-4-small"})
    return path
