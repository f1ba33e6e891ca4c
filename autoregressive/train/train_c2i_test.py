"""The trainer: the published trajectory, any number of processes, a run that was cut off, and wrong inputs."""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.train.optim import adamw, update
from autoregressive.train.schedule import learning_rate, patch_stages
from dataset.codes import Manifest, Place, Writer
from utils import checkpoint
from utils.ema import ema_copy, update_ema
from utils.testing import assert_refused, close, fill_by_formula, formula, run_script

SCRIPT = "autoregressive/train/train_c2i.py"


def test_published_trajectory():
    """16 steps over three levels: losses, gradient norms, learning rates, final weights and EMA."""
    golden = np.load(Path(__file__).parent / "testdata" / "train_trajectory.npz")
    model_args, train = json.loads(str(golden["config"])), json.loads(str(golden["train"]))
    config = GPTConfig(
        dim=model_args["dim"], n_layer=model_args["n_layer"], n_head=model_args["n_head"],
        vocab_size=model_args["vocab"], block_size=model_args["block"], num_classes=model_args["classes"],
    )  # fmt: skip
    model = fill_by_formula(Transformer(config)).train()
    ema = ema_copy(model)
    stages = patch_stages(train["epochs"], train["patch_level"], train["epoch_rate"])
    betas = tuple(train["betas"])
    optimizer = adamw(model, train["lr"], train["weight_decay"], betas)
    rate = partial(
        learning_rate, stages=stages, steps_per_epoch=train["steps_per_epoch"], lr=train["lr"], end_lr=train["end_lr"],
        warmup_epochs=train["warmup_epochs"], decay_ratio=train["decay_ratio"],
    )  # fmt: skip
    for step in range(len(golden["loss"])):
        assert rate(step) == pytest.approx(float(golden["lr"][step]), rel=1e-6)
        batch = (
            torch.from_numpy(golden["idx"][step].astype(np.int64)),
            torch.from_numpy(golden["cls"][step].astype(np.int64)),
        )
        patch = int(golden["p"][step])
        max_norm = train["max_grad_norm"]
        loss, norm = update(model, optimizer, [batch], patch, lr=rate(step), max_grad_norm=max_norm)
        update_ema(ema, model, train["ema_decay"])
        close(loss, golden["loss"][step])
        close(norm, golden["grad_norm_before_clip"][step], rtol=1e-4, atol=0)
    weights, averaged = dict(model.named_parameters()), dict(ema.named_parameters())
    for i, name in enumerate(golden["names"]):
        start = torch.from_numpy(formula(str(name), tuple(weights[name].shape)))
        close(weights[name].norm(), golden["param_norm"][i], rtol=1e-4, atol=0)
        close((weights[name] - start).norm(), golden["param_moved"][i], rtol=1e-3, atol=0)
        close((averaged[name] - start).norm(), golden["ema_moved"][i], rtol=1e-3, atol=0)


def test_accumulation_equals_the_big_batch():
    config = GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=32, block_size=16, num_classes=3)
    codes, labels = torch.randint(32, (8, 16)), torch.randint(3, (8,))
    losses = []
    for parts in (1, 4):
        model = fill_by_formula(Transformer(config))
        optimizer = adamw(model, 1e-3, 0.05, (0.9, 0.95))
        batches = list(zip(codes.chunk(parts), labels.chunk(parts), strict=True))
        losses.append([update(model, optimizer, batches, 2, lr=1e-3, max_grad_norm=1.0)[0].item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def code_path(tmp_path_factory):
    """48 images of 4x4 codes in three classes, each class favouring its own codes."""
    root = tmp_path_factory.mktemp("codes")
    manifest = Manifest("toy", 32, 48, 2, 16, 64, shard_size=20, vq_model="VQ-4-small", classes=["a", "b", "c"])
    writer = Writer(Place(root, "toy", 32), manifest)
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    codes = rng.integers(16, size=(48, 2, 16)) + 16 * labels[:, None, None]
    for shard in range(manifest.shards):
        rows = slice(manifest.rows(shard).start, manifest.rows(shard).stop)
        writer.write(shard, codes[rows], labels[rows])
    writer.finish()
    return root


def train(code_path, results, *flags, processes=1, **options):
    return run_script(
        SCRIPT, "--code-path", code_path, "--val-code-path", code_path, "--dataset", "toy", "--image-size", "32",
        "--results-dir", results, "--gpt-model", "GPT-XXS", "--global-batch-size", "8", "--epochs", "4",
        "--patch-level", "2", "--scheduler", "--lr", "1e-3", "--log-every", "1", *flags,
        processes=processes, **options,
    )  # fmt: skip


def rows(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.fixture(scope="module")
def finished(code_path, tmp_path_factory):
    results = tmp_path_factory.mktemp("run")
    result = train(code_path, results, "--ema", "--cloud-save-path", results / "cloud")
    assert result.returncode == 0, result.stderr
    return results / "000-GPT-XXS", result


class TestRun:
    def test_losses(self, finished):
        losses = rows(finished[0], "loss")
        assert len(losses) == 24
        assert losses[0] == pytest.approx(math.log(64), rel=1e-5)
        assert losses[-1] < math.log(64) - 0.3

    def test_the_token_level_validation_loss_is_reported_in_every_epoch(self, finished):
        assert len(rows(finished[0], "val_loss")) == 4
        assert len(rows(finished[0], "val_loss_p2")) == 2
        assert len(rows(finished[0], "val_loss_ema")) == 4

    def test_the_plan_is_printed(self, finished):
        assert "cost relative to next-token training of the same epochs: 0.625" in finished[1].stdout

    def test_checkpoints_at_the_end_of_each_level_are_plain_and_complete(self, finished):
        folder = finished[0] / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["0000012.pt", "0000024.pt"]
        content = checkpoint.load(folder / "0000024.pt")
        assert content["config"]["vocab_size"] == 64
        assert content["classes"] == ["a", "b", "c"]
        assert content["steps"] == 24
        checkpoint.load_weights(Transformer(GPTConfig(**content["config"])), content["ema"], "ema")
        assert (finished[0].parent / "cloud" / "000-GPT-XXS" / "checkpoints" / "0000024.pt").is_file()

    def test_a_curve_is_drawn(self, finished):
        assert (finished[0] / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_finished_work_is_not_redone(self, finished, code_path):
        result = train(code_path, finished[0].parent, "--ema", "--cloud-save-path", finished[0].parent / "cloud")
        assert result.returncode == 0
        assert "is finished already" in result.stdout

    def test_a_run_that_was_cut_off_continues_to_the_same_losses(self, finished, code_path, tmp_path):
        """Dropout, label drop, optimizer, EMA and the schedule included; cut in the middle of an epoch."""
        flags = ("--ema", "--cloud-save-path", str(tmp_path / "cloud"), "--ckpt-every", "8")
        assert train(code_path, tmp_path, *flags).returncode == 0
        folder = tmp_path / "000-GPT-XXS"
        whole = rows(folder, "loss")
        assert whole == rows(finished[0], "loss")
        for name in ("0000012.pt", "0000016.pt", "0000024.pt"):
            (folder / "checkpoints" / name).unlink()
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
        result = train(code_path, tmp_path, *flags)
        assert "continuing at step 8 of 24" in result.stdout
        assert rows(folder, "loss") == whole
        assert rows(folder, "val_loss_ema") == rows(finished[0], "val_loss_ema")


def test_two_processes_give_the_losses_of_one(code_path, tmp_path):
    """Same global batch, views and dropped labels, also in parts; dropout is off, its masks belong to a process."""
    flags = ("--dropout-p", "0", "--token-dropout-p", "0", "--gradient-accumulation-steps")
    for processes in (1, 2):
        result = train(code_path, tmp_path / str(processes), *flags, processes, processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (tmp_path / str(n) / "000-GPT-XXS" for n in (1, 2))
    for key in ("loss", "grad_norm", "val_loss"):
        np.testing.assert_allclose(rows(one, key), rows(two, key), rtol=1e-4)


def test_drop_path_takes_the_place_of_dropout(code_path, tmp_path):
    """As published; the dropout of the embedded input stays."""
    result = train(code_path, tmp_path, "--drop-path-rate", "0.2", "--epochs", "1")
    assert result.returncode == 0, result.stderr
    config = checkpoint.load(tmp_path / "000-GPT-XXS" / "checkpoints" / "0000006.pt")["config"]
    assert (config["drop_path_rate"], config["resid_dropout_p"], config["ffn_dropout_p"]) == (0.2, 0, 0)
    assert config["token_dropout_p"] == 0.1


def test_start_from_given_weights(finished, code_path, tmp_path):
    start = finished[0] / "checkpoints" / "0000024.pt"
    result = train(code_path, tmp_path, "--gpt-ckpt", start, "--lr", "1e-9")
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "000-GPT-XXS", "val_loss")[0] == pytest.approx(rows(finished[0], "val_loss")[-1], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(code_path, tmp_path):
    """And the message names the steps."""
    result = train(code_path, tmp_path, "--lr", "1e30", "--max-grad-norm", "0")
    assert result.returncode == 1
    stopped = re.search(r"the loss is (\S+) between steps \d+ and \d+ \(gradient norm (\S+)\)", result.stderr)
    assert stopped, result.stderr
    assert not all(math.isfinite(float(value)) for value in stopped.groups())
    assert "Traceback" not in result.stderr


class TestWrongInputs:
    def test_missing_code_folder(self, tmp_path):
        assert_refused(train(tmp_path / "nowhere", tmp_path), "there is no folder", "nowhere")

    def test_codes_of_another_size(self, code_path, tmp_path):
        assert_refused(train(code_path, tmp_path, "--image-size", "64"), "no toy64_codes", "toy32")

    def test_patch_side_that_does_not_divide_the_grid(self, code_path, tmp_path):
        assert_refused(
            train(code_path, tmp_path, "--patch-level", "4", "--epochs", "8"), "does not divide the grid of 4x4"
        )

    def test_batch_not_divisible_by_processes(self, code_path, tmp_path):
        flags = ("--global-batch-size", "7")
        assert_refused(train(code_path, tmp_path, *flags, processes=2), "--global-batch-size 7", "2 processes")

    def test_checkpoint_of_another_preset(self, finished, code_path, tmp_path):
        start = finished[0] / "checkpoints" / "0000024.pt"
        result = train(code_path, tmp_path, "--gpt-model", "GPT-XS", "--gpt-ckpt", start)
        assert_refused(result, "does not fit", "GPT-XS", "tok_embeddings.weight is (64, 128)")
        assert not list(tmp_path.iterdir())

    def test_truncated_checkpoint(self, finished, code_path, tmp_path):
        broken = tmp_path / "broken.pt"
        broken.write_bytes((finished[0] / "checkpoints" / "0000024.pt").read_bytes()[:5000])
        assert_refused(train(code_path, tmp_path, "--gpt-ckpt", broken), "broken.pt", "truncated")

    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            (("--epoch-rate", "1.5"), ("--epoch-rate", "(0, 1]", "1.5")),
            (("--gpt-model", "GPT-Z"), ("--gpt-model", "GPT-Z", "GPT-B")),
            (("--num-classes", "2"), ("labels go up to 2", "--num-classes is 2")),
            (("--global-batch-size", "100"), ("--global-batch-size 100", "48 images")),
        ],
    )
    def test_flags(self, code_path, tmp_path, flags, parts):
        assert_refused(train(code_path, tmp_path, *flags), *parts)
