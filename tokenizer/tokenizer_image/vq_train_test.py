"""Training and reconstructing with the tokenizer: any number of processes, a run that was cut off, wrong inputs."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_train import Trainer, learning_rate, parse, training_loop
from utils import checkpoint
from utils.log import read_metrics
from utils.samples import Samples
from utils.testing import assert_refused, run_script

TRAIN = "tokenizer/tokenizer_image/vq_train.py"
RECONSTRUCT = "tokenizer/tokenizer_image/reconstruction_vq_ddp.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """22 blurred noise images in two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(22):
        path = root / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
        small.resize((20, 20), Image.Resampling.BICUBIC).save(path)
    return root


def flags(images, results, **changes) -> list[str]:
    """A run of 3 epochs of 2 steps with a restart of dead codes after the second one."""
    given = {
        "data-path": images, "vq-model": "VQ-4-small", "image-size": 16, "epochs": 3, "global-batch-size": 8,
        "lr": 3e-3, "codebook-size": 32, "restart-dead-codes": 2, "log-every": 1, "num-workers": 1,
        "results-dir": results,
    }  # fmt: skip
    given |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a finished run."""
    results = tmp_path_factory.mktemp("finished")
    training_loop(parse(flags(images, results)))
    return results


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == {"vq.pt", "reconstructions.png", "log.txt", "metrics.jsonl"}
    content = checkpoint.load(finished / "vq.pt")
    assert {"model", "ema", "steps", "config", "args", "vq_model", "image_size"} <= set(content)
    assert (content["steps"], content["vq_model"], content["image_size"]) == (6, "VQ-4-small", 16)
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        parts = row["reconstruction"] + row["codebook"] + row["commitment"] + row["entropy"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["codebook_usage"] > 1 / 32


def test_loading_what_was_trained(finished):
    model, about = load_tokenizer(finished / "vq.pt")
    assert (about["vq_model"], about["weights"], about["image_size"]) == ("VQ-4-small", "ema", 16)
    raw, _ = load_tokenizer(finished / "vq.pt", "VQ-4-small", "model")
    assert not raw.encoder.conv_in.weight.equal(model.encoder.conv_in.weight)
    assert model.config.codebook_size == 32
    assert not model.training


def test_a_cut_off_run_continues_as_if_it_had_not_been(images, finished, tmp_path, monkeypatch):
    settings = parse(flags(images, tmp_path, ckpt_every=3))
    step = Trainer.train_step

    def stop_after_four(self, batch):
        if self.step == 4:
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        training_loop(settings)
    assert (tmp_path / "last.pt").is_file()
    monkeypatch.undo()
    training_loop(settings)
    assert losses(tmp_path) == losses(finished)
    expected, found = (checkpoint.load(folder / "vq.pt") for folder in (finished, tmp_path))
    for kind in ("model", "ema"):
        assert all(found[kind][name].equal(value) for name, value in expected[kind].items())
    assert "continuing at step 3 of 6" in (tmp_path / "log.txt").read_text()


def test_a_finished_run_is_left_alone_and_another_refused(images, finished, capsys):
    before = (finished / "vq.pt").stat().st_mtime_ns
    training_loop(parse(flags(images, finished, log_every=50)))
    assert "already finished" in capsys.readouterr().out
    assert (finished / "vq.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"is of another run \(epochs 3, now 4\)"):
        training_loop(parse(flags(images, finished, epochs=4)))


def test_two_processes_train_the_same_model(images, finished, tmp_path):
    result = run_script(TRAIN, *flags(images, tmp_path), processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    one, two = read_metrics(finished), read_metrics(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-4)
    assert [row["codebook_usage"] for row in one] == [row["codebook_usage"] for row in two]


def test_read_by_workers_equals_cached(images, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.tokenizer_image.vq_data.CACHE_BYTES", 0)
    training_loop(parse(flags(images, tmp_path)))
    assert losses(tmp_path) == losses(finished)


def test_a_loss_that_is_not_finite_names_the_step(images, tmp_path, monkeypatch):
    step = Trainer.train_step

    def spoil(self, batch):
        if self.step == 3:
            with torch.no_grad():
                self.model.encoder.conv_in.weight.fill_(float("nan"))
        step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", spoil)
    with pytest.raises(SystemExit, match="the loss of step 4 is nan"):
        training_loop(parse(flags(images, tmp_path, log_every=6, ckpt_every=5)))
    assert not (tmp_path / "last.pt").exists()


def test_starting_from_weights(images, finished, tmp_path):
    training_loop(parse(flags(images, tmp_path, epochs=1, vq_ckpt=finished / "vq.pt", reconstruction_loss="l1")))
    model, _ = load_tokenizer(finished / "vq.pt")
    settings = parse(flags(images, tmp_path / "other", vq_ckpt=finished / "vq.pt"))
    with vq_train.world() as here:
        trainer = Trainer(settings, 22, here, None)
    assert trainer.model.encoder.conv_in.weight.equal(model.encoder.conv_in.weight)


def test_learning_rate():
    rate = [learning_rate(s, 100, lr=1.0, end_lr=0.1, warmup_ratio=0.1) for s in range(101)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 11)
    assert rate[10] == 1.0
    assert rate[99] == rate[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rate[10:]))
    assert learning_rate(0, 1, lr=1.0, end_lr=0.1, warmup_ratio=0.05) == 1.0


def test_dead_codes_begin_anew(images, tmp_path):
    """Unused entries become latents of the batch in both models, used ones stay; their moments are forgotten."""
    settings = replace(parse(flags(images, tmp_path)), restart_dead_codes=0)
    with vq_train.world() as here:
        trainer = Trainer(settings, 22, here, None)
    trainer.train_step(torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8))
    seen, weight = trainer.dead_codes.seen.clone(), trainer.model.quantize.embedding.weight
    before, latents = weight.detach().clone(), torch.randn(2, 8, 4, 4)
    dead = trainer.dead_codes.restart(trainer.model, trainer.ema, trainer.optimizer, latents, 0, 1)
    assert 0 < dead == int((~seen).sum())
    assert weight[seen].equal(before[seen])
    rows = torch.nn.functional.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    assert torch.cdist(weight[~seen], rows).min(1).values.max() < 1e-3
    assert trainer.ema.quantize.embedding.weight[~seen].equal(weight[~seen])
    assert not trainer.optimizer.state[weight]["exp_avg"][~seen].any()
    assert not trainer.dead_codes.seen.any()


def test_reconstruction_on_one_and_two_processes(images, finished, tmp_path):
    command = [RECONSTRUCT, "--data-path", images, "--vq-ckpt", finished / "vq.pt", "--image-size", 16]
    command += ["--per-proc-batch-size", 4]
    one = run_script(*command, "--out", tmp_path / "one.npz", OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    two = run_script(*command, "--sample-dir", tmp_path / "dir", processes=2, OMP_NUM_THREADS="1")
    assert two.returncode == 0, two.stderr
    named = tmp_path / "dir" / f"VQ-4-small-vq-{images.name}-22-size-16-size-16.npz"
    a, b = np.load(tmp_path / "one.npz"), np.load(named)
    np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    np.testing.assert_array_equal(a["arr_1"], [0] * 11 + [1] * 11)
    np.testing.assert_array_equal(b["arr_1"], a["arr_1"])
    said = [next(line for line in r.stdout.splitlines() if "PSNR" in line).split("PSNR")[1] for r in (one, two)]
    assert said[0] == said[1]
    assert not list(tmp_path.glob("**/*.parts"))


def test_reconstruction_of_a_part_at_another_size(images, finished, tmp_path):
    result = run_script(
        RECONSTRUCT, "--data-path", images, "--vq-ckpt", finished / "vq.pt", "--image-size", 16,
        "--image-size-eval", 24, "--num-images", 4, "--out", tmp_path / "x.npz",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = Samples(tmp_path / "x.npz")
    assert written.shape == (4, 24, 24, 3)
    assert written.labels.tolist() == [0, 0, 1, 1]


def test_wrong_inputs_are_refused_before_any_work(images, finished, tmp_path):
    def refused(change, *parts, processes=1):
        results = tmp_path / "refused"
        assert_refused(run_script(TRAIN, *flags(images, results, **change), processes=processes), *parts)
        assert not results.exists()

    refused({"image_size": 18}, "--image-size 18", "multiple of 4")
    refused({"global_batch_size": 100}, "--global-batch-size 100", "22 images")
    refused({"data_path": tmp_path / "nowhere"}, "nowhere")
    refused({"vq_ckpt": finished / "vq.pt", "codebook_size": 64}, "quantize.embedding.weight is (32, 8)", "(64, 8)")
    refused({"global_batch_size": 7}, "--global-batch-size 7 is not divisible by 2 processes", processes=2)


def test_wrong_tokenizer_files(images, finished, tmp_path):
    with pytest.raises(ValueError, match=r"loaded as VQ-16\) does not fit this model: encoder.conv_in.weight is"):
        load_tokenizer(finished / "vq.pt", "VQ-16")
    with pytest.raises(ValueError, match="there is no tokenizer VQ-4; choose one of VQ-16"):
        load_tokenizer(finished / "vq.pt", "VQ-4")
    content = checkpoint.load(finished / "vq.pt")
    checkpoint.save(tmp_path / "bare.pt", {"model": content["model"]})
    assert load_tokenizer(tmp_path / "bare.pt")[1]["vq_model"] == "VQ-4-small"
    with pytest.raises(
        ValueError, match=r"loaded as VQ-8\) does not fit .*; they are those of VQ-4-small with 32 codes"
    ):
        load_tokenizer(tmp_path / "bare.pt", "VQ-8")
    (tmp_path / "cut.pt").write_bytes((finished / "vq.pt").read_bytes()[:5000])
    result = run_script(
        RECONSTRUCT, "--data-path", images, "--vq-ckpt", tmp_path / "cut.pt", "--image-size", 16
    )  # fmt: skip
    assert_refused(result, "cut.pt", "truncated")
