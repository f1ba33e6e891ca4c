"""Order, views and dropped labels as functions of progress."""

import numpy as np

from dataset.sampler import epoch_batches

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
    first = np.concatenate([b.indices for b in epoch_batches(4000, 4, 100, seed=0, epoch=0, label_drop=0.1)])
    second = np.concatenate([b.indices for b in epoch_batches(4000, 4, 100, seed=0, epoch=1, label_drop=0.1)])
    other = np.concatenate([b.indices for b in epoch_batches(4000, 4, 100, seed=1, epoch=0, label_drop=0.1)])
    assert (first != second).mean() > 0.99
    assert (first != other).mean() > 0.99
    batches = list(epoch_batches(4000, 4, 100, seed=0, epoch=0, label_drop=0.1))
    views = np.bincount(np.concatenate([b.views for b in batches]), minlength=4) / 4000
    assert np.abs(views - 0.25).max() < 0.03
    assert abs(np.concatenate([b.dropped for b in batches]).mean() - 0.1) < 0.02
