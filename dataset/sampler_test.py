"""Order, views and dropped labels as functions of progress."""

import zlib

import numpy as np

from dataset.sampler import STEPS_AT_ONCE, epoch_batches

SETTINGS = {"seed": 3, "epoch": 2, "label_drop": 0.3}


def test_an_epoch_visits_each_image_once():
    batches = list(epoch_batches(103, 2, 10, **SETTINGS))
    assert len(batches) == 10
    visited = np.concatenate([b.indices for b in batches])
    assert len(set(visited.tolist())) == 100
    assert visited.max() < 103


def test_the_same_order_for_any_number_of_processes_and_any_start():
    whole = list(epoch_batches(100, 4, 12, **SETTINGS))
    halves = [list(epoch_batches(100, 4, 12, **SETTINGS, part=part)) for part in (slice(0, 6), slice(6, 12))]
    for one, left, right in zip(whole, *halves, strict=True):
        for a, b, c in zip(one, left, right, strict=True):
            assert np.array_equal(a, np.concatenate((b, c)))
    later = list(epoch_batches(100, 4, 12, **SETTINGS, first_step=5))
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(whole[5:], later, strict=True))


def test_epochs_and_seeds_differ_and_shares_are_right():
    def order(**changes) -> np.ndarray:
        return np.concatenate([b.indices for b in epoch_batches(4000, 4, 100, **{**settings, **changes})])

    settings = {"seed": 0, "epoch": 0, "label_drop": 0.1}
    assert (order() != order(epoch=1)).mean() > 0.99
    assert (order() != order(seed=1)).mean() > 0.99
    batches = list(epoch_batches(4000, 4, 100, **settings))
    views = np.bincount(np.concatenate([b.views for b in batches]), minlength=4) / 4000
    assert np.abs(views - 0.25).max() < 0.03
    assert abs(np.concatenate([b.dropped for b in batches]).mean() - 0.1) < 0.02


def test_the_numbers_stay_what_they_were():
    """A run that was cut off under an older version must continue in the same order: these never change."""
    batches = list(epoch_batches(1000, 10, 8, **SETTINGS))
    assert [part.astype(int).tolist() for part in batches[64]] == [
        [355, 686, 318, 500, 100, 166, 663, 311],
        [9, 5, 6, 4, 9, 8, 2, 2],
        [0, 1, 1, 0, 0, 0, 0, 0],
    ]
    sums = [zlib.crc32(np.concatenate(parts).astype("<i8").tobytes()) for parts in zip(*batches, strict=True)]
    assert sums == [2960058160, 4143037022, 3190013042]


def test_a_start_and_a_part_anywhere_give_the_same_steps():
    """Steps are drawn many at once; where the draws begin must not show."""
    whole = list(epoch_batches(1000, 10, 7, **SETTINGS))
    for first in (1, STEPS_AT_ONCE - 1, STEPS_AT_ONCE, STEPS_AT_ONCE + 1, len(whole) - 1, len(whole)):
        some = list(epoch_batches(1000, 10, 7, **SETTINGS, first_step=first, part=slice(2, 5)))
        assert len(some) == len(whole) - first
        for one, part in zip(whole[first:], some, strict=True):
            assert all(np.array_equal(a[2:5], b) for a, b in zip(one, part, strict=True))
            assert [a.dtype for a in part] == [np.int64, np.int64, np.bool_]


def test_fewer_images_than_a_batch_are_no_batch():
    assert not list(epoch_batches(5, 2, 10, **SETTINGS))
