"""The Inception network from its graph: against the published evaluator's activations and figures, and TensorFlow."""

import hashlib
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i import metrics
from evaluations.c2i.evaluator import given_statistics
from evaluations.c2i.features import extract
from evaluations.c2i.graphdef import read_graph
from evaluations.c2i.inception import WEIGHTS, load_inception, read_inception, resize_tf1
from evaluations.c2i.manifold import Manifold, precision_recall
from evaluations.c2i.testdata import golden_inputs
from evaluations.c2i.testdata.stand_in import drawn_features, write_stand_in
from utils.cli import InputError
from utils.fake_gpu import GPU, fake_gpu
from utils.samples import Samples
from utils.testing import ROOT

GOLDEN = json.loads((Path(__file__).parent / "testdata" / "evaluator.json").read_text())
CASES = {name: case for name, case in GOLDEN["cases"].items() if "activations" in case}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("graph") / "classify_image_graph_def.pb")


@pytest.fixture(scope="module")
def network(graph):
    return load_inception(graph)


def images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def test_the_stand_in_has_the_golden_weights(graph):
    """So the golden figures hold for it."""
    digest = hashlib.sha256()
    for node in read_inception(graph).values():
        if node.op == "Const" and isinstance(node.attrs["value"], np.ndarray):
            digest.update(node.attrs["value"].tobytes())
    assert digest.hexdigest() == GOLDEN["produced_with"]["graph_weights_sha256"]


def test_no_tensorflow(graph, tmp_path):
    """Nor is it imported by the command with its default backend."""
    np.savez(tmp_path / "x.npz", arr_0=images(4, 16, 16))
    program = (
        "import sys\nsys.argv = ['evaluator.py', *sys.argv[1:]]\nfrom evaluations.c2i import evaluator\nevaluator.main()\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('tensorflow', 'keras')]"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "x.npz", tmp_path / "x.npz", "--inception", graph],
        cwd=ROOT, env={"XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "x.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def test_on_a_gpu_the_host_waits_for_the_results_only(network):
    """Weights are copied there, features, logits and spatial features back."""
    with fake_gpu() as gpu:
        on_gpu = replace(network, device=GPU, run=deepcopy(network.run).to(GPU))
        assert [part.shape for part in on_gpu(images(2, 20, 30))] == [(2, 2048), (2, 1008), (2, 2023)]
    assert len(gpu.waits) == 3


def naive_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's rule in float32: the source of output i is i * (in / out); along x, then along y."""
    f = np.float32

    def taps(size_in, size):
        for i in range(size):
            position = f(i) * (f(size_in) / f(size))
            low = int(np.floor(position))
            yield low, min(low + 1, size_in - 1), position - f(low)

    rows = [[row[a] + (row[b] - row[a]) * d for a, b, d in taps(image.shape[1], width)] for row in image.astype(f)]
    x = np.array(rows, f)
    return np.array([x[a] + (x[b] - x[a]) * d for a, b, d in taps(image.shape[0], height)], f)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (32, 32), (40, 31), (61, 47), (29, 29)])
def test_resize_is_tensorflow_1s_bit_for_bit(size):
    x = images(2, *size)
    found = resize_tf1(torch.from_numpy(x), 29, 30).numpy()
    for image, expected in zip(found, x, strict=True):
        assert np.array_equal(image, naive_resize(expected, 29, 30))


def test_results_do_not_depend_on_the_batch(network):
    x = images(3, 40, 30)
    whole = network(x)
    assert [part.shape for part in whole] == [(3, 2048), (3, 1008), (3, 2023)]
    for part, one in zip(whole, network(x[1:2]), strict=True):
        np.testing.assert_allclose(one[0], part[1], rtol=1e-3, atol=1e-4)


def test_logits_are_without_biases(network, graph):
    pool, logits, _ = network(images(1, 20, 20))
    weights = read_graph(graph)[WEIGHTS].attrs["value"]
    np.testing.assert_allclose(logits, pool @ weights, rtol=1e-3, atol=1e-4)


def test_logits_give_the_published_inception_score(graph):
    """Splits of 5,000, 5,000 and 1,003."""
    features = drawn_features("real", 82, 11003, 2048, 0.6, 0.7)
    found = metrics.inception_score(features @ read_graph(graph)[WEIGHTS].attrs["value"])
    assert found == pytest.approx(GOLDEN["cases"]["is_splits"]["metrics"]["inception_score"], rel=1e-5)


@pytest.mark.parametrize("case", ["odd", "same", "stats"])
@pytest.mark.parametrize("side", ["ref", "sample"])
def test_golden_inputs(case, side):
    """The rest is compared by test_golden_figures."""
    found = hashlib.sha256(golden_inputs.images(case, side)).hexdigest()
    assert found == CASES[case]["inputs"][side]["sha256"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["ref", "sample"])
def test_golden_activations(network, case, side):
    """Of a case's first and last image."""
    batch = golden_inputs.CASES[case][side]
    ends = np.stack([golden_inputs.image(batch, i) for i in (0, batch.images - 1)])
    pool, _, spatial = network(ends)
    expected = CASES[case]["activations"][side]
    for found, layer in ((pool, "pool"), (spatial, "spatial")):
        np.testing.assert_allclose(found[0, :6], expected[layer]["first"], atol=2e-5)
        np.testing.assert_allclose(found[1, -6:], expected[layer]["last"], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_golden_figures(network, case, tmp_path):
    """Frechet distances within what float32 makes of the activations, the rest equal."""
    found, moments = {}, {}
    for side, path in golden_inputs.write(case, tmp_path).items():
        file = Samples(path)
        digest = hashlib.sha256(next(file.batches(len(file)))).hexdigest()
        assert digest == CASES[case]["inputs"][side]["sha256"]
        seen = next((known for known in found if CASES[case]["inputs"][known]["sha256"] == digest), None)
        found[side] = found[seen] if seen else extract(network, file)
        moments[side] = found[side].moments | given_statistics(file, network)
    exact, published = CASES[case]["exact"], CASES[case]["metrics"]
    fid, sfid = (
        metrics.frechet_distance(moments["ref"][part], moments["sample"][part]) for part in ("pool", "spatial")
    )
    assert fid == pytest.approx(exact["fid"]["distance"], abs=2e-4)
    assert sfid == pytest.approx(exact["sfid"]["distance"], abs=1e-3)
    score = metrics.inception_score(found["sample"].logits_NC)
    assert score == pytest.approx(published["inception_score"], rel=1e-5)
    for float16, expected in ((False, exact), (True, published)):
        sides = [Manifold(found[side].features_ND, float16=float16) for side in ("ref", "sample")]
        assert precision_recall(*sides) == (expected["precision"], expected["recall"])


def test_tensorflow_agrees(network, graph):
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed: the graph cannot run itself")
    x = images(2, 83, 61)
    other = load_inception(graph, backend="tensorflow")
    for found, expected in zip(network(x), other(x), strict=True):
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_tensorflow_missing(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow.compat.v1", None)
    with pytest.raises(InputError, match="--backend tensorflow needs TensorFlow: pip install tensorflow"):
        load_inception(graph, backend="tensorflow")


def test_another_graph(tmp_path):
    """A node of ResNet's, say."""
    (tmp_path / "x.pb").write_bytes(b"\x0a\x08\x0a\x01a\x12\x03Add")
    with pytest.raises(
        InputError, match=r"x\.pb is not the Inception graph of 2015: 1 nodes and 0 parameters, expected 1004"
    ):
        load_inception(tmp_path / "x.pb")


def test_a_truncated_graph(graph, tmp_path):
    content = graph.read_bytes()
    (tmp_path / "x.pb").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x\.pb is damaged, truncated or no TensorFlow graph"):
        load_inception(tmp_path / "x.pb")
