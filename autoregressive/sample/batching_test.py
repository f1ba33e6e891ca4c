"""The queue: what is joined, that company does not matter, images that grow, and how it ends."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autoregressive.models.sampler import ImageSampler
from autoregressive.sample.batching import GREY, DrawingQueue
from utils import cli
from utils.testing import wait_for


class HeldSampler(ImageSampler):
    """Notes the labels of each batch, and waits with drawing it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches, self.go = [], threading.Event()

    def __call__(self, labels, **how):
        self.batches.append(list(labels))
        self.go.wait()
        return super().__call__(labels, **how)


@pytest.fixture
def sampler(models):
    return HeldSampler.from_pretrained(models["gpt"], models["vq"], batch_size=5)


def test_requests_of_equal_settings_are_drawn_together_and_none_depends_on_its_company(models, sampler):
    requests = [
        ([0], 3, {"cfg_scale": 2.0}),
        ([1, 1], 4, {"cfg_scale": 2.0}),
        ([2, 2], 3, {"cfg_scale": 2.0, "temperature": 0.5}),
        ([0, 2], 2**62, {"cfg_scale": 2.0}),
        ([1, 2], 3, {"cfg_scale": 2.0}),  # a sixth image would be too many
        ([2], 4, {"cfg_scale": 2.0}),
    ]
    queue, frames = DrawingQueue(sampler), []
    with ThreadPoolExecutor(len(requests)) as pool:
        for i, (labels, seed, how) in enumerate(requests):
            frames.append(
                pool.submit(lambda labels, seed, how: list(queue.draw(labels, seed, **how)), labels, seed, how)
            )
            wait_for("the request waits", lambda i=i: len(sampler.batches) + len(queue._waiting) == i + 1)
            wait_for("the first is taken", lambda: sampler.batches)
        sampler.go.set()
    queue.close()
    assert sampler.batches == [[0], [1, 1, 0, 2, 2], [2, 2], [1, 2]]
    alone = ImageSampler.from_pretrained(models["gpt"], models["vq"], batch_size=1)
    for (labels, seed, how), frame in zip(requests, frames, strict=True):
        *growing, images = frame.result()
        assert np.array_equal(images, alone(labels, seed=seed, **how))
        assert growing[0].shape == images.shape
        assert (growing[0][:, 12:] == GREY).all() and not (growing[0][:, :4, :4] == GREY).all()


def test_wrong_requests_are_refused_and_the_queue_goes_on(sampler):
    sampler.go.set()
    queue = DrawingQueue(sampler)
    for labels, how, message in (
        ([3], {}, "label 3 is out of range"),
        ([0] * 6, {}, "6 images: expected 1 to 5"),
        ([], {}, "0 images"),
        ([0], {"cfg_interval": (4, 17)}, "cfg-interval 4 17"),
    ):
        with pytest.raises(cli.InputError, match=message):
            next(queue.draw(labels, **how))
    assert len(list(queue.draw([0]))[-1]) == 1
    queue.close()
    with pytest.raises(cli.InputError, match="no images are drawn any more"):
        next(queue.draw([0]))


def test_what_nobody_waits_for_is_not_drawn_to_its_end(sampler):
    sampler.go.set()
    queue = DrawingQueue(sampler)
    growing = queue.draw([0])
    next(growing)
    request = growing.gi_frame.f_locals["request"]
    growing.close()
    with pytest.raises(cli.InputError, match="nobody waits"):
        queue._draw([request])


def test_who_waits_when_the_queue_closes_is_told(sampler):
    queue = DrawingQueue(sampler)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(lambda: list(queue.draw([2])))
        wait_for("the request is taken", lambda: sampler.batches)
        closing = pool.submit(queue.close)
        wait_for("the queue is to end", lambda: queue._closed)
        sampler.go.set()
        with pytest.raises(cli.InputError, match="nobody waits"):
            waiting.result()
        closing.result()
