"""Reads codes for training: several folders of the same images as one, batches by image index."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.codes.folders import Folder, Packed, open_folder
from dataset.codes.manifest import find_place
from dataset.codes.repack import packed_form
from utils.cli import InputError


class Codes:
    """Codes, opened: `len`, `views`, `tokens`, `manifest` (the first there is, or None), and batches by image index.

    Images that could not be read have no codes and no index. roots: one folder or several of the same images, whose views
    are counted on: first those of the first folder. A published folder of one file an image is packed when its first
    codes or labels are asked for (see packed_form).
    Raises InputError for a missing folder (naming the sizes it holds), missing or truncated files, and folders
    that are not of the same images, labels, grid, codebook, tokenizer and classes.
    """

    def __init__(self, roots: str | Path | Sequence[str | Path], dataset: str, image_size: int) -> None:
        roots = [roots] if isinstance(roots, str | Path) else list(roots)
        if not roots:
            raise InputError("expected a folder of codes, got none")
        self.sources = [open_folder(find_place(root, dataset, image_size)) for root in roots]
        for i, source in enumerate(self.sources):
            for other in self.sources[:i]:
                _refuse_a_mismatch(other, source)
        self.images, self.tokens = self.sources[0].images, self.sources[0].tokens
        self.views = sum(source.views for source in self.sources)
        self.manifest = next((source.manifest for source in self.sources if source.manifest), None)
        self.vocab = 0  # of the model, once check_range has been told
        self._ends = np.cumsum([source.views for source in self.sources])

    @cached_property
    def folders(self) -> list[Packed]:
        """The packed form of each folder, made where it is not there; they must agree on the labels."""
        folders = [packed_form(source) for source in self.sources]
        one = folders[0]
        for other in folders[1:]:
            if len(different := np.flatnonzero(one.labels != other.labels)):
                i = different[0]
                raise InputError(
                    f"{one.origin.codes} and {other.origin.codes} are not of the same images: {len(different)} labels "
                    f"differ, the first of image {one.numbers[i]}: {one.labels[i]} and {other.labels[i]}"
                )
        return folders

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,) int64 of the images that have codes."""
        return self.folders[0].labels

    @property
    def hint(self) -> str:
        """Where the packed copies lie that are read, one line; empty where there are none."""
        return "; ".join(
            f"{folder.origin.codes} is read from its packed copy {folder.place.root}, which --code-path takes, too"
            for folder in self.folders
            if folder.source
        )

    def __len__(self) -> int:
        return self.images

    def batch(self, indices: np.ndarray, views: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (B, tokens) int64 of these images, one view each (the first by default), and labels (B,) int64."""
        indices = np.asarray(indices, np.int64)
        views = np.zeros_like(indices) if views is None else np.asarray(views, np.int64)
        if len(indices) != len(views):
            raise ValueError(f"{len(indices)} images, {len(views)} views: expected a view for each image")
        _check_range("image", indices, self.images)
        _check_range("view", views, self.views)
        codes = np.empty((len(indices), self.tokens), np.int64)
        for folder, end in zip(self.folders, self._ends, strict=True):
            first = end - folder.views
            at = np.flatnonzero((views >= first) & (views < end))
            folder.gather(indices[at], views[at] - first, codes, at)
        if self.vocab and len(codes) and codes.max() >= self.vocab:
            row, position = np.argwhere(codes >= self.vocab)[0]
            folder = self.folders[int(np.searchsorted(self._ends, views[row], side="right"))]
            raise self._outside(folder, int(indices[row]), int(codes[row, position]), self.vocab)
        return codes, self.labels[indices]

    def fingerprint(self) -> str:
        """What the codes are, wherever they lie: a hash of their form, tokenizer, and some of their rows."""
        images = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        tokenizer = self.manifest.tokenizer_sha256 if self.manifest else ""
        digest = hashlib.sha256(f"{len(self)} {self.views} {self.tokens} {tokenizer}".encode())
        for view in range(self.views):
            for array in self.batch(images, np.full(len(images), view)):
                digest.update(np.ascontiguousarray(array, np.int64))
        return digest.hexdigest()[:16]

    def check_range(self, classes: int, vocab: int) -> None:
        """Raise InputError for labels or codes outside a model, naming the first image.

        classes: labels are 0 to classes - 1; vocab: codes are 0 to vocab - 1. What the manifest says of the largest code of a
        shard is believed; batch() checks again.
        """
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(outside):
            folder, label = self.folders[0], self.labels[outside[0]]
            raise InputError(
                f"image {folder.numbers[outside[0]]} of {folder.origin.labels} has label {label}, and the labels go up to "
                f"{self.labels.max()}, but --num-classes is {classes}: give {self.labels.max() + 1} or more"
            )
        for folder in self.folders if os.environ.get("RANK", "0") == "0" else ():  # once for all processes
            if first := folder.first_above(vocab - 1):
                raise self._outside(folder, *first, vocab)
        self.vocab = vocab

    def _outside(self, folder: Packed, row: int, code: int, vocab: int) -> InputError:
        return InputError(
            f"image {folder.numbers[row]} of {folder.origin.codes} has the code {code}, but the vocabulary is {vocab}: give "
            f"--vocab-size {code + 1} or more, or extract the codes again"
        )


def _check_range(what: str, values: np.ndarray, limit: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise IndexError(f"{what} {values.min() if values.min() < 0 else values.max()}: there are 0 to {limit - 1}")


def _refuse_a_mismatch(one: Folder, other: Folder) -> None:
    """Raise InputError unless both are codes of the same images by the same tokenizer; what a manifest leaves out agrees
    with anything."""
    if one.place.codes.resolve() == other.place.codes.resolve():
        raise InputError(f"{one.place.root} is given twice: its views would count double")
    pairs = [("images", one.images, other.images), ("tokens an image", one.tokens, other.tokens)]
    if (a := one.manifest) and (b := other.manifest):
        pairs += [("codebook size", a.codebook_size, b.codebook_size)]
        pairs += [("skipped images", *([row["image"] for row in m.skipped] for m in (a, b)))]
        for key in ("tokenizer_sha256", "classes", "paths_sha256", "images_id"):
            mine, its = getattr(a, key), getattr(b, key)
            pairs += [(key.replace("_", " "), mine, its)] if mine and its else []
    if unlike := [f"{what} {mine!s:.40} and {its!s:.40}" for what, mine, its in pairs if mine != its]:
        where = f"{one.place.codes} and {other.place.codes}"
        raise InputError(f"{where} are not of the same images and tokenizer: {'; '.join(unlike)}")
