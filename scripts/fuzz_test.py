"""Hostile flags and files, seeded and bounded: a right result or one line, never another exception and never a hang."""

import importlib
import io
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models import gpt
from autoregressive.models.gpt import GPT
from dataset.codes.manifest import load_array, read_manifest
from dataset.crops import Unreadable, decode
from evaluations.c2i.classifier import Classifier, fused
from evaluations.c2i.features import FeatureNetwork
from tokenizer.tokenizer_image import vq_model
from tokenizer.tokenizer_image.vq_model import Tokenizer
from utils import checkpoint, cli, samples
from utils.log import read_metrics
from utils.networks import save_network
from utils.records import Record, read_json
from utils.settings import Settings, _plain_type
from utils.testing import ROOT

ROOMS = ("autoregressive", "dataset", "evaluations", "pretrained_models", "scripts", "tokenizer", "utils")
LONGEST_LINE = 2000  # characters of an error message


@cache
def subclasses(base: type) -> list[type]:
    """All subclasses of the base in the repository."""
    pattern = rf"class \w+\(\w*{base.__name__}\b"
    for path in sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        if not path.name.endswith("_test.py") and re.search(pattern, path.read_text()):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found, queue = set(), [base]
    while queue:
        kinds = queue.pop().__subclasses__()
        found.update(kinds)
        queue += kinds
    own = [kind for kind in found if kind.__module__.split(".")[0] in ROOMS and not kind.__module__.endswith("_test")]
    return sorted(own, key=lambda kind: kind.__qualname__)


HOSTILE = [
    "", " ", "0", "-1", "-0", "1.5", "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 5000, "0x10", "true", "--", "-", "../..",
    "a\0b", "\udcff", "\u202e", "x" * 100_000, "{}", "/dev/null", "%s%n",
]  # fmt: skip


@pytest.fixture
def parse(capsys, tmp_path, monkeypatch):
    """parse(kind, arguments): the settings, or the one line that refuses them."""
    (tmp_path / "file").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parsers: dict[type, cli.Parser] = {}

    def call(kind: type[Settings], arguments: list[str]) -> Settings | str:
        if kind not in parsers:
            parsers[kind] = cli.Parser("Fuzzed.")
            kind.add_flags(parsers[kind])
        try:
            return kind.from_namespace(parsers[kind], parsers[kind].parse_args(arguments))
        except SystemExit as error:
            line = capsys.readouterr().err
            assert error.code == 2, arguments
            assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line[:500]
            assert len(line) < LONGEST_LINE, f"{len(line)} characters for {str(arguments)[:200]}"
            return line

    return call


def required(kind: type[Settings], parse: Callable) -> dict[str, list[str]]:
    """Values of the required flags that the class accepts."""
    values: dict[str, list[str]] = {}
    for name, field in kind.model_fields.items():
        if not field.is_required():
            continue
        positional = (field.json_schema_extra or {}).get("positional")
        flag = [] if positional else [f"--{name.replace('_', '-')}"]
        plain = _plain_type(field.annotation)[0]
        choices = [str(value) for value in get_args(plain)] if get_origin(plain) is not list else []
        for text in [*choices, "file", ".", "1", "a"]:
            values[name] = [*flag, text]
            others = [item for key, items in values.items() for item in items if key != name]
            answer = parse(kind, [*values[name], *others])
            if not (isinstance(answer, str) and f"argument {''.join(flag) or name}:" in answer):
                break
    return values


@pytest.mark.parametrize("kind", subclasses(Settings), ids=lambda kind: kind.__qualname__)
def test_every_flag_parses_or_is_refused_in_one_line(kind, parse):
    base = required(kind, parse)
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra or {}
        flag = f"--{name.replace('_', '-')}"
        others = [item for key, items in base.items() for item in items if key != name]
        for text in HOSTILE:
            given = [text] if extra.get("positional") else [f"{flag}={text}"]
            settings = parse(kind, [*others, *given])
            if isinstance(settings, str):
                continue
            numbers = getattr(settings, name)
            for number in numbers if isinstance(numbers, list) else [numbers]:
                assert not isinstance(number, float) or math.isfinite(number), (name, text)
        parse(kind, [*others, flag])  # without a value
        parse(kind, [*others, flag, "1", "2", "3"])


def test_the_stages_are_among_them():
    names = {kind.__name__ for kind in subclasses(Settings)}
    assert {"DownloadSettings", "ExportSettings", "TrainSettings"} <= names
    assert "Settings" not in names
    assert len(names) >= 11


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """A sound file of every kind, by suffix."""
    folder, rng = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    torch.manual_seed(0)
    config = gpt.preset("GPT-XXS", n_layer=1, dim=16, n_head=1, vocab_size=8, num_classes=2, block_size=4)
    model = gpt.Transformer(config)
    checkpoint.save(folder / "gpt.pt", {"model": model.state_dict(), "config": asdict(config), "steps": 3})
    small = {"head.weight": torch.randn(5, 3), "head.bias": torch.zeros(5)}
    checkpoint.save(folder / "a.pt", {"model": small, "steps": 3})
    checkpoint.save_safetensors(folder / "a.safetensors", small, {"steps": 3})
    np.savez(folder / "a.npz", rng.integers(256, size=(6, 8, 8, 3), dtype=np.uint8), np.arange(6))
    np.save(folder / "a.npy", rng.integers(9, size=(4, 2, 16), dtype=np.uint16))
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / "a.jpg")
    save_network(folder / "a.pt2", fused(Classifier(2)), 8, "small")
    record = '{"format": 3, "images": 6, "name": "toy", "finished": true, "settings": {"lr": 0.1}}'
    (folder / "a.json").write_text(record)
    (folder / "a.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    return {path.suffix if path.name != "gpt.pt" else ".gpt.pt": path.read_bytes() for path in folder.iterdir()}


def images_of(path: Path) -> np.ndarray:
    file = samples.Samples(path)
    return np.concatenate(list(file.batches(4)))


def every_record(path: Path) -> None:
    for kind in subclasses(Record):
        with_one_line(kind.read, path)
    with_one_line(read_manifest, path)
    with_one_line(read_json, path)


def with_one_line(read: Callable[[Path], Any], path: Path) -> Any:
    """What read(path) gives; None where it raises what ends a command in one line."""
    try:
        return read(path)
    except Unreadable:
        return None
    except Exception as error:
        line = cli.explain(error)
        assert line is not None, f"{read} of {path.name}: {error!r}"
        assert line and "\n" not in line and len(line) < LONGEST_LINE, line[:500]
        return None


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": lambda path: checkpoint.load(path)["model"],
    ".gpt.pt": lambda path: GPT.from_pretrained(path).state_dict(),
    ".vq.pt": lambda path: Tokenizer.from_pretrained(path).state_dict(),
    ".safetensors": lambda path: checkpoint.load(path)["model"],
    ".npz": images_of,
    ".npy": load_array,
    ".png": decode,
    ".jpg": decode,
    ".pt2": FeatureNetwork.load,
    ".json": every_record,
    ".jsonl": lambda path: read_metrics(path.parent),
}
CHECKSUMS = (".pt", ".gpt.pt", ".npz")  # kinds whose flipped bits are seen
ROUNDS = {".pt2": 3, ".gpt.pt": 10}


def damaged(content: bytes, rng: random.Random, rounds: int) -> dict[str, bytes]:
    """Empty, cut, flipped and repeated forms of a file."""
    forms = {"empty": b"", "zeros": bytes(len(content)), "twice": content * 2, "one byte": content[:1]}
    for i in range(rounds):
        forms[f"cut {i}"] = content[: rng.randrange(len(content))]
        flipped = bytearray(content)
        for place in rng.sample(range(len(content)), rng.choice((1, 1, 8))):
            flipped[place] ^= 1 << rng.randrange(8)
        forms[f"flipped {i}"] = bytes(flipped)
        start = rng.randrange(len(content))
        forms[f"hole {i}"] = content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]
    return forms


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


@pytest.mark.parametrize("suffix", READERS)
def test_damaged_and_foreign_files_are_one_line_or_read_right(suffix, good, tmp_path):
    own, read = good.get(suffix, good[".gpt.pt"]), READERS[suffix]
    path = tmp_path / ("metrics.jsonl" if suffix == ".jsonl" else f"file{Path(suffix).suffix or suffix}")
    rng = random.Random(suffix)
    path.write_bytes(own)
    whole = with_one_line(read, path)
    assert whole is not None or suffix in (".json", ".vq.pt")
    forms = damaged(own, rng, ROUNDS.get(suffix, 30)) | {f"foreign {kind}": data for kind, data in good.items()}
    for name, content in forms.items():
        path.write_bytes(content)
        got = with_one_line(read, path)
        if suffix in CHECKSUMS and name.startswith(("flipped", "cut", "hole")) and got is not None:
            assert same(got, whole), f"{name} was read as something else"
    path.unlink()
    with_one_line(read, path)  # missing
    path.mkdir()
    with_one_line(read, path)  # a folder


JSON = ["null", "[]", "{}", "3", '"text"', "NaN", "{" * 5000,
        '{"a":' * 5000, "\ufeff{}", '{"format": "3"}', '{"format": 1e400}',
        '{"images": -1}', '{"images": null, "settings": []}', '{"steps": 1.5, "model": {"a": []}}', "[1, 2"]  # fmt: skip


@pytest.mark.parametrize("content", JSON, ids=range(len(JSON)))
def test_odd_json_is_one_line(content, tmp_path):
    for name, data in (("a.json", content.encode()), ("b.json", content.encode("utf-16"))):
        (tmp_path / name).write_bytes(data)
        every_record(tmp_path / name)
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with_one_line(read_metrics, tmp_path)


ODD_CHECKPOINTS: list[Any] = [
    None, 3, [], {}, {"model": None}, {"model": 3}, {"model": {}}, {"model": {"a": 3}}, {"model": {3: torch.zeros(2)}},
    {"model": {"tok_embeddings.weight": torch.zeros(0)}}, {"model": {"output.weight": torch.zeros(2, 2, 2)}},
    {"model": {"a": torch.zeros(2)}, "config": {"n_layer": 10**9}}, {"model": {"a": torch.zeros(2)}, "config": [1]},
    {"model": {"a": torch.zeros(2)}, "gpt_model": "../../x", "vq_model": 7, "args": 3}, torch.zeros(3),
    {"model": {"a": torch.zeros(2, dtype=torch.complex64)}}, {"model": {"a": torch.full((2,), torch.nan)}},
    {"model": {"a": torch.zeros(2).to_sparse()}}, {"model": {"a": torch.zeros(2)}, "ema": 5, "steps": "x"},
]  # fmt: skip


@pytest.mark.parametrize("content", ODD_CHECKPOINTS, ids=range(len(ODD_CHECKPOINTS)))
def test_odd_checkpoints_are_one_line(content, tmp_path):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    for read in (GPT.from_pretrained, Tokenizer.from_pretrained):
        assert with_one_line(read, tmp_path / "a.pt") is None


def test_a_tokenizer_with_a_tensor_of_another_shape_is_one_line(tmp_path):
    state = vq_model.VQModel(vq_model.preset("VQ-4-small", codebook_size=8)).state_dict()
    for name in (min(state), max(state)):
        for tensor in (torch.zeros(1), torch.zeros(0), torch.zeros(3, dtype=torch.int64)):
            torch.save({"model": {**state, name: tensor}}, tmp_path / "b.pt")
            assert with_one_line(Tokenizer.from_pretrained, tmp_path / "b.pt") is None
