"""Both samplers: the same images for any batch size and number of processes, a run that was cut off, wrong inputs."""

import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.generate import generate
from autoregressive.models.gpt import PRESETS, Transformer
from autoregressive.models.sampler import ImageSampler
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.sample.flags import class_names
from autoregressive.train.preview import Preview
from tokenizer.tokenizer_image import vq_model
from utils import checkpoint, cli, samples
from utils.files import file_lock
from utils.log import RunLog
from utils.pixels import to_uint8
from utils.samples import Samples
from utils.testing import PATIENCE, ROOT, fill_by_formula, run_on_machines, run_script

MANY = "autoregressive/sample/sample_c2i_ddp.py"


def command(models, folder, *flags, images=11) -> list[str]:
    flags = (
        "--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"], "--num-fid-samples", images,
        "--per-proc-batch-size", 4, "--cfg-scale", 2.0, "--sample-dir", folder, *flags,
    )  # fmt: skip
    return [str(flag) for flag in flags]


def sample(models, folder, *flags, images=11, **options):
    result = run_script(MANY, *command(models, folder, *flags, images=images), **options)
    assert result.returncode == 0, result.stderr
    return result


def in_this_process(main: Callable[[], None], *flags: object) -> None:
    """What a script does, without the start of another Python."""
    with patch.object(sys, "argv", [main.__module__, *map(str, flags)]):
        main()


@pytest.fixture
def run_here(models, tmp_path):
    """Sample into tmp_path within this process."""
    return lambda *flags, images=11: in_this_process(
        sample_c2i_ddp.main, *command(models, tmp_path, *flags, images=images)
    )


NAME = "GPT-XXS-gpt-size-16-size-16-VQ-4-small-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz"


@pytest.fixture(scope="module")
def drawn(models, tmp_path_factory) -> Path:
    """The file of a whole run on one process."""
    folder = tmp_path_factory.mktemp("samples")
    in_this_process(sample_c2i_ddp.main, *command(models, folder))
    return folder / NAME


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


@pytest.mark.slow
def test_two_machines_with_a_shared_folder_write_what_one_process_does(models, drawn, tmp_path):
    run_on_machines(MANY, *command(models, tmp_path))
    assert (tmp_path / NAME).read_bytes() == drawn.read_bytes()


def test_images_are_those_of_their_labels_and_streams(models, drawn):
    images, labels = arrays(drawn)
    assert (images.shape, images.dtype, labels.dtype) == ((11, 16, 16, 3), np.uint8, np.int64)
    assert set(labels) <= {0, 1, 2}
    sampler = ImageSampler.from_pretrained(models["gpt"], models["vq"], batch_size=5)
    assert sampler.gpt.about["weights"] == "ema"
    assert np.array_equal(sampler(labels, cfg_scale=2.0), images)
    assert np.array_equal(sampler(labels[[7, 2]].tolist(), cfg_scale=2.0, indices=[7, 2]), images[[7, 2]])
    with torch.inference_mode():
        codes = generate(sampler.gpt, labels, cfg_scale=2.0, dtype=sampler.dtype)
        assert np.array_equal(to_uint8(sampler.tokenizer.decode_code(codes)), images)
    assert sorted(path.name for path in drawn.parent.iterdir()) == [NAME.replace(".npz", ".json"), NAME]


def test_any_batch_size_and_number_of_processes_draws_the_same(models, drawn, tmp_path):
    sample(models, tmp_path, "--per-proc-batch-size", "3", processes=2)
    for one, other in zip(arrays(drawn), arrays(tmp_path / NAME), strict=True):
        assert np.array_equal(one, other)


def test_a_run_that_was_cut_off_draws_only_what_is_missing(models, drawn, tmp_path):
    """Its images lie beside the .npz; they are taken as they are (here: marked by a pixel), whatever the batch size now."""
    record = json.loads(drawn.with_suffix(".json").read_text())
    parts = tmp_path / NAME.replace(".npz", ".parts")
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(record))
    marked = arrays(drawn)[0].copy()
    marked[[0, 5, 9], 0, 0] = (1, 2, 3)
    labels = arrays(drawn)[1]
    for first, stop in ((0, 2), (5, 8), (8, 11)):
        images = marked[first:stop]
        samples.write(parts / f"{first:08d}-{stop:08d}.npz", [images], images.shape, labels[first:stop])
    with open(parts / "00000008-00000011.npz", "r+b") as damaged:  # one bit: its CRC tells
        damaged.seek(900)
        byte = damaged.read(1)[0]
        damaged.seek(900)
        damaged.write(bytes([byte ^ 4]))
    samples.write(parts / "00000003-00000004.npz", [marked[3:4]], (1, 16, 16, 3), 2 - labels[3:4] // 2)  # other labels
    (parts / "00000004-best.npz").write_text("of others")
    marked[9, 0, 0] = arrays(drawn)[0][9, 0, 0]
    result = sample(models, tmp_path, processes=2)
    assert result.stderr.count("making it again") == 2
    assert np.array_equal(arrays(tmp_path / NAME)[0], marked)
    assert not parts.exists()


KILLED = """
import os, signal
import numpy as np
from autoregressive.sample import sample_c2i_ddp
from utils import cli, samples

write, done = samples.write, []

def counted(path, batches, shape, labels):
    def cut_off():
        yield np.concatenate(list(batches))
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, cut_off() if len(done) == 2 else batches, shape, labels)
    done.append(path)

samples.write = counted
cli.run(sample_c2i_ddp.main)
"""


def test_a_killed_run_resumes_to_the_same_file(models, drawn, tmp_path):
    """kill -9 while the third image is written; then the same command, with another batch size."""
    arguments = command(models, tmp_path, "--per-proc-batch-size", 1)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    parts = tmp_path / NAME.replace(".npz", ".parts")
    assert len(list(parts.glob("0*.npz"))) == 2 and len(list(parts.glob(".0*.npz"))) == 1
    in_this_process(sample_c2i_ddp.main, *command(models, tmp_path))
    for one, other in zip(arrays(drawn), arrays(tmp_path / NAME), strict=True):
        assert np.array_equal(one, other)


def test_finished_work_is_not_redone_and_other_settings_are_refused(models, drawn, run_here, tmp_path, capsys):
    for path in drawn.parent.iterdir():
        shutil.copy(path, tmp_path)
    run_here()
    assert "is complete already" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match=r"other settings \(labels \['random'\], now \['balanced'\]"):
        run_here("--labels", "balanced")
    with pytest.raises(cli.InputError, match=r"other settings \(num_fid_samples 11, now 12"):
        run_here(images=12)
    (tmp_path / NAME.replace(".npz", ".json")).unlink()
    with pytest.raises(cli.InputError, match=r"without its \.json.*move or delete it"):
        run_here()


def test_a_sweep_writes_a_file_a_scale(drawn, run_here, tmp_path, capsys):
    run_here("--cfg-scale", "1.0", "2.0", "3.5", "--save-png")
    files = {scale: tmp_path / NAME.replace("cfg-2.0", f"cfg-{scale}") for scale in ("1.0", "2.0", "3.5")}
    images = {scale: arrays(path)[0] for scale, path in files.items()}
    assert np.array_equal(images["2.0"], arrays(drawn)[0])
    assert not np.array_equal(images["1.0"], images["2.0"]) and not np.array_equal(images["3.5"], images["2.0"])
    for scale, path in files.items():
        pngs = sorted(path.with_suffix("").iterdir())
        assert [png.name for png in pngs] == [f"{i:06d}.png" for i in range(11)]
        assert np.array_equal(np.stack([np.array(Image.open(png)) for png in pngs]), images[scale])
    run_here("--cfg-scale", "1.0", "2.0")
    assert capsys.readouterr().out.count("is complete already") == 2


def test_schedules_have_names_and_effects(drawn, run_here, tmp_path):
    flags = {
        "cfg-2.0-linear": ("--cfg-schedule", "linear"),
        "cfg-2.0-power-cosine-3.0": ("--cfg-schedule", "power-cosine", "--cfg-power", "3"),
        "cfg-2.0-interval-4-12": ("--cfg-interval", "4", "12"),
        "cfg-2.0-interval-3": ("--cfg-interval", "3"),
    }
    found = [arrays(drawn)[0]]
    for name, these in flags.items():
        run_here(*these)
        found.append(arrays(tmp_path / NAME.replace("cfg-2.0", name))[0])
    assert len({images.tobytes() for images in found}) == len(found)


def test_chosen_labels_are_taken_in_turn(run_here, tmp_path):
    run_here("--labels", "2", "0", images=5)
    assert arrays(tmp_path / NAME)[1].tolist() == [2, 0, 2, 0, 2]


def test_balanced_labels_raw_weights_and_another_size(run_here, tmp_path):
    flags = ("--labels", "balanced", "--weights", "model", "--image-size-eval", "24", "--global-seed", "3")
    run_here(*flags, "--num-classes", "3", images=4)
    name = NAME.replace("16-size-16", "16-size-24").replace("seed-0", "seed-3").replace("gpt-size", "gpt-raw-size")
    file = Samples(tmp_path / name)
    assert file.shape == (4, 24, 24, 3)
    assert file.labels.tolist() == [0, 1, 2, 0]


def test_a_grid_of_chosen_classes(models, tmp_path):
    flags = ("--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"], "--out", tmp_path / "grid.png")
    in_this_process(sample_c2i.main, *flags, "--class-ids", "2", "0", "--per-class", "3", "--scale", "2")
    with Image.open(tmp_path / "grid.png") as page:
        assert page.height > 2 * (2 * 16 + 2 + 10)  # a line of words under each row
        assert page.width == 3 * (2 * 16 + 2) + 2
    with pytest.raises(cli.InputError, match=r"--class-ids 3 is out of range.*classes 0 to 2"):
        in_this_process(sample_c2i.main, *flags, "--class-ids", "1", "3")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_damaged_file_is_made_again(run_here, drawn, tmp_path, capsys):
    for change in (lambda data: data[:100], lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]):
        shutil.copy(drawn.with_suffix(".json"), tmp_path)
        (tmp_path / NAME).write_bytes(change(drawn.read_bytes()))
        run_here()
        assert "is damaged: making it again" in capsys.readouterr().err
        assert np.array_equal(arrays(tmp_path / NAME)[0], arrays(drawn)[0])


def test_a_file_has_one_writer(run_here, tmp_path):
    with file_lock(tmp_path / NAME), pytest.raises(cli.InputError, match=f"{NAME} is in use by process"):
        run_here()
    assert not (tmp_path / NAME).exists()


def test_weights_are_hashed_once(run_here, monkeypatch):
    hashed = []
    monkeypatch.setattr(sample_c2i_ddp, "sha256", lambda path: hashed.append(path.name) or "0" * 64)
    run_here("--cfg-scale", "1.0", "3.0", images=1)
    assert sorted(hashed) == ["gpt.pt", "vq.pt"]


@pytest.mark.parametrize(("figures", "taken"), [((2.0, 1.0), "ema"), ((1.0, 2.0), "model"), ((1.0, None), "ema")])
def test_an_average_that_is_worse_is_not_taken(models, tmp_path, figures, taken, capsys):
    content = checkpoint.load(models["gpt"])
    content["validation"] = dict(zip(("val_loss", "val_loss_ema"), figures, strict=True))
    checkpoint.save(tmp_path / "short.pt", content)
    sampler = ImageSampler.from_pretrained(tmp_path / "short.pt", models["vq"])
    assert sampler.gpt.about["weights"] == taken
    assert ("the average of the weights is worse" in capsys.readouterr().err) == (taken == "model")
    insisted = ImageSampler.from_pretrained(tmp_path / "short.pt", models["vq"], weights="ema")
    assert insisted.gpt.about["weights"] == "ema"


def test_three_classes_in_the_published_form(models, tmp_path):
    """The tensors say how many classes there are."""
    state = checkpoint.load(models["gpt"])["model"]
    torch.save({"model": state, "steps": 24, "args": Namespace(lr=1e-4)}, tmp_path / "bare.pt")
    sampler = ImageSampler.from_pretrained(tmp_path / "bare.pt", models["vq"], image_size=16)
    assert sampler([2, 0], size=24).shape == (2, 24, 24, 3)
    assert sampler([]).shape == (0, 16, 16, 3)
    with pytest.raises(cli.InputError, match="label 3 is out of range"):
        sampler([3])


def test_previews_are_the_samplers_images(models, tmp_path):
    sampler = ImageSampler.from_pretrained(models["gpt"], models["vq"])
    model, log = sampler.gpt.train(), RunLog(tmp_path)
    preview = Preview(
        sampler.tokenizer, tmp_path / "samples", log, ["ant"], 3, torch.device("cpu"), torch.float32, per_class=2
    )
    preview(model, 2)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["epoch-0002.png"]
    assert model.training
    page = np.array(Image.open(tmp_path / "samples" / "epoch-0002.png"))
    assert np.array_equal(page[2 : 2 + 64 : 4, 2 : 2 + 64 : 4], sampler([0])[0])
    model.norm.weight = torch.nn.Parameter(torch.full((128,), float("nan")))
    preview(model, 6)
    assert "did not draw" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_published_files_by_the_published_command(tmp_path, capsys):
    """Weights without a config, wrapped as published; the file gets the published name, also where flags are left out."""
    folder = tmp_path / "pretrained_models"
    folder.mkdir()
    gpt, tokenizer = Transformer(PRESETS["GPT-B"]), vq_model.VQModel(vq_model.PRESETS["VQ-16"])
    for name, model in (("c2i_B_256", gpt), ("vq_ds16_c2i", tokenizer)):
        content = {"model": fill_by_formula(model).state_dict(), "steps": 1, "args": Namespace(global_seed=0)}
        torch.save(content, folder / f"{name}.pt")
    command = (
        "--vq-ckpt", folder / "vq_ds16_c2i.pt", "--gpt-ckpt", folder / "c2i_B_256.pt", "--gpt-model", "GPT-B",
        "--image-size", "256", "--image-size-eval", "256", "--cfg-scale", "2.0", "--num-fid-samples", "1",
        "--sample-dir", tmp_path / "samples",
    )  # fmt: skip
    result = run_script(MANY, *command)
    assert result.returncode == 0, result.stderr
    name = "GPT-B-c2i_B_256-size-256-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz"
    assert Samples(tmp_path / "samples" / name).shape == (1, 256, 256, 3)
    short = (*command[:4], "--num-fid-samples", "1", "--sample-dir", tmp_path / "samples")
    in_this_process(sample_c2i_ddp.main, *short)
    out, error = capsys.readouterr()
    assert f"{name} is complete already" in out
    assert "--image-size 256 --image-size-eval 256 --cfg-scale 2.0: as published for" in error


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--gpt-model GPT-XS", ["loaded as GPT-XS) does not fit", "tok_embeddings.weight is (60, 128)"]),
        ("--image-size 32", ["64 codes of VQ-4-small", "draws 16"]),
        ("--cfg-scale 0.5", ["--cfg-scale", "at least 1 (1 is off)", "0.5"]),
        ("--cfg-interval 4 17", ["cfg-interval 4 17", "STOP <= 16"]),
        ("--cfg-interval 16", ["cfg-interval 16", "from -1 to 15"]),
        ("--cfg-power 2", ["--cfg-power 2.0", "power-cosine", "not constant"]),
        ("--labels 1 3", ["--labels 3 is out of range", "classes 0 to 2"]),
        ("--labels balanced 1", ["balanced 1", "only classes"]),
        ("--num-classes 4", ["--num-classes 4", "has 3 classes"]),
        (
            "--num-fid-samples 2000000000 --image-size-eval 8192",  # more than the disk holds
            ["out needs 805,306,368,000.00 MB", "MB free"],
        ),
        ("--top-p 0", ["--top-p", "(0, 1]"]),
        ("--temperature 0", ["--temperature", "above 0"]),
    ],
)
def test_wrong_flags(models, tmp_path, refused, flags, parts):
    refused(sample_c2i_ddp.main, command(models, tmp_path / "out", *flags.split()), *parts)
    assert not (tmp_path / "out").exists()


def test_wrong_files(models, tmp_path, refused):
    (tmp_path / "broken.pt").write_bytes(models["gpt"].read_bytes()[:9000])
    config = vq_model.preset("VQ-4-small", codebook_size=61)
    state = vq_model.VQModel(config).state_dict()
    checkpoint.save(tmp_path / "vq.pt", {"model": state, "config": asdict(config), "vq_model": "VQ-4-small"})
    raw = {key: value for key, value in checkpoint.load(models["gpt"]).items() if key != "ema"}
    checkpoint.save(tmp_path / "raw.pt", raw)
    for flags, *parts in (
        (("--gpt-ckpt", tmp_path / "broken.pt"), "broken.pt", "truncated"),
        (("--vq-ckpt", tmp_path / "vq.pt"), "knows 60 codes", "has 61"),
        (("--gpt-ckpt", tmp_path / "raw.pt", "--weights", "ema"), "no EMA weights"),
    ):
        refused(sample_c2i_ddp.main, command(models, tmp_path / "out", *flags), *parts)
        assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written(models, tmp_path, refused):
    (tmp_path / "file").write_text("")
    with patch.object(ImageSampler, "from_pretrained", side_effect=AssertionError("work before the check")):
        refused(sample_c2i_ddp.main, command(models, tmp_path / "file" / "x"), "file/x cannot be made")
        for out in ("grid.txt", ""):
            flags = ("--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"], "--out", tmp_path / out)
            refused(sample_c2i.main, flags, "ends in .png")


def test_a_model_that_is_not_finite(models):
    sampler = ImageSampler.from_pretrained(models["gpt"], models["vq"])
    sampler.gpt.norm.weight = torch.nn.Parameter(torch.full((128,), float("nan")))
    with pytest.raises(cli.InputError, match=r"gpt\.pt: the GPT's logits are not finite"):
        sampler([0, 1])


@pytest.mark.parametrize(
    ("given", "classes", "names"),
    [
        (["ant", "bee"], 3, ["ant", "bee", "class 2"]),  # trained with more classes than the codes had
        (["ant", "bee", "cat", "dog"], 3, ["ant", "bee", "cat"]),
        ([7, None], 2, ["7", "None"]),
        ("ant", 2, ["class 0", "class 1"]),
        ([], 2, ["class 0", "class 1"]),
        (["n01440764", "n02102040"], 1000, ["n01440764", "n02102040", "class 2"]),  # two classes of ImageNet's thousand
        ([f"n{i:08d}" for i in range(1000)], 1000, ["tench", "goldfish", "great white shark"]),
    ],
)
def test_names_of_classes(given, classes, names):
    gpt = Namespace(about={"classes": given}, config=Namespace(num_classes=classes))
    found = class_names(Namespace(gpt=gpt))
    assert len(found) == classes and found[:3] == names
