"""A queue of requests for images: those that wait with equal settings are drawn in one batch, and each sees its images grow.

    queue = DrawingQueue(sampler)
    for images in queue.draw([207] * 4, seed=0, cfg_scale=2.0):  # uint8 (4, 256, 256, 3): partly drawn ones, then the images
        ...

Image i of a request is image i of its seed, as of the other samplers: what else is in the batch does not matter.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.patches import grid_side
from autoregressive.models.sampler import ImageSampler
from utils.cli import InputError

PREVIEWS = 16  # of an image, at most
PREVIEW_SHARE = 0.25  # of the time, at most: decoding is slow on a CPU
GREY = 128  # of what is not drawn yet


class Request:
    """Images that somebody waits for; results are arrays, then None or an exception."""

    def __init__(self, labels: Sequence[int], seed: int, how: dict[str, Any]) -> None:
        self.labels, self.seed, self.how = labels, seed, how
        self.results: queue.SimpleQueue[np.ndarray | Exception | None] = queue.SimpleQueue()
        self.abandoned = False


class DrawingQueue:
    """Draws what is asked for from any thread, up to the sampler's `batch_size` images at once, in one thread of its own."""

    def __init__(self, sampler: ImageSampler) -> None:
        self.sampler = sampler
        self._every = -(-sampler.codes // (PREVIEWS + 1))  # codes between two previews
        self._next_preview = 0.0
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def draw(self, labels: Sequence[int], seed: int = 0, **how: Any) -> Iterator[np.ndarray]:
        """Yield uint8 (B, H, W, 3) of B labels as they grow, the finished images last. how: of ImageSampler.__call__.

        Raises InputError for labels or settings out of range, and for more images than a batch holds.
        """
        self.sampler.check_labels(labels)
        if not 1 <= len(labels) <= self.sampler.batch_size:
            raise InputError(f"{len(labels)} images: expected 1 to {self.sampler.batch_size} at once")
        request = Request(labels, seed, how)
        with self._changed:
            if self._closed:
                raise InputError("no images are drawn any more: the program ends")
            self._waiting.append(request)
            self._changed.notify()
        try:
            while (result := request.results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            request.abandoned = True

    def close(self) -> None:
        """End the thread, after the code that it draws just now. Who waits gets an exception."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next_batch(self) -> list[Request]:
        """The oldest request, and those that go with it; empty when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch, left, images = [], [], 0
            for request in self._waiting:
                fits = images + len(request.labels) <= self.sampler.batch_size
                if fits and (not batch or request.how == batch[0].how):
                    batch.append(request)
                    images += len(request.labels)
                else:
                    left.append(request)
            self._waiting = left
            return batch

    def _work(self) -> None:
        while batch := self._next_batch():
            end = None
            try:
                self._draw(batch)
            except Exception as error:
                end = error
            for request in batch:
                request.results.put(end)

    def _draw(self, batch: list[Request]) -> None:
        def show(images_BHWC: np.ndarray) -> None:
            ends = np.cumsum([len(request.labels) for request in batch])[:-1]
            for request, images in zip(batch, np.split(images_BHWC, ends), strict=True):
                request.results.put(images)

        def on_codes(codes_BL: Tensor) -> None:
            if self._closed or all(request.abandoned for request in batch):
                raise InputError("nobody waits for these images any more")
            drawn, start = codes_BL.shape[1], time.monotonic()
            if drawn % self._every == 0 and drawn < self.sampler.codes and start >= self._next_preview:
                show(partly_drawn(self.sampler, codes_BL))
                self._next_preview = time.monotonic() + (time.monotonic() - start) * (1 / PREVIEW_SHARE - 1)

        labels = [label for request in batch for label in request.labels]
        seeds = [request.seed for request in batch for _ in request.labels]
        indices = [i for request in batch for i in range(len(request.labels))]
        show(self.sampler(labels, seed=seeds, indices=indices, on_codes=on_codes, **batch[0].how))


def partly_drawn(sampler: ImageSampler, codes_BL: Tensor) -> np.ndarray:
    """uint8 (B, H, W, 3) of the first codes of images; the pixels of those to come are grey."""
    drawn, side = codes_BL.shape[1], grid_side(sampler.codes)
    images_BHWC = sampler.pixels(F.pad(codes_BL, (0, sampler.codes - drawn)))
    to_come = (np.arange(sampler.codes) >= drawn).reshape(side, side)
    pixels = images_BHWC.shape[1] // side  # of a code
    images_BHWC[:, to_come.repeat(pixels, 0).repeat(pixels, 1)] = GREY
    return images_BHWC
