"""References in the cache: what is stored is read, by what computed it; the folder stays small."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluations.c2i import reference_cache
from evaluations.c2i.features import Extracted
from evaluations.c2i.metrics import moments_of

NETWORK = SimpleNamespace(sha256="f" * 64, backend="torch", device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "next-patch-prediction" / "references"


def extracted(n: int = 9, spatial: bool = True) -> Extracted:
    features = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
    digests = np.array([bytes([i]) * 16 for i in range(n)], "V16")
    moments = {"pool": moments_of(features)} | ({"spatial": moments_of(features[:, :3])} if spatial else {})
    return Extracted(features, np.zeros((n, 0), np.float32), moments, digests, 2)


@pytest.mark.parametrize("n", [4, 30])
@pytest.mark.parametrize("spatial", [True, False])
def test_round_trip(n, spatial):
    given = extracted(n, spatial)
    path = reference_cache.entry_path(NETWORK, "a" * 64)
    reference_cache.store(path, given)
    found = reference_cache.load(path)
    assert np.array_equal(found.features_ND, given.features_ND) and np.array_equal(found.digests_N, given.digests_N)
    assert found.constant == 2 and found.logits_NC.shape == (n, 0)
    assert found.moments.keys() == given.moments.keys()
    for part, moments in given.moments.items():
        assert found.moments[part].mean_D.equal(moments.mean_D)
        assert np.array_equal(found.moments[part].covariance_DD, moments.covariance_DD)


def test_an_entry_belongs_to_what_computed_it():
    paths = {
        reference_cache.entry_path(SimpleNamespace(**(vars(NETWORK) | change)), reference)
        for change in ({}, {"sha256": "0"}, {"backend": "tensorflow"}, {"device": torch.device("meta")})
        for reference in ("a", "b")
    }
    assert len(paths) == 8


def test_nothing_or_something_else_is_there(folder):
    path = reference_cache.entry_path(NETWORK, "a")
    assert reference_cache.load(path) is None
    folder.mkdir(parents=True)
    path.write_bytes(b"none")
    assert reference_cache.load(path) is None
    np.savez(path, features=np.zeros((4, 2)))
    assert reference_cache.load(path) is None


def test_the_latest_used_entries_stay(folder, monkeypatch):
    monkeypatch.setattr(reference_cache, "ENTRIES", 2)
    paths = [reference_cache.entry_path(NETWORK, name) for name in "abc"]
    for age, path in zip((30, 20), paths, strict=False):
        reference_cache.store(path, extracted())
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert reference_cache.load(paths[0]) is not None  # used, so it is the latest
    reference_cache.store(paths[2], extracted())
    assert set(folder.iterdir()) == {paths[0], paths[2]}


def test_a_folder_that_cannot_be_written_to_is_left_alone(tmp_path):
    (tmp_path / "next-patch-prediction").write_text("")
    path = reference_cache.entry_path(NETWORK, "a")
    reference_cache.store(path, extracted())
    assert reference_cache.load(path) is None
