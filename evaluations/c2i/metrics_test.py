"""The figures: against other ways to compute them, closed forms, and the published evaluator's numbers."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluations.c2i import metrics
from evaluations.c2i.metrics import Manifold, Moments, class_accuracy, frechet_distance, inception_score, moments_of


def drawn(kind: str, seed: int, n: int, dimensions: int, scale: float, offset: float) -> np.ndarray:
    """The features (n, dimensions) that the published evaluator was run on: from raw PCG64 words, so the same anywhere."""
    words = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(n * dimensions)
    uniform = ((words >> np.uint64(40)) * 2.0**-24).reshape(n, dimensions)
    if kind == "integer":
        return (np.floor(uniform * scale) + offset).astype(np.float32)
    spread = scale * (0.25 + 1.5 * np.arange(dimensions) / dimensions)
    return (offset + spread * (2 * uniform - 1) + scale * (uniform[:, :1] - 0.5)).astype(np.float32)


def given_moments(mean, covariance, n: int = 2) -> Moments:
    moments = Moments(len(mean))
    moments.n, moments.mean_D, moments.scatter_DD = n, np.array(mean, float), np.array(covariance, float) * (n - 1)
    return moments


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    return Manifold(reference, k).coverage(samples), Manifold(samples, k).coverage(reference)


class TestMoments:
    @given(st.integers(2, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(1, 6))
    def test_merged_batches_equal_numpy(self, n, cuts, dimensions):
        features = np.random.default_rng(n).normal(3, 2, (n, dimensions))
        moments = Moments(dimensions)
        for batch in np.split(features, sorted(cuts)):  # some are empty
            moments.add(batch)
        assert moments.n == n
        np.testing.assert_allclose(moments.mean_D, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance_DD, np.cov(features.T).reshape(dimensions, -1), atol=1e-12)

    def test_a_large_mean_does_not_cancel(self):
        noise = np.random.default_rng(0).normal(size=(20000, 3))
        np.testing.assert_allclose(moments_of(noise + 1e8).covariance_DD, np.cov(noise.T), atol=1e-6)

    def test_float32_is_summed_in_float64(self):
        features = np.random.default_rng(0).normal(100, 1, (20000, 4)).astype(np.float32)
        np.testing.assert_allclose(moments_of(features).mean_D, features.astype(np.float64).mean(0), rtol=1e-14)

    def test_one_item_has_no_covariance(self):
        with pytest.raises(ValueError, match="needs at least 2 items, got 1"):
            _ = moments_of(np.ones((1, 3))).covariance_DD


class TestFrechetDistance:
    @given(st.integers(1, 8), st.integers(0, 1000))
    def test_diagonal_covariances(self, dimensions, seed):
        rng = np.random.default_rng(seed)
        mu1, mu2 = rng.normal(size=(2, dimensions))
        s1, s2 = rng.uniform(0, 3, (2, dimensions)) * rng.integers(0, 2, (2, dimensions))  # some are zero
        expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
        first, second = given_moments(mu1, np.diag(s1)), given_moments(mu2, np.diag(s2))
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_the_square_root_of_a_matrix(self):
        """The form it is published in, where the covariances have full rank."""
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20)), rng.normal(1, 2, (400, 20))
        s1, s2 = np.cov(first.T), np.cov(second.T)
        difference = first.mean(0) - second.mean(0)
        expected = difference @ difference + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(
        ("first", "second", "published", "exact"),
        [
            ((77, 300, 64, 1.0, 0.3), (78, 280, 64, 1.1, 0.35), 2.996931261328214, 2.9969313578745584),
            ((79, 40, 64, 1.0, 0.3), (80, 30, 64, 1.1, 0.35), 20.395791965154267, 20.395793278735354),  # N < D
        ],
    )
    def test_the_published_evaluator(self, first, second, published, exact):
        found = frechet_distance(moments_of(drawn("real", *first)), moments_of(drawn("real", *second)))
        assert found == pytest.approx(exact, rel=1e-9)
        assert found == pytest.approx(published, rel=1e-6)

    @pytest.mark.parametrize("n", [5, 1000])
    def test_a_set_and_itself(self, n):
        """At full and deficient rank, a billionth of the variance at most: no square roots of rounding noise."""
        moments = moments_of(np.random.default_rng(0).normal(2, 3, (n, 50)))
        assert 0 <= frechet_distance(moments, moments) < 1e-9 * np.trace(moments.covariance_DD)

    def test_trap_sets_in_perpendicular_subspaces(self):
        """tr sqrt(S1 S2) is 0: the distance is the whole variance of both."""
        rng = np.random.default_rng(0)
        rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
        first = moments_of(rng.normal(size=(30, 20)) @ rotation[:20])
        second = moments_of(rng.normal(size=(30, 20)) @ rotation[20:])
        difference = first.mean_D - second.mean_D
        expected = difference @ difference + np.trace(first.covariance_DD + second.covariance_DD)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)

    def test_a_set_of_equal_items(self):
        spread = moments_of(np.random.default_rng(0).normal(size=(50, 6)))
        point = moments_of(np.ones((50, 6)))
        expected = ((spread.mean_D - 1) ** 2).sum() + np.trace(spread.covariance_DD)
        assert frechet_distance(spread, point) == pytest.approx(expected, rel=1e-12)
        assert frechet_distance(point, point) == 0


class TestInceptionScore:
    def test_known_distributions(self):
        certain = np.eye(10)[np.arange(100) % 10] * 1000  # probabilities of the others underflow
        assert inception_score(certain) == pytest.approx(10)
        assert inception_score(certain[:1].repeat(50, 0)) == pytest.approx(1)
        assert inception_score(np.zeros((30, 7))) == pytest.approx(1)
        assert inception_score(certain[[0, 0, 0, 1]]) == pytest.approx(
            np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
        )

    @given(st.integers(0, 1000))
    def test_the_definition(self, seed):
        logits = np.random.default_rng(seed).normal(0, 3, (20, 5))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
        assert inception_score(logits) == pytest.approx(expected)
        assert inception_score(logits + 1e4) == pytest.approx(expected)

    def test_splits_are_consecutive_and_weighted_alike(self):
        logits = np.random.default_rng(0).normal(0, 3, (25, 5))
        expected = np.mean([inception_score(logits[start : start + 10]) for start in (0, 10, 20)])
        assert inception_score(logits, split_size=10) == pytest.approx(expected)

    def test_trap_the_order_counts_unless_shuffled(self):
        """Sorted by class, a split sees half of the classes."""
        mixed = np.eye(10)[np.arange(1000) % 10] * 100
        by_class = mixed[np.argsort(mixed.argmax(1), kind="stable")]
        assert inception_score(mixed, split_size=500) == pytest.approx(10)
        assert inception_score(by_class, split_size=500) == pytest.approx(5)
        assert inception_score(by_class, split_size=500, shuffle_seed=0) == pytest.approx(10, rel=0.02)


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

    @pytest.mark.parametrize(
        ("kind", "reference", "samples", "precision", "recall"),
        [
            ("integer", (71, 10050, 16, 8, 0), (72, 10020, 16, 8, 1), 0.7075848303393214, 0.7045771144278608),
            ("integer", (73, 300, 16, 200, 0), (74, 260, 16, 200, 20), 0.7846153846153846, 0.7933333333333333),
            # here the published float16 distances give 0.1089; this is what they round
            ("real", (75, 500, 2048, 0.25, 0.5), (76, 450, 2048, 0.26, 0.5), 0.08666666666666667, 1.0),
        ],
    )
    def test_the_published_evaluator(self, kind, reference, samples, precision, recall):
        found = precision_recall(drawn(kind, *reference), drawn(kind, *samples))
        assert found == (pytest.approx(precision, rel=1e-12), pytest.approx(recall, rel=1e-12))

    def test_blocks_of_any_size(self, monkeypatch):
        reference, samples = drawn("integer", 1, 100, 4, 6, 0), drawn("integer", 2, 90, 4, 6, 1)
        whole = precision_recall(reference, samples)
        for block in (1, 250, 1000):
            monkeypatch.setattr(metrics, "BLOCK", block)
            assert precision_recall(reference, samples) == whole

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
        assert Manifold(copies).coverage(shifted) == 0
        assert Manifold(copies).coverage(points) == 1

    def test_features_are_left_as_they_are(self):
        features = np.random.default_rng(0).normal(5, 1, (10, 3))
        before = features.copy()
        Manifold(features).coverage(features)
        assert np.array_equal(features, before)

    def test_too_few_items(self):
        with pytest.raises(ValueError, match="3 neighbours need at least 4 items, got 3"):
            Manifold(np.zeros((3, 2)))


def test_class_accuracy():
    logits = np.array([[1.0, 2, 0], [5, 1, 1], [0, 0, 9], [3, 2, 1]])
    assert class_accuracy(logits, np.array([1, 0, 2, 1])) == 0.75
