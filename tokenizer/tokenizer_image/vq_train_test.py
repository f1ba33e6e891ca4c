"""Training and reconstructing with the tokenizer: any number of processes, a run that was cut off, wrong inputs."""

import os
import signal
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.vq_data import batches_of
from tokenizer.tokenizer_image.vq_model import Tokenizer, VQModel
from tokenizer.tokenizer_image.vq_settings import TokenizerSettings
from tokenizer.tokenizer_image.vq_task import DeadCodes, TokenizerTask, learning_rate
from tokenizer.tokenizer_image.vq_train import main
from utils import checkpoint
from utils.cli import InputError
from utils.distributed import World
from utils.fake_gpu import GPU, fake_gpu, train_steps
from utils.kernels import cpu_computes_in_bf16
from utils.log import read_metrics
from utils.networks import save_network
from utils.pixels import to_float
from utils.testing import assert_refused, run_script, start_forks, wait_for, wait_for_forks

TRAIN = "tokenizer/tokenizer_image/vq_train.py"


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
        "results-dir": results, "mixed-precision": "fp32",
    }  # fmt: skip
    given |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a finished run."""
    results = tmp_path_factory.mktemp("finished")
    main(flags(images, results))
    return results


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == {
        "vq.pt", "reconstructions.png", "loss.png", "codebook.png", "log.txt", "metrics.jsonl", "run.json", "lock",
        "checkpoints",
    }  # fmt: skip
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
    assert all(row["dead_codes"] == round(32 * (1 - row["codebook_usage"])) for row in rows)
    assert all(1 <= row["perplexity"] <= 32 - row["dead_codes"] + 1e-6 for row in rows)


def test_loading_what_was_trained(finished):
    model = Tokenizer.from_pretrained(finished / "vq.pt")
    assert {"vq_model": "VQ-4-small", "weights": "ema", "image_size": 16}.items() <= model.about.items()
    raw = Tokenizer.from_pretrained(finished / "vq.pt", "VQ-4-small", weights="model")
    assert not raw.encoder.conv_in.weight.equal(model.encoder.conv_in.weight)
    assert model.config.codebook_size == 32
    assert not model.training


def stop_after(monkeypatch, steps: int, end) -> None:
    """Call end() in place of the update after so many."""
    loss = TokenizerTask.loss

    def stopping(self, objective, batch, step):
        if step == steps:
            end()
        return loss(self, objective, batch, step)

    monkeypatch.setattr(TokenizerTask, "loss", stopping)


def cut_off_and_continued(arguments, number, step, monkeypatch) -> None:
    """Cut off at the update after so many: by an error, or by a signal, which saves first; then run to the end."""

    def end():
        if number == signal.SIGKILL:
            raise ZeroDivisionError
        os.kill(os.getpid(), number)

    stop_after(monkeypatch, step, end)
    with pytest.raises(ZeroDivisionError if number == signal.SIGKILL else SystemExit) as ended:
        main(arguments)
    if number != signal.SIGKILL:
        assert ended.value.code == 0
    monkeypatch.undo()
    main(arguments)


def assert_same_weights(actual, expected, kinds=("model", "ema")) -> None:
    actual, expected = (checkpoint.load(folder / "vq.pt") for folder in (actual, expected))
    for kind in kinds:
        assert all(actual[kind][name].equal(value) for name, value in expected[kind].items()), kind


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_cut_off_run_continues_as_if_it_had_not_been(images, finished, tmp_path, monkeypatch, number):
    """Cut off at its fifth update, with a checkpoint at the third."""
    cut_off_and_continued(flags(images, tmp_path, ckpt_every=3), number, 4, monkeypatch)
    assert losses(tmp_path) == losses(finished)
    assert_same_weights(tmp_path, finished)
    step = 3 if number == signal.SIGKILL else 5
    assert f"continuing at step {step} of 6" in (tmp_path / "log.txt").read_text()


ADVERSARIAL = {"disc-weight": 0.5, "disc-layers": 1, "disc-dim": 8, "disc-start": 3}


@pytest.fixture(scope="module")
def adversarial(images, tmp_path_factory):
    """The folder of a finished run with a discriminator from its fourth update on."""
    results = tmp_path_factory.mktemp("adversarial")
    main(flags(images, results, **ADVERSARIAL))
    return results


def test_what_a_run_with_a_discriminator_leaves(adversarial, finished):
    rows, plain = read_metrics(adversarial), read_metrics(finished)
    assert [row["loss"] for row in rows[:3]] == [row["loss"] for row in plain[:3]]
    assert (
        [row["adversarial_weight"] > 0 for row in rows]
        == [row["disc_loss"] > 0 for row in rows]
        == [False] * 3 + [True] * 3
    )
    for row in rows:
        parts = row["reconstruction"] + row["codebook"] + row["commitment"] + row["entropy"]
        assert row["loss"] == pytest.approx(parts + row["adversarial_weight"] * row["adversarial"], rel=1e-5)
    assert rows[3]["loss"] != plain[3]["loss"]
    assert {"adversarial", "logits_real", "disc_loss"} <= set(rows[0])
    content = checkpoint.load(adversarial / "checkpoints" / "0000006.pt")
    assert {"model", "optimizer", "ema", "discriminator", "optimizer_disc"} <= set(content)
    assert {int(state["step"]) for state in content["optimizer_disc"]["state"].values()} == {3}
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {6}
    about = Tokenizer.from_pretrained(adversarial / "vq.pt").about
    assert not {"discriminator", "optimizer_disc"} & set(about)
    assert {"discriminator", "optimizer_disc", "dead_codes"}.isdisjoint(checkpoint.about(content))


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_cut_off_run_with_a_discriminator(images, adversarial, tmp_path, monkeypatch, number, step):
    """Before and after its discriminator begins."""
    cut_off_and_continued(flags(images, tmp_path, ckpt_every=2, **ADVERSARIAL), number, step, monkeypatch)
    assert read_metrics_without_speed(tmp_path) == read_metrics_without_speed(adversarial)
    assert_same_weights(tmp_path, adversarial, ("model", "ema", "discriminator"))


def test_a_killed_run_with_a_discriminator(images, adversarial, tmp_path):
    """kill -9, after the discriminator began."""
    arguments = flags(images, tmp_path, ckpt_every=1, **ADVERSARIAL)
    with start_forks([TRAIN, *arguments], OMP_NUM_THREADS="1") as (fork,):
        wait_for("the checkpoint of step 4", (tmp_path / "checkpoints" / "0000004.pt").is_file)
        fork.kill()
        assert wait_for_forks([fork]) == -signal.SIGKILL
    main(arguments)
    assert "continuing at step" in (tmp_path / "log.txt").read_text()
    np.testing.assert_allclose(losses(tmp_path), losses(adversarial), rtol=1e-5)  # other threads add in another order
    assert read_metrics(tmp_path)[-1]["disc_loss"] == pytest.approx(
        read_metrics(adversarial)[-1]["disc_loss"], rel=1e-4
    )


def read_metrics_without_speed(folder) -> list[dict]:
    names = ("loss", "disc_loss", "logits_real", "adversarial_weight", "grad_norm", "perplexity")
    return [{name: row[name] for name in names} for row in read_metrics(folder)]


def test_two_processes_with_a_discriminator(images, adversarial, tmp_path):
    result = run_script(TRAIN, *flags(images, tmp_path, **ADVERSARIAL), processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    for one, two in zip(*map(read_metrics_without_speed, (adversarial, tmp_path)), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    one, two = (checkpoint.load(folder / "vq.pt")["discriminator"] for folder in (adversarial, tmp_path))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_accumulation_with_a_discriminator(images, adversarial, tmp_path):
    """Equal to the big batch until the discriminator begins, whose batch norm is that of a part; it belongs to the run."""
    main(flags(images, tmp_path, gradient_accumulation_steps=2, **ADVERSARIAL))
    np.testing.assert_allclose(losses(tmp_path)[:3], losses(adversarial)[:3], rtol=1e-3)
    np.testing.assert_allclose(losses(tmp_path), losses(adversarial), rtol=0.1)
    with pytest.raises(ValueError, match="was started with accumulation 2, now 1: "):
        main(flags(images, tmp_path, **ADVERSARIAL))


@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
def test_on_a_gpu_the_host_waits_for_no_step(images, tmp_path, kind):
    """An update with all losses; afterwards new entries for unused codes, which is waited for."""
    change = {
        "vq-model": "VQ-2-small", "disc-type": kind, "disc-weight": 0.8, "disc-layers": 1, "disc-dim": 8, "disc-start": 0,
        "entropy-loss-ratio": 0.1, "dropout-p": 0.1, "mixed-precision": "bf16", "restart-dead-codes": 1,
    }  # fmt: skip
    settings = TokenizerSettings.from_command_line("Test.", flags(images, tmp_path, **change)).complete()
    with fake_gpu() as gpu:
        task = TokenizerTask(settings, 22, None, GPU, {})
        train_steps(task, settings, [[torch.zeros(2, 16, 16, 3, dtype=torch.uint8)]])
    assert len(gpu.waits) == 1 and "nonzero" in gpu.waits[0]


@pytest.mark.parametrize("adaptive", [True, False])
def test_updates_are_those_of_a_plain_loop(images, tmp_path, adaptive):
    """Two updates of both models by the formulas, one after the other, as LlamaGen's trainer does them."""
    change = {
        "disc-weight": 0.8, "disc-layers": 1, "disc-dim": 8, "disc-start": 0, "epochs": 1, "disc-loss": "vanilla",
        "disc-lr": 1e-3, "gen-loss": "non-saturating", "reconstruction-loss": "l1", "codebook-weight": 0.7,
        "max-grad-norm": 0.5, "restart-dead-codes": 0,
    }  # fmt: skip
    arguments = [*flags(images, tmp_path, **change), f"--{'' if adaptive else 'no-'}disc-adaptive-weight"]
    main(arguments)
    settings = TokenizerSettings.from_command_line("Test.", arguments).complete()
    folder = settings.image_folder(images)
    task = TokenizerTask(settings, 22, batches_of(folder, 16, 0, False), torch.device("cpu"), {})
    model, judge = task.model, task.discriminator
    before = deepcopy({"model": model.state_dict(), "discriminator": judge.state_dict()})
    for step, (batch,) in enumerate(task.batches(0, 0, World(0, 1, torch.device("cpu")))):
        pictures = to_float(batch)
        out = model(pictures)
        decoded, last = out.reconstruction_BCHW, model.decoder.conv_out.weight
        image = (decoded - pictures).abs().mean()
        adversarial = F.binary_cross_entropy_with_logits(fake := judge(decoded), torch.ones_like(fake))
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (image, adversarial)]
        weight = 0.8 * (norms[0] / (norms[1] + 1e-4)).item() if adaptive else 0.8
        loss = image + weight * adversarial + 0.7 * sum(out.loss)
        loss.backward()
        judge.zero_grad()
        step_by_hand(task.optimizer, task.learning_rate(step))
        real, fake = judge(pictures), judge(decoded.detach())
        judged = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        judged = (judged + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2
        (0.8 * judged).backward()
        step_by_hand(task.opponent.optimizer, task.learning_rate(step) * 1e-3 / settings.lr)
        row = read_metrics(tmp_path)[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["disc_loss"] == pytest.approx(judged.item(), rel=1e-4)
    content = checkpoint.load(tmp_path / "vq.pt")
    for name, module in (("model", model), ("discriminator", judge)):
        wrong, moved = (
            sum((value - other[name][key]).square().sum().item() for key, value in module.named_parameters()) ** 0.5
            for other in (content, before)
        )
        assert wrong < 0.02 * moved, (
            name
        )  # not element by element: Adam makes full steps of gradients that are rounding


def step_by_hand(optimizer, lr) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
    optimizer.step()
    optimizer.zero_grad()


def test_published_recipe_and_overrides():
    def complete(*words):
        return TokenizerSettings.from_command_line("Test.", ["--data-path", ".", *words]).complete()

    s = complete()
    assert (s.vq_model, s.epochs, s.global_batch_size, s.disc_start, s.disc_weight) == ("VQ-16", 40, 128, 20_000, 0.5)
    assert (s.lr, s.end_lr, s.warmup_ratio, s.weight_decay, s.beta1, s.beta2) == (1e-4, 1e-4, 0, 0, 0.9, 0.95)
    assert (s.perceptual_weight, s.reconstruction_loss, s.disc_type, s.disc_loss) == (1, "l2", "patchgan", "hinge")
    assert (s.restart_dead_codes, s.ema_decay, s.max_grad_norm, s.disc_adaptive_weight) == (0, 0.9999, 1, False)
    assert s.disc_lr == s.lr and complete("--lr", "2e-4").end_lr == complete("--lr", "2e-4").disc_lr == 2e-4
    assert complete("--vq-model", "VQ-8", "--finetune", "--ema").disc_start == 0
    assert complete("--finetune", "--disc-start", "7").disc_start == 7
    small = complete("--vq-model", "VQ-4-small")
    assert (small.disc_weight, small.perceptual_weight, small.restart_dead_codes, small.disc_lr) == (0, 0, 50, 3e-4)
    for name, weight in (("VQ-16", 1), ("VQ-4-small", 0.1)):
        assert complete("--vq-model", name, "--perceptual-network", __file__).perceptual_weight == weight
    assert small.identity() == {"perceptual": None, "accumulation": None}
    assert s.identity() == {"perceptual": "LPIPS", "accumulation": 1}


def test_finetuning_goes_on_with_the_discriminator(images, adversarial, finished, tmp_path, capfd):
    """A rate of almost 0 leaves both models as they are."""
    small = {"lr": 1e-12, "end_lr": 0, "epochs": 1, "restart_dead_codes": 0}
    changes = ADVERSARIAL | small | {"vq_ckpt": adversarial / "vq.pt"}
    del changes["disc-start"]
    main([*flags(images, tmp_path / "a", **changes), "--finetune"])
    before, after = (checkpoint.load(folder / "vq.pt") for folder in (adversarial, tmp_path / "a"))
    judge, trained = before["discriminator"]["main.0.weight"], after["discriminator"]["main.0.weight"]
    torch.testing.assert_close(trained, judge, rtol=1e-5, atol=1e-7)
    assert read_metrics(tmp_path / "a")[0]["disc_loss"] > 0
    main(flags(images, tmp_path / "b", **changes))
    assert not checkpoint.load(tmp_path / "b" / "vq.pt")["discriminator"]["main.0.weight"].allclose(judge)
    main([*flags(images, tmp_path / "c", **changes | {"vq_ckpt": finished / "vq.pt"}), "--finetune"])
    assert "holds no discriminator: a new one is trained" in capfd.readouterr().err


def test_perceptual_network(images, finished, tmp_path):
    """Named by its content: the same file elsewhere continues the run, another one does not."""
    torch.manual_seed(0)
    save_network(tmp_path / "a.pt2", Features(), 16, "a")
    changes = {"perceptual-network": tmp_path / "a.pt2", "epochs": 1}
    main(flags(images, tmp_path / "run", **changes))
    row, plain = read_metrics(tmp_path / "run")[0], read_metrics(finished)[0]
    assert row["perceptual"] > 0 and row["loss"] == pytest.approx(plain["loss"] + 0.1 * row["perceptual"], rel=1e-5)
    (tmp_path / "b.pt2").write_bytes((tmp_path / "a.pt2").read_bytes())
    main(flags(images, tmp_path / "run", **changes | {"perceptual-network": tmp_path / "b.pt2"}))
    save_network(tmp_path / "b.pt2", Features(), 16, "a")
    with pytest.raises(ValueError, match=r"was started with perceptual \w+\.\.\., now"):
        main(flags(images, tmp_path / "run", **changes | {"perceptual-network": tmp_path / "b.pt2"}))


class Features(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, 2)

    def forward(self, images_BHWC):
        features = F.relu(self.conv(images_BHWC.permute(0, 3, 1, 2).float() / 255)).mean((2, 3))
        return features, self.head(features)


def test_without_an_average(images, tmp_path):
    main([*flags(images, tmp_path, epochs=2), "--no-ema"])
    assert "ema" not in checkpoint.load(tmp_path / "vq.pt")
    assert Tokenizer.from_pretrained(tmp_path / "vq.pt").about["weights"] == "model"


def test_random_crops_belong_to_image_and_epoch(images, tmp_path):
    settings = TokenizerSettings.from_command_line("Test.", [*flags(images, tmp_path), "--random-crop"]).complete()
    read = batches_of(settings.image_folder(images), 16, 0, False, settings.random_crop)
    task = TokenizerTask(settings, 22, read, torch.device("cpu"), {})

    def batch(epoch, step, rank=0, size=1):
        return next(task.batches(epoch, step, World(rank, size, torch.device("cpu"))))[0]

    whole = batch(0, 1)
    assert torch.cat((batch(0, 1, 0, 2), batch(0, 1, 1, 2))).equal(whole)
    plain = TokenizerTask(settings.model_copy(update={"random_crop": False}), 22, read, torch.device("cpu"), {})
    assert not next(plain.batches(0, 1, World(0, 1, torch.device("cpu"))))[0].equal(whole)
    main([*flags(images, tmp_path, epochs=1), "--random-crop"])
    assert len(losses(tmp_path)) == 2


def test_a_discriminator_that_never_begins_is_said(images, tmp_path, capsys):
    main(flags(images, tmp_path, epochs=1, **ADVERSARIAL | {"disc-start": 100}))
    assert (
        "--disc-start 100 is beyond the 2 steps of this run: the discriminator is not trained"
        in capsys.readouterr().out
    )


def test_a_finished_run_is_left_alone_and_another_refused(images, finished, capsys):
    before = (finished / "vq.pt").stat().st_mtime_ns
    main(flags(images, finished, log_every=50))
    assert "is finished already" in capsys.readouterr().out
    assert (finished / "vq.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"is finished and was started with epochs 3, now 4: "):
        main(flags(images, finished, epochs=4))
    (images / "a" / "new.png").write_bytes((images / "a" / "000.png").read_bytes())
    try:
        with pytest.raises(ValueError, match=r"was started with images \w+\.\.\., now \w+\.\.\.: "):
            main(flags(images, finished))
    finally:
        (images / "a" / "new.png").unlink()


def test_a_finished_run_whose_weights_are_damaged_writes_them_again(images, finished):
    content = (finished / "vq.pt").read_bytes()
    (finished / "vq.pt").write_bytes(content[:1000])
    main(flags(images, finished))
    assert checkpoint.load(finished / "vq.pt")["steps"] == 6


def test_two_processes_train_the_same_model(images, finished, tmp_path):
    result = run_script(TRAIN, *flags(images, tmp_path), processes=2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    one, two = read_metrics(finished), read_metrics(tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-4)
    assert [row["codebook_usage"] for row in one] == [row["codebook_usage"] for row in two]


def test_training_in_bfloat16_is_near_that_in_float32_for_any_number_of_processes(images, finished, tmp_path):
    for processes in (1, 2):
        arguments = flags(images, tmp_path / str(processes), mixed_precision="bf16")
        result = run_script(TRAIN, *arguments, processes=processes, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        assert "in bfloat16, weights in float32" in result.stdout
    one, two = (losses(tmp_path / str(processes)) for processes in (1, 2))
    bound = 5e-3 if cpu_computes_in_bf16() else 2e-2  # emulated, it rounds a latent between two codes to the other one
    np.testing.assert_allclose(one, two, rtol=bound)
    np.testing.assert_allclose(one, losses(finished), rtol=0.15)  # the first entries for unused codes are others


def test_read_by_workers_equals_cached(images, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.tokenizer_image.vq_data.CACHE_BYTES", 0)
    main(flags(images, tmp_path))
    assert losses(tmp_path) == losses(finished)


@pytest.mark.parametrize(("log_every", "step"), [(6, 4), (1, 4)])
def test_a_loss_that_is_not_finite_names_the_step(images, tmp_path, monkeypatch, log_every, step):
    models = []
    init = TokenizerTask.__init__

    def remember(self, *args):
        init(self, *args)
        models.append(self.model)

    def spoil():
        with torch.no_grad():
            models[0].encoder.conv_in.weight.fill_(float("nan"))

    monkeypatch.setattr(TokenizerTask, "__init__", remember)
    stop_after(monkeypatch, 3, spoil)
    with pytest.raises(SystemExit, match=f"the loss is nan at step {step}"):
        main(flags(images, tmp_path, log_every=log_every, ckpt_every=5))
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("model", "decoder.conv_out.bias", "inf"), ("discriminator", "main.0.bias", "nan")]
)
def test_weights_that_are_not_finite_are_not_saved(images, tmp_path, monkeypatch, kind, name, value):
    """The last update breaks them; its loss was fine."""
    update = TokenizerTask.after_update

    def spoil(self, step, ema, world):
        update(self, step, ema, world)
        if step == self.steps:
            with torch.no_grad():
                getattr(self, kind).get_parameter(name)[0] = float(value)

    monkeypatch.setattr(TokenizerTask, "after_update", spoil)
    with pytest.raises(SystemExit, match=f"{name} of the {kind} weights is not finite after step 6"):
        main(flags(images, tmp_path, **ADVERSARIAL))
    assert not (tmp_path / "vq.pt").exists() and not list(tmp_path.glob("checkpoints/*"))


def test_starting_from_weights(images, finished, tmp_path):
    """They are those of the average; a first rate of almost 0 leaves them as they are."""
    small = {"lr": 1e-12, "end_lr": 0, "epochs": 1, "restart_dead_codes": 0}
    main(flags(images, tmp_path, vq_ckpt=finished / "vq.pt", reconstruction_loss="l1", **small))
    start = Tokenizer.from_pretrained(finished / "vq.pt")
    trained = Tokenizer.from_pretrained(tmp_path / "vq.pt", weights="model")
    torch.testing.assert_close(trained.encoder.conv_in.weight, start.encoder.conv_in.weight, rtol=1e-5, atol=1e-7)


def test_accumulation_equals_the_big_batch(images, finished, tmp_path):
    main(flags(images, tmp_path, gradient_accumulation_steps=2))
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-3)


def test_learning_rate():
    rate = [learning_rate(s, 100, lr=1.0, end_lr=0.1, warmup_ratio=0.1) for s in range(101)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 11)
    assert rate[10] == 1.0
    assert rate[99] == rate[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rate[10:]))
    assert learning_rate(0, 1, lr=1.0, end_lr=0.1, warmup_ratio=0.05) == 1.0


def test_dead_codes_begin_anew(images, tmp_path):
    """Unused entries become latents of the batch in both models, used ones stay; their moments are forgotten."""
    settings = TokenizerSettings.from_command_line("Test.", flags(images, tmp_path))
    model, ema = VQModel(settings.vq_config()), VQModel(settings.vq_config())
    optimizer = torch.optim.AdamW(model.parameters())
    output = model(torch.randn(8, 3, 16, 16))
    (output.reconstruction_BCHW.sum() + sum(output.loss)).backward()
    optimizer.step()
    dead_codes = DeadCodes(32, torch.device("cpu"))
    dead_codes.note(torch.arange(5))
    seen, weight = dead_codes.seen.clone(), model.quantize.embedding.weight
    before, latents = weight.detach().clone(), torch.randn(2, 8, 4, 4)
    dead_codes.restart(model, ema, optimizer, latents, 0, 1)
    assert weight[seen].equal(before[seen])
    rows = torch.nn.functional.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    assert torch.cdist(weight[~seen], rows).min(1).values.max() < 1e-3
    assert ema.quantize.embedding.weight[~seen].equal(weight[~seen])
    assert not optimizer.state[weight]["exp_avg"][~seen].any()
    assert not dead_codes.seen.any()


def test_a_batch_for_other_processes_is_refused(images, tmp_path):
    result = run_script(TRAIN, *flags(images, tmp_path / "refused", global_batch_size=7), processes=2)
    assert_refused(result, "--global-batch-size 7 is not divisible by 2 processes")
    assert not (tmp_path / "refused").exists()


def test_wrong_inputs_are_refused_before_any_work(images, finished, tmp_path, monkeypatch, capsys):
    def refused(change, words, *more):
        with pytest.raises(InputError, match=words):
            main([*flags(images, tmp_path / "refused", **change), *more])
        assert not (tmp_path / "refused").exists()

    refused({"image_size": 18}, "--image-size 18 .* multiple of 4")
    refused({"global_batch_size": 100}, "--global-batch-size 100 .* 22 images")
    other_size = r"quantize.embedding.weight is \(32, 8\).*\(64, 8\)"
    refused({"vq_ckpt": finished / "vq.pt", "codebook_size": 64}, other_size)
    refused({"disc-weight": 1, "disc-layers": 3}, "--image-size 16 is too small for a PatchGAN of 3 layers")
    refused({"disc-weight": 1, "disc-type": "stylegan", "image_size": 48}, "--image-size 48 does not fit .*stylegan")
    refused({}, "--finetune needs --vq-ckpt WEIGHTS", "--finetune")
    (tmp_path / "none.pt2").write_bytes(b"none")
    refused({"perceptual-network": tmp_path / "none.pt2"}, r"none\.pt2 is damaged, truncated or not a \.pt2 file")
    other = ADVERSARIAL | {"vq_ckpt": tmp_path / "vq.pt", "disc-dim": 4}
    content = checkpoint.load(finished / "vq.pt")
    checkpoint.save(tmp_path / "vq.pt", {**content, "discriminator": PatchGAN(8, 1).state_dict()})
    refused(
        other,
        r"the discriminator of .* does not fit this model: main.0.weight is .*give the --disc flags",
        "--finetune",
    )

    def offline():
        raise InputError("the weights cannot be downloaded")

    monkeypatch.setattr("tokenizer.tokenizer_image.vq_settings.LPIPS", offline)
    refused({"perceptual-weight": 1}, "the weights cannot be downloaded")
    for flag, value in (
        ("data-path", tmp_path / "nowhere"),
        ("disc-type", "patch"),
        ("disc-loss", "wgan"),
        ("gen-loss", "vanilla"),
        ("perceptual-weight", -1),
    ):
        with pytest.raises(SystemExit):
            main(flags(images, tmp_path / "refused", **{flag: value}))
        assert f"--{flag}: " in capsys.readouterr().err
