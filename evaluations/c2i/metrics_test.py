"""The figures: against other ways to compute them, closed forms, and the published evaluator's numbers."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from evaluations.c2i.metrics import (
    Moments,
    class_accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments_of,
)
from evaluations.c2i.testdata.stand_in import drawn_features


class TestMoments:
    @given(st.integers(2, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(1, 6))
    def test_merged_batches_equal_numpy(self, n, cuts, dimensions):
        features = np.random.default_rng(n).normal(3, 2, (n, dimensions))
        moments = Moments.empty(dimensions)
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

    def test_a_batch_may_change_after_it_is_added(self):
        features = np.random.default_rng(0).normal(size=(5, 8))
        moments = moments_of(features)
        expected = features.mean(0)
        features[:] = 0
        np.testing.assert_allclose(moments.mean_D, expected)


class TestFrechetDistance:
    @given(st.integers(1, 8), st.integers(0, 1000))
    def test_diagonal_covariances(self, dimensions, seed):
        rng = np.random.default_rng(seed)
        mu1, mu2 = rng.normal(size=(2, dimensions))
        s1, s2 = rng.uniform(0, 3, (2, dimensions)) * rng.integers(0, 2, (2, dimensions))  # some are zero
        expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
        first, second = Moments.given(mu1, np.diag(s1)), Moments.given(mu2, np.diag(s2))
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
        found = frechet_distance(
            moments_of(drawn_features("real", *first)), moments_of(drawn_features("real", *second))
        )
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
        expected = (difference @ difference).item() + np.trace(first.covariance_DD + second.covariance_DD)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize(("n", "m"), [(15, 12), (15, 300), (300, 15), (300, 300)])
    def test_every_way_to_the_trace_gives_the_same(self, n, m):
        """Few items, many items; of full rank, and all with two features that are copies of others."""
        rng = np.random.default_rng(0)
        for copies in (0, 2):
            first, second = rng.normal(size=(n, 20)) @ rng.normal(size=(20, 20)), rng.normal(1, 2, (m, 20))
            for side in (first, second):
                side[:, :copies] = side[:, 2 : 2 + copies]
            roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
            trace_root = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
            expected = ((first.mean(0) - second.mean(0)) ** 2).sum() - 2 * trace_root
            expected += sum(np.square(root).sum() for root in roots)
            assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-8)
            given = Moments.given(second.mean(0), np.cov(second.T))
            assert frechet_distance(moments_of(first), given) == pytest.approx(expected, rel=1e-6)

    def test_a_set_of_equal_items(self):
        spread = moments_of(np.random.default_rng(0).normal(size=(50, 6)))
        point = moments_of(np.ones((50, 6)))
        expected = ((spread.mean_D - 1) ** 2).sum().item() + np.trace(spread.covariance_DD)
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

    def test_infinite_logits_are_probabilities_of_zero(self):
        logits = np.where(np.eye(10)[np.arange(100) % 10] > 0, 0.0, -np.inf)
        assert inception_score(logits) == pytest.approx(10)

    def test_one_split_does_not_depend_on_the_order(self):
        logits = np.random.default_rng(0).normal(0, 3, (25, 5))
        assert inception_score(logits, None) == pytest.approx(inception_score(logits[::-1], None))
        assert inception_score(logits, None) == pytest.approx(inception_score(logits, 25))

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
        assert inception_score(by_class, split_size=500, shuffled=True) == pytest.approx(10, rel=0.02)


class TestKernelDistance:
    def test_the_definition(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(40, 6)), rng.normal(0.5, 1, (40, 6))
        kernel = [[((a * b).sum() / 6 + 1) ** 3 for b in np.concatenate([x, y])] for a in np.concatenate([x, y])]
        k = np.array(kernel)
        xx, yy = (k[s, s].sum() - np.trace(k[s, s]) for s in (slice(40), slice(40, 80)))
        expected = (xx + yy) / (40 * 39) - 2 * k[:40, 40:].mean()
        mean, deviation = kernel_distance(x, y)
        assert mean == pytest.approx(expected) and deviation < 1e-12

    def test_sets_alike_are_at_no_distance(self):
        x, y, z = np.random.default_rng(0).normal(size=(3, 2000, 8))
        mean, deviation = kernel_distance(x, y)
        assert abs(mean) < deviation
        assert kernel_distance(x, z + 1)[0] > 20 * deviation


def test_class_accuracy():
    logits = np.array([[1.0, 2, 0], [5, 1, 1], [0, 0, 9], [3, 2, 1]])
    assert class_accuracy(logits, np.array([1, 0, 2, 1])) == 0.75
