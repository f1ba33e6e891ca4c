"""The loader's benchmark on a few images: its last line, that it writes once, and that it deletes only when told."""

import json
from pathlib import Path

from utils.testing import run_script


def run(path: Path, *arguments: str) -> tuple[str, dict]:
    result = run_script(
        "scripts/benchmark/loader.py", "--path", path, "--images", "60", "--per-image", "20", "--views", "2",
        "--image-tokens", "4", "--batch-size", "8", "--batches", "3", *arguments,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def test_it_writes_once_and_cleans_when_told(tmp_path):
    (tmp_path / "mine").mkdir()
    out, last = run(tmp_path)
    assert out.count("written now") == 2
    assert (last["benchmark"], last["packed"]["files"], last["per-image"]["files"]) == ("loader", 3, 41)
    assert all(
        last[layout][state]["samples_per_s"] > 0 for layout in ("packed", "per-image") for state in ("cold", "warm")
    )
    assert len(list(tmp_path.iterdir())) == 3
    out, _ = run(tmp_path, "--clean")
    assert out.count("there already") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
