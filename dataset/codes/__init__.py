"""The codes contract: the one writer and reader of `CODE_PATH/{dataset}{size}_codes`, `..._labels` and their manifest.

Packed (ours): `00000.npy` of shape (n, views, tokens), unsigned, and labels (n,) int64 a shard; image i of the sorted
ImageFolder is row i % shard_size of shard i // shard_size; `CODE_PATH/{dataset}{size}.json`, written last, says the rest.
Per image (published): `{i}.npy` (1, views, tokens) int64 and `{i}.npy` (1,) int64 an image; the manifest is optional.

Training reads the packed form; a published folder is packed at its first use. `python -m dataset.codes pack | unpack |
check` converts one layout into the other and inspects a folder.
"""

from dataset.codes.manifest import LAYOUTS, SHARD_SIZE, Manifest, Place
from dataset.codes.reader import Codes
from dataset.codes.writer import Writer

__all__ = ["LAYOUTS", "SHARD_SIZE", "Codes", "Manifest", "Place", "Writer"]
