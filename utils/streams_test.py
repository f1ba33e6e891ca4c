"""The streams that runs are made of: pinned, because another number would silently be another run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from utils import streams

keys = st.lists(st.integers(0, 2**63), min_size=1, max_size=4)


def test_pinned_values():
    assert int(streams.bits(0)) == 0xE220A8397B1DCDAF  # SplitMix64's first output for the seed 0
    assert streams.bits(7, streams.SAMPLE, np.arange(3)).tolist() == [
        11248596980798508817,
        1173472824657711729,
        668567293345086073,
    ]
    assert streams.uniform(1, streams.VIEW, 2, np.arange(3)).tolist() == [
        0.08128248455283438,
        0.7701279682101979,
        0.655290944369417,
    ]
    assert streams.permutation(10, 0, streams.ORDER, 5).tolist() == [3, 4, 7, 1, 0, 8, 6, 5, 2, 9]


def test_the_uses_keep_their_numbers():
    """They are part of the keys: a use in another place would change every run."""
    uses = (streams.ORDER, streams.VIEW, streams.LABEL_DROP, streams.SAMPLE, streams.LABEL)
    assert (*uses, streams.DROPOUT, streams.AUGMENT) == (0, 1, 2, 3, 4, 5, 6)


@given(keys, st.integers(1, 5), st.integers(1, 5))
def test_broadcasting_equals_scalar_calls(head, rows, columns):
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    table = streams.bits(*head, row, column)
    assert table.shape == (rows, columns) and table.dtype == np.uint64
    assert all(table[r, c] == streams.bits(*head, r, c) for r in range(rows) for c in range(columns))


@given(keys)
def test_every_key_and_its_place_count(head):
    first = int(streams.bits(*head))
    assert int(streams.bits(*head)) == first
    assert int(streams.bits(*head, 0)) != first
    assert int(streams.bits(head[0] + 1, *head[1:])) != first
    assert int(streams.bits(3, 4, *head)) != int(streams.bits(4, 3, *head))


def test_uniforms_look_uniform_along_every_key():
    """256 cells, 100,000 draws: chi-squared within five standard deviations; neighbouring keys are uncorrelated."""
    n, cells = 100_000, 256
    for draws in (
        streams.uniform(3, np.arange(n)),
        streams.uniform(np.arange(n), 3),
        streams.uniform(np.arange(n), 3, 3),
    ):
        assert draws.dtype == np.float64 and draws.min() >= 0 and draws.max() < 1
        counts = np.bincount((draws * cells).astype(int), minlength=cells)
        chi_squared = ((counts - n / cells) ** 2 / (n / cells)).sum()
        assert abs(chi_squared - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 5 / np.sqrt(n)


@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 1000))
def test_a_permutation_is_one(n, seed, epoch):
    order = streams.permutation(n, seed, streams.ORDER, epoch)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(n))


def test_epochs_have_orders_of_their_own():
    orders = [streams.permutation(100, 0, streams.ORDER, epoch) for epoch in range(3)]
    fixed_points = [int((a == b).sum()) for i, a in enumerate(orders) for b in [np.arange(100), *orders[:i]]]
    assert max(fixed_points) < 10  # one is expected
