"""What loading a GPT costs: seconds and the most memory that the process had, beside the size of the file.

    python scripts/benchmark/load.py --gpt-models GPT-XXL GPT-3B

Writes weights of each preset (all equal: nothing here depends on them) into a temporary folder, as one .pt and as several
safetensors files, and loads each in a process of its own: as the stages do, and as a model that is made and then filled.
Needs the largest model twice on disk, and twice in memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from card import card, finish

from autoregressive.models.gpt import PRESETS, Transformer, preset
from autoregressive.models.load import GPT, load_gpt
from utils import checkpoint, cli, weights
from utils.machine import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def parse() -> Namespace:
    parser = cli.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gpt-models", nargs="+", choices=PRESETS, default=["GPT-B", "GPT-XXL"])
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--shard", default="1GB", help="the largest safetensors file")
    add("--folder", type=cli.existing_folder, default=Path(tempfile.gettempdir()), help="where the files are written")
    add("--load", type=Path, help="load this file and print what it took (what each process does)")
    add("--filled", action="store_true", help="with --load: make the model first, then copy the file's tensors into it")
    add("--touch", action="store_true", help="with --load: also read every weight")
    return parser.parse_args()


def write(folder: Path, name: str, dtype: torch.dtype, shard: str) -> tuple[list[Path], int]:
    """The preset's weights as a .pt file and as a folder of safetensors; the paths, and the bytes of the weights."""
    config = preset(name)
    shapes = {key: tuple(value.shape) for key, value in GPT.empty(config).state_dict().items()}
    state = {key: torch.full(shape, 0.01, dtype=dtype) for key, shape in shapes.items()}
    about = {"config": asdict(config), "gpt_model": name}
    checkpoint.save(folder / "gpt.pt", {**about, "model": state})
    (folder / "shards").mkdir()
    weights.fill_folder(folder / "shards", state, about, shard)
    return [folder / "gpt.pt", folder / "shards"], sum(t.numel() * t.element_size() for t in state.values())


def load(path: Path, filled: bool, touch: bool) -> dict[str, float]:
    """Seconds, and bytes that this process had at most beyond what it had before."""
    reset_peak_memory(CPU)
    before, start = peak_memory(CPU), time.perf_counter()
    if filled:
        content = checkpoint.load(path)
        torch.set_default_dtype(next(iter(content["model"].values())).dtype)
        model = Transformer(preset(content["gpt_model"]))
        checkpoint.load_weights(model, checkpoint.state_dict(content), str(path))
    else:
        model, _ = load_gpt(path)
    if touch:
        total = sum(int(parameter.data.view(torch.uint8).max()) for parameter in model.parameters())
        assert total != 0
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory(CPU) - before}


def measured(path: Path, *flags: str) -> dict[str, float]:
    """load() in a process of its own."""
    command = [sys.executable, __file__, "--load", str(path), *flags]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


WAYS = {
    "as the stages load it": (),
    "and every weight read": ("--touch",),
    "made, then filled": ("--filled", "--touch"),
}


def main() -> None:
    args = parse()
    if args.load:
        print(json.dumps(load(args.load, args.filled, args.touch)))
        return
    machine, rows = card(CPU), []
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"{'model':8}  {'file':8}  {'way':22}  {'GB':>6}  {'peak GB':>7}  {'peak / file':>11}  {'seconds':>7}")
    for name in args.gpt_models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            paths, size = write(Path(folder), name, getattr(torch, args.dtype), args.shard)
            for path in paths:
                for way, flags in WAYS.items():
                    row = {"model": name, "file": path.name, "way": way, "size": size, **measured(path, *flags)}
                    rows.append(row)
                    print(
                        f"{name:8}  {path.name:8}  {way:22}  {size / 1e9:6.2f}  {row['bytes'] / 1e9:7.2f}  "
                        f"{row['bytes'] / size:11.2f}  {row['seconds']:7.2f}",
                        flush=True,
                    )
    finish({**machine, "dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
