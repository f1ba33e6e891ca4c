"""The extraction's benchmark on a few images: its last line, equal codes, and the sizes on disk."""

import json

import numpy as np
from PIL import Image

from utils.testing import run_script


def test_it_measures_both_ways_on_the_same_codes(tmp_path):
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(256, size=(40 + i, 50, 3), dtype=np.uint8)).save(tmp_path / "a" / f"{i}.jpg")
    result = run_script(
        "scripts/benchmark/extract.py", "--data-path", tmp_path, "--images", "4", "--loop-images", "3",
        "--vq-model", "VQ-4-small", "--image-size", "32", "--ten-crop", "--crop-range", "1.1", "1.3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["benchmark"], last["differ"]) == ("extract", 0)
    assert last["ms"].keys() == {"read", "decode", "crop", "normalise", "encode", "quantise", "write"}
    assert last["bytes_ratio"] > 3.9
    assert 0 < last["not_encoder"] < 1
