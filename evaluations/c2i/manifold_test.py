"""Precision and recall: against the definition, with ties and copies, and the published evaluator's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluations.c2i import manifold
from evaluations.c2i.manifold import Manifold
from evaluations.c2i.testdata.stand_in import drawn_features

CASES = json.loads((Path(__file__).parent / "testdata" / "evaluator.json").read_text())["cases"]
DRAWN = {
    "pr_blocks": ("integer", (71, 10050, 16, 8, 0), (72, 10020, 16, 8, 1)),
    "pr_overflow": ("integer", (73, 300, 16, 200, 0), (74, 260, 16, 200, 20)),
    "pr_rounding": ("real", (75, 500, 2048, 0.25, 0.5), (76, 450, 2048, 0.26, 0.5)),
}


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3, **options) -> tuple[float, float]:
    return manifold.precision_recall(Manifold(reference, k, **options), Manifold(samples, k, **options))


def naive_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """By the definition, from all differences."""

    def distances(a, b):
        return ((a[:, None].astype(float) - b[None]) ** 2).sum(2)

    ref_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (reference, samples))
    across = distances(reference, samples)
    return (across <= ref_radii[:, None]).any(0).mean(), (across <= sample_radii).any(1).mean()


class TestPrecisionRecall:
    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_the_definition_with_copies_and_ties(self, data):
        """Small whole numbers, at times far from zero: many items are equal and many distances too."""
        k, dimensions = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        sizes = st.integers(k + 1, 15)
        high, far = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([0, 5, 5000]))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        reference, samples = (
            (rng.integers(0, high, (data.draw(sizes), dimensions), endpoint=True) + far).astype(np.float32)
            for _ in range(2)
        )
        assert precision_recall(reference, samples, k) == naive_precision_recall(reference, samples, k)

    def test_the_definition_for_features(self):
        rng = np.random.default_rng(0)
        reference, samples = rng.gamma(1, 1, (300, 40)), rng.gamma(1, 0.9, (200, 40))
        samples[:20] = reference[:20]
        found = precision_recall(reference.astype(np.float32), samples.astype(np.float32))
        assert found == naive_precision_recall(reference.astype(np.float32), samples.astype(np.float32), 3)
        assert 0.1 < found[0] < 1 and 0.1 < found[1] < 1

    @pytest.mark.parametrize("case", DRAWN)
    def test_the_published_evaluator(self, case):
        """Exact distances by default; with its own rounding, its figures and radii bit for bit."""
        kind, *specs = DRAWN[case]
        reference, samples = (drawn_features(kind, *spec) for spec in specs)
        exact, published = CASES[case]["exact"], CASES[case]["metrics"]
        assert precision_recall(reference, samples) == (exact["precision"], exact["recall"])
        first, second = (Manifold(side, float16=True) for side in (reference, samples))
        assert manifold.precision_recall(first, second) == (published["precision"], published["recall"])
        for name, side in (("ref", first), ("sample", second)):
            assert side.radii_N[:6].tolist() == published[f"radii_{name}_first"]
            assert side.radii_N.sum().item() == published[f"radii_{name}_sum"]

    def test_blocks_of_any_size(self, monkeypatch):
        reference, samples = drawn_features("integer", 1, 100, 4, 6, 0), drawn_features("integer", 2, 90, 4, 6, 1)
        whole = precision_recall(reference, samples)
        for side in (7, 64):
            monkeypatch.setitem(manifold.TILE, "cpu", side)
            assert precision_recall(reference, samples) == whole == naive_precision_recall(reference, samples, 3)

    @pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e18])
    def test_trap_what_float32_cannot_tell_apart(self, scale):
        """Far from zero the bounds leave nearly everything open; huge values overflow."""
        rng = np.random.default_rng(0)
        shift = 100 if scale < 1 else 0
        reference, samples = (shift + scale * rng.normal(size=(n, 8)) for n in (70, 60))
        found = precision_recall(reference, samples)
        assert found == naive_precision_recall(reference, samples, 3)
        assert 0.3 < found[0] < 1

    @pytest.mark.parametrize("copies", [2, 4, 5, 40])
    def test_radii_among_copies(self, copies):
        """More items at one distance than are kept."""
        points = np.random.default_rng(0).normal(size=(9, 5)).repeat(copies, axis=0)
        expected = np.sort(((points[:, None] - points) ** 2).sum(2), axis=1)[:, 3]
        np.testing.assert_allclose(Manifold(points).radii_N.numpy(), expected, rtol=1e-12)

    def test_trap_copies_make_balls_of_radius_0(self):
        """Only what equals them is within, whatever rounding does to distances of 0."""
        points = np.random.default_rng(0).normal(10, 1, (50, 96)).astype(np.float32)
        copies = np.repeat(points, 4, axis=0)
        assert precision_recall(copies, np.repeat(points[:25], 4, axis=0)) == (1, 0.5)
        assert precision_recall(copies, copies + np.float32(1e-3)) == (0, 0)

    def test_an_outlier_does_not_widen_the_other_balls(self):
        points = np.random.default_rng(0).normal(size=(40, 3))
        far = np.concatenate([points, np.full((1, 3), 1e7)])
        shifted = points + 1e-3
        copies = np.repeat(far, 4, axis=0)
        assert precision_recall(copies, shifted)[0] == 0
        assert precision_recall(copies, points)[0] == 1

    def test_features_are_left_as_they_are(self):
        features = np.random.default_rng(0).normal(5, 1, (10, 3))
        before = features.copy()
        precision_recall(features, features)
        precision_recall(features, features, float16=True)
        assert np.array_equal(features, before)

    def test_float16_tiles_of_any_size(self, monkeypatch):
        """One that overflows turns to float32 as a whole; here all distances are exact either way."""
        reference, samples = drawn_features("integer", 1, 100, 4, 6, 0), drawn_features("integer", 2, 90, 4, 6, 1)
        whole = precision_recall(reference, samples, float16=True)
        assert whole == precision_recall(reference, samples)
        for tile in (7, 64):
            monkeypatch.setattr(manifold, "FLOAT16_TILE", tile)
            assert precision_recall(reference, samples, float16=True) == whole
        large = [side * np.float32(100) for side in (reference, samples)]
        assert precision_recall(*large, float16=True) == precision_recall(*large)

    def test_too_few_items(self):
        with pytest.raises(ValueError, match="3 neighbours need at least 4 items, got 3"):
            Manifold(np.zeros((3, 2)))
