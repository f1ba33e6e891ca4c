"""Each benchmark on next to nothing: its last line, and what it compares is equal."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.benchmark import data, evaluate, harness, sample, train
from utils import machine


@pytest.fixture
def last_line(capsys, monkeypatch):
    """last_line(module, *arguments): the JSON that a benchmark ends with; all in this process, rates measured by one call."""
    monkeypatch.setattr(harness, "in_a_process", lambda call, *arguments: call(*arguments))
    for module in (machine, sample, data, train):
        monkeypatch.setattr(module, "durations", lambda call, *_, **__: [harness.timed(call)[0]])

    def run(module, *arguments: object) -> dict:
        module.main([str(argument) for argument in arguments])
        content = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert content["benchmark"] == module.__name__.rsplit(".", 1)[-1]
        assert {"device", "threads", "torch", "python", "date", "settings"} <= content.keys()
        return content

    return run


TINY = ("--gpt-model", "GPT-XXS", "--image-tokens", 16, "--vocab-size", 64)


def test_training(last_line):
    short = ("--batch-size", 2, "--steps", 1, "--epochs", 2, "--steps-per-epoch", 2)
    result = last_line(train, *TINY, *short, "--measure", "steps", "runs")
    steps, runs = result["steps"], result["runs"]
    assert [row["patch"] for row in steps] == [1, 2, 4]
    assert [row["positions"] for row in steps] == [1, 0.25, 0.0625]
    assert [(row["levels"], row["positions"]) for row in runs] == [(1, 1.0), (2, 0.625)]
    assert all(0 < row["steps alone"] < row["seconds"] for row in runs)


def test_operations(last_line):
    rows = last_line(train, *TINY, "--batch-size", 2, "--steps", 1, "--measure", "operations")["operations"]
    assert [row["operation"] for row in rows].count("product, dweight") == 3
    dropouts = [row["shape"] for row in rows if row["operation"] == "dropout"]
    assert dropouts == ["16 positions", "4 positions", "1 positions"]
    assert all(row["gain"] == row["PyTorch's"] / row["ms"] for row in rows)


def test_a_patch_side_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="--patch-sizes 3 does not divide the grid of 4x4"):
        train.main(["--image-tokens", "16", "--patch-sizes", "1", "3"])


def test_sampling(last_line, tmp_path):
    result = last_line(
        sample, *TINY, "--batch-sizes", 2, "--repeats", 1, "--vq-model", "VQ-4-small",
        "--measure", "decoding", "loading", "writing", "--images", 5, "--image-size", 8, "--write-batch", 2,
        "--folder", tmp_path,
    )  # fmt: skip
    (row,) = result["decoding"]
    assert row["same codes"] == 1
    assert [row["file"] for row in result["loading"]] == ["gpt.pt", "shards"]
    assert result["writing"]["as written"] is True
    assert list(tmp_path.iterdir()) == []


def test_extraction(last_line, tmp_path):
    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(256, size=(40 + i, 50, 3), dtype=np.uint8)).save(tmp_path / "a" / f"{i}.jpg")
    result = last_line(
        data, "--data-path", tmp_path, "--images", 4, "--loop-images", 3, "--vq-model", "VQ-4-small", "--image-size", 32,
        "--ten-crop", "--crop-range", 1.1, 1.3,
    )["extraction"]  # fmt: skip
    assert result["codes differ"] == 0
    assert result["ms"].keys() == {"decode", "crop", "encode", "write"}
    assert 0 < result["outside the encoder"] < 1


def test_codes_are_written_once_then_read(last_line, tmp_path):
    arguments = (
        "--measure", "reading", "--code-path", tmp_path, "--code-images", 60, "--views", 2, "--image-tokens", 4,
        "--global-batch-size", 8, "--batches", 3,
    )  # fmt: skip
    rows = last_line(data, *arguments)["reading"]
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    assert all(row["samples/s"] > 0 and row["GB"] > 0 for row in rows)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    last_line(data, *arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written


def test_evaluation(last_line):
    result = last_line(evaluate, "--samples", 12, "--references", 8, "--image-size", 16, "--network-images", 1)
    assert result["images_per_s"] > 0
    phases = [row["phase"] for row in result["rows"]]
    assert phases[:2] == ["network (torch)", "reference: read 8 images, moments"]
    assert phases[-1] == "precision and recall"
