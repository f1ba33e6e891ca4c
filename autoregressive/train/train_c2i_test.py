"""The trainer's command: any schedule and number of processes, what it writes and says, and wrong inputs."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.train import train_c2i
from autoregressive.train.gpt_task import Data
from autoregressive.train.testing import SCRIPT, completed, flags, rows, save_tokenizer, write_codes
from dataset.codes import Codes, toy
from utils import checkpoint
from utils.cli import InputError
from utils.files import sha256
from utils.log import read_metrics
from utils.testing import assert_refused, run_script

SCHEDULE = ("epochs", "patch-level")  # flags


@pytest.fixture(scope="module")
def code_path(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes"))


def train(code_path, results, *more, processes=1, without=()):
    return run_script(SCRIPT, *flags(code_path, results, without), *more, processes=processes)


def trained(code_path, results, *more, processes=1, without=()):
    """What it prints; it must end well."""
    return completed(*flags(code_path, results, without), *more, processes=processes)


@pytest.fixture(scope="module")
def finished(code_path, tmp_path_factory):
    results = tmp_path_factory.mktemp("run")
    printed = trained(code_path, results, "--ema", "--cloud-save-path", results / "cloud")
    return results / "000-GPT-XXS", printed


def test_a_run_says_and_keeps_what_it_did(finished, code_path):
    """Losses from ln(vocabulary) down, validation in every epoch, whole checkpoints at the ends of the levels, curves."""
    folder, printed = finished
    losses = rows(folder, "loss")
    assert len(losses) == 24
    assert losses[0] == pytest.approx(math.log(64), rel=1e-5)
    assert losses[-1] < math.log(64) - 0.3
    assert [len(rows(folder, key)) for key in ("val_loss", "val_loss_p2", "val_loss_ema")] == [4, 2, 4]
    assert "cost relative to next-token training of the same epochs: 0.625" in printed
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000012.pt", "0000024.pt"]
    content = checkpoint.load(folder / "checkpoints" / "0000024.pt")
    assert (content["config"]["vocab_size"], content["classes"], content["steps"]) == (64, ["a", "b", "c"], 24)
    checkpoint.load_weights(Transformer(GPTConfig(**content["config"])), content["ema"], "ema")
    assert len(list((folder.parent / "cloud").glob("000-GPT-XXS-*/checkpoints/0000024.pt"))) == 1

    again = trained(code_path, folder.parent, "--ema", "--cloud-save-path", folder.parent / "cloud")
    assert "is finished already" in again


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_two_processes_give_the_losses_of_one(code_path, tmp_path, precision, off):
    """Same global batch, views and dropped labels, also in parts; dropout is off, its masks belong to a process.

    In bf16 the gradient of each part is rounded before the parts are added up.
    """
    flags = ("--dropout-p", "0", "--token-dropout-p", "0", "--mixed-precision", precision)
    for n in (1, 2):
        trained(code_path, tmp_path / str(n), *flags, "--gradient-accumulation-steps", n, processes=n)
    one, two = (tmp_path / str(n) / "000-GPT-XXS" for n in (1, 2))
    for key in ("loss", "grad_norm", "val_loss"):
        np.testing.assert_allclose(rows(one, key), rows(two, key), rtol=off)


class TestSchedules:
    def test_any_schedule_in_steps(self, code_path, tmp_path):
        """Also one that changes level in the middle of an epoch and ends there."""
        levels = ("--patch-sizes", "4", "1", "2", "--patch-steps", "3", "4", "9")
        printed = trained(code_path, tmp_path, *levels, without=SCHEDULE)
        folder = tmp_path / "000-GPT-XXS"
        assert rows(folder, "step")[-1] == 16
        found = {row["step"]: row["patch"] for row in read_metrics(folder) if "loss" in row}
        assert found == {step: 4 if step <= 3 else 1 if step <= 7 else 2 for step in range(1, 17)}
        assert len(rows(folder, "val_loss")) == 5  # two epochs, and the ends of the levels
        assert "note: the last level is not on single codes" in printed
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "0000003.pt", "0000007.pt", "0000016.pt",
        ]  # fmt: skip

    def test_free_levels_give_the_losses_of_the_published_flags(self, finished, code_path, tmp_path):
        levels = ("--patch-sizes", "2", "1", "--patch-epochs", "2", "2", "--ema")
        trained(code_path, tmp_path, *levels, without=SCHEDULE)
        assert rows(tmp_path / "000-GPT-XXS", "loss") == rows(finished[0], "loss")

    def test_a_dry_run_prints_and_draws_the_plan_and_nothing_else(self, code_path, tmp_path):
        printed = trained(code_path, tmp_path, "--dry-run", "--epochs", "100", "--patch-level", "3")
        lines = [line.split() for line in printed.splitlines()]
        assert [line[:4] for line in lines[1:4]] == [
            ["4x4", "0-25", "150", "1,200"], ["2x2", "25-50", "150", "4,800"], ["1x1", "50-100", "300", "38,400"],
        ]  # fmt: skip
        assert "cost relative to next-token training of the same epochs: 0.578 (positions)" in printed
        assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]

    @pytest.mark.parametrize(
        ("levels", "parts"),
        [
            (("--patch-sizes", "2", "1"), ("--patch-epochs or --patch-steps",)),
            (("--patch-sizes", "2", "1", "--patch-epochs", "3"), ("[3.0] for [2, 1]",)),
            (("--patch-sizes", "3", "1", "--patch-epochs", "3", "3"), ("side 3", "grid of 4x4")),
            (("--patch-sizes", "2", "1", "--patch-epochs", "0.01", "3"), ("0.01 epochs of 6 steps", "no step")),
            (("--patch-sizes", "2", "1", "--patch-steps", "3", "3", "--epochs", "3"), ("leave out", "--epochs")),
            (("--patch-steps", "3"), ("--patch-sizes", "give those too")),
        ],
    )
    def test_wrong_schedules(self, code_path, tmp_path, levels, parts):
        assert_refused(train(code_path, tmp_path, *levels, without=SCHEDULE), *parts)
        assert not list(tmp_path.iterdir())


def test_validation_on_a_split(code_path, tmp_path):
    """Held-out images are not trained on: 5 of 48 leave 43, 5 steps of 8 an epoch."""
    printed = trained(code_path, tmp_path, "--epochs", "2", "--val-split", "0.1", without=("val-code-path",))
    assert "43 images of 16 codes in 2 views" in printed
    assert rows(tmp_path / "000-GPT-XXS", "step")[-1] == 10
    data = Data.split(Codes(code_path, "toy", 32), 0.1)
    assert sorted([*data.images, *data.val_images]) == list(range(48)) and len(data.val_images) == 5
    assert_refused(train(code_path, tmp_path, "--val-split", "0.1"), "two ways")


def test_two_code_folders_are_views_of_the_same_images(code_path, tmp_path):
    write_codes(tmp_path / "other", seed=1)
    printed = trained(code_path, tmp_path, "--code-path", code_path, tmp_path / "other")
    assert "48 images of 16 codes in 4 views" in printed
    toy.write_codes(tmp_path / "fewer", images=40, codebook=64)
    assert_refused(train(code_path, tmp_path, "--code-path", code_path, tmp_path / "fewer"), "48", "40")


def test_tensorboard(code_path, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(code_path, tmp_path, "--tensorboard")
    folder = tmp_path / "000-GPT-XXS"
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(rows(folder, "loss"))
    assert {"lr", "grad_norm", "val_loss", "mfu"} <= set(events.Tags()["scalars"])


def test_samples_are_drawn_while_training(tmp_path):
    """A grid every so many epochs and at the end, labelled, without a change to the run; by the codes' tokenizer only."""
    file = save_tokenizer(tmp_path / "vq.pt", codebook_size=64)
    toy.write_codes(tmp_path, images=48, tokens=64, codebook=64, tokenizer_sha256=sha256(file))
    flags = ("--epochs", "3", "--ema")
    trained(tmp_path, tmp_path / "with", "--vq-ckpt", file, "--sample-every", "2", *flags)
    folder = tmp_path / "with" / "000-GPT-XXS"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["epoch-0002.png", "epoch-0003.png"]
    with Image.open(folder / "samples" / "epoch-0003.png") as grid:
        assert grid.width > 8 * 64 and grid.height > 3 * 64  # 3 classes of 8, 32 px enlarged twice, and their names
    trained(tmp_path, tmp_path / "without", *flags)
    assert rows(tmp_path / "without" / "000-GPT-XXS", "loss") == rows(folder, "loss")

    other = save_tokenizer(tmp_path / "other.pt", codebook_size=64)
    assert_refused(train(tmp_path, tmp_path, "--vq-ckpt", other), "other.pt is not the tokenizer of these codes")


def test_a_tokenizer_of_another_grid_is_refused(code_path, tmp_path):
    file = save_tokenizer(tmp_path / "vq.pt", codebook_size=512)
    assert_refused(train(code_path, tmp_path, "--vq-ckpt", file), "makes 64 codes of 512", "these codes are 16 of 64")


def test_what_does_not_fit_the_model_is_refused_before_work(code_path, tmp_path):
    """Validation codes of another tokenizer, and ids or labels of the published layout, which has no manifest."""
    toy.write_codes(tmp_path / "val", images=48, codebook=512)
    assert_refused(train(code_path, tmp_path, "--val-code-path", tmp_path / "val"), "codebook_size 512", "codes 64")
    toy.write_codes(tmp_path / "bare", "per-image", images=48, codebook=64)
    (tmp_path / "bare" / "toy32.json").unlink()
    bare = ("--code-path", tmp_path / "bare", "--val-code-path", tmp_path / "bare")
    assert_refused(train(code_path, tmp_path, *bare, "--vocab-size", "32"), "has the code", "the vocabulary is 32")
    assert not list(tmp_path.glob("000*"))
    printed = trained(code_path, tmp_path, *bare, "--vocab-size", "64", "--num-classes", "3", "--epochs", "1")
    assert "is read from its packed copy" in printed


def test_codes_that_are_no_square_grid_are_refused_before_they_are_packed(tmp_path):
    toy.write_codes(tmp_path / "codes", "per-image", images=48, tokens=32, codebook=64)
    for schedule in (["--patch-level", "1"], ["--patch-level", "2"]):
        with pytest.raises(InputError, match="has 32 codes an image; expected a square grid"):
            train_c2i.main([*flags(tmp_path / "codes", tmp_path), *schedule])
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == ["toy32.json", "toy32_codes", "toy32_labels"]


def test_drop_path_takes_the_place_of_dropout(code_path, tmp_path):
    """As published; the dropout of the embedded input stays."""
    trained(code_path, tmp_path, "--drop-path-rate", "0.2", "--epochs", "1")
    config = checkpoint.load(tmp_path / "000-GPT-XXS" / "checkpoints" / "0000006.pt")["config"]
    assert (config["drop_path_rate"], config["resid_dropout_p"], config["ffn_dropout_p"]) == (0.2, 0, 0)
    assert config["token_dropout_p"] == 0.1


def test_start_from_given_weights(finished, code_path, tmp_path):
    start = finished[0] / "checkpoints" / "0000024.pt"
    trained(code_path, tmp_path, "--gpt-ckpt", start, "--lr", "1e-9")
    assert rows(tmp_path / "000-GPT-XXS", "val_loss")[0] == pytest.approx(rows(finished[0], "val_loss")[-1], rel=1e-3)
    other = finished[0] / "checkpoints" / "0000012.pt"  # other weights are another run
    trained(code_path, tmp_path, "--gpt-ckpt", other, "--lr", "1e-9")
    first = [rows(tmp_path / f"00{i}-GPT-XXS", "loss")[0] for i in (0, 1)]
    assert first[0] < first[1] - 0.1


@pytest.mark.parametrize(
    ("log_every", "said"),
    [(1, r"the gradient norm is nan at step 3"), (6, r"the loss is nan at step [34] and \d more up to step 6")],
)
def test_a_loss_that_is_not_finite_stops_the_run(code_path, tmp_path, log_every, said):
    """The message names the steps, and the last good checkpoint, which stays."""
    flags = ("--max-grad-norm", "0", "--log-every", log_every, "--ckpt-every", "1" if log_every == 1 else "100")
    result = train(code_path, tmp_path, "--lr", "1e30", *flags)
    assert result.returncode == 1
    assert re.search(said, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    kept = sorted((tmp_path / "000-GPT-XXS").glob("checkpoints/*"))
    assert f"the last good checkpoint is {kept[-1] if kept else 'none'};" in result.stderr
    for path in kept:
        assert all(torch.isfinite(value).all() for value in checkpoint.load(path)["model"].values())


class TestWrongInputs:
    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            (("--code-path", "nowhere"), ("there is no folder", "nowhere")),
            (("--image-size", "64"), ("no toy64_codes", "toy32")),
            (("--patch-level", "4", "--epochs", "8"), ("does not divide the grid of 4x4",)),
            (("--epoch-rate", "1.5"), ("--epoch-rate", "(0, 1]", "1.5")),
            (("--gpt-model", "GPT-Z"), ("--gpt-model", "GPT-Z", "GPT-B")),
            (("--num-classes", "2"), ("labels go up to 2", "--num-classes is 2")),
            (("--global-batch-size", "100"), ("--global-batch-size 100", "48 images")),
        ],
    )
    def test_flags(self, code_path, tmp_path, flags, parts):
        assert_refused(train(code_path, tmp_path, *flags), *parts)

    def test_batch_not_divisible_by_processes(self, code_path, tmp_path):
        flags = ("--global-batch-size", "7")
        assert_refused(train(code_path, tmp_path, *flags, processes=2), "--global-batch-size 7", "2 processes")

    def test_checkpoints_of_another_preset_and_truncated_ones(self, finished, code_path, tmp_path):
        start, broken = finished[0] / "checkpoints" / "0000024.pt", tmp_path / "broken.pt"
        result = train(code_path, tmp_path, "--gpt-model", "GPT-XS", "--gpt-ckpt", start)
        assert_refused(result, "does not fit", "GPT-XS", "tok_embeddings.weight is (64, 128)")
        assert not list(tmp_path.iterdir())
        broken.write_bytes(start.read_bytes()[:5000])
        assert_refused(train(code_path, tmp_path, "--gpt-ckpt", broken), "broken.pt", "truncated")
