"""What it takes to write 50,000 images: time and memory of the sampler's files, without the models that draw them.

    python scripts/benchmark/write_samples.py

Images of noise go through the sampler's own classes: parts, then one .npz. It is read back in batches as the evaluator does,
and by numpy at once in another process (which needs as much memory as the images take).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from card import card, finish

from autoregressive.sample.sample_c2i_ddp import Parts
from utils import cli, samples
from utils.log import progress
from utils.machine import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
READ = """
import sys
import numpy as np
with np.load(sys.argv[1]) as file:
    images, labels = file["arr_0"], file["arr_1"]
print(images.shape, images.dtype, labels.shape, labels.dtype, int(images[-1].sum()))
"""


def noise(part: range, size: int) -> np.ndarray:
    """The images of a part, each a function of its number."""
    return np.stack([np.random.Generator(np.random.PCG64(i)).integers(0, 256, (size, size, 3), np.uint8) for i in part])


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--images", type=cli.positive_int, default=50000)
    parser.add_argument("--image-size", type=cli.positive_int, default=256)
    parser.add_argument("--batch", type=cli.positive_int, default=32)
    parser.add_argument(
        "--folder", type=Path, help="where to write twice the images' bytes; default: a temporary folder"
    )
    args = parser.parse_args()
    machine, n, size = card(CPU), args.images, args.image_size
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        out = Path(folder) / "samples.npz"
        parts = Parts(out, {})
        reset_peak_memory(CPU)
        start = time.perf_counter()
        with progress(total=n, desc="parts", unit=" images") as bar:
            for part in parts.missing(n, args.batch):
                parts.write(part, noise(part, size))
                bar.update(len(part))
        drawn = time.perf_counter()
        samples.write(out, parts.read(), (n, size, size, 3), np.arange(n) % 1000)
        written = time.perf_counter()
        file, count, last = samples.Samples(out), 0, None
        for batch in file.batches(256):
            count, last = count + len(batch), batch[-1]
        result = {
            "images": count, "bytes": out.stat().st_size, "parts_seconds": drawn - start,
            "npz_seconds": written - drawn, "read_seconds": time.perf_counter() - written,
            "peak_bytes": peak_memory(CPU),
        }  # fmt: skip
        same = np.array_equal(last, noise(range(n - 1, n), size)[0])
        by_numpy = subprocess.run([sys.executable, "-c", READ, out], capture_output=True, text=True, check=True).stdout
    print(
        f"{count} images of {size} px, {result['bytes'] / 1e9:.2f} GB: parts {result['parts_seconds']:.1f} s, "
        f".npz {result['npz_seconds']:.1f} s, read back {result['read_seconds']:.1f} s; "
        f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB; last image {'as written' if same else 'DIFFERENT'}"
    )
    print(f"numpy: {by_numpy.strip()} (sum of the last image, {int(last.sum())} as written)")
    finish({**machine, "benchmark": "write_samples", **result})


if __name__ == "__main__":
    cli.run(main)
