"""One update: the published trajectory, accumulation, graphs of torch.compile, and what a GPU would do."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.gpt_task import Data, GPTTask, PatchLoss, TrainSettings
from autoregressive.train.schedule import Level, Plan, in_steps, patch_levels
from utils.distributed import World, autocast
from utils.engine import Trainer
from utils.fake_gpu import GPU, fake_gpu, train_steps
from utils.task import EngineSettings
from utils.testing import close, fill_by_formula, formula
from utils.update import adamw, clip_gradients, ema_copy, update, update_ema


def gpt_update(objective, optimizer, batches, patch, **options):
    """An update on micro-batches of codes and labels; the loss and the gradient norm."""

    def loss(batch):
        return {"loss": objective(to_patches(batch[0], patch), batch[1])}

    losses, norm = update(loss, objective, optimizer, batches, **options)
    return losses["loss"], norm


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
    steps_per_epoch = train["steps_per_epoch"]
    levels = in_steps(patch_levels(train["epochs"], train["patch_level"], train["epoch_rate"]), steps_per_epoch)
    beta1, beta2 = train["betas"]
    optimizer = adamw(
        model, EngineSettings(lr=train["lr"], weight_decay=train["weight_decay"], beta1=beta1, beta2=beta2)
    )
    rate = Plan(
        levels, steps_per_epoch, train["lr"], scheduler=True, end_lr=train["end_lr"],
        warmup_epochs=train["warmup_epochs"], decay_ratio=train["decay_ratio"],
    ).rate  # fmt: skip
    for step in range(len(golden["loss"])):
        assert rate(step) == pytest.approx(float(golden["lr"][step]), rel=1e-6)
        batch = (
            torch.from_numpy(golden["idx"][step].astype(np.int64)),
            torch.from_numpy(golden["cls"][step].astype(np.int64)),
        )
        patch = int(golden["p"][step])
        max_norm = train["max_grad_norm"]
        loss, norm = gpt_update(PatchLoss(model), optimizer, [batch], patch, lr=rate(step), max_grad_norm=max_norm)
        update_ema(ema, model, train["ema_decay"])
        close(loss, golden["loss"][step])
        close(norm, golden["grad_norm_before_clip"][step], rtol=1e-4, atol=0)
    weights, averaged = dict(model.named_parameters()), dict(ema.named_parameters())
    for i, name in enumerate(golden["names"]):
        start = torch.from_numpy(formula(str(name), tuple(weights[name].shape)))
        close(weights[name].norm(), golden["param_norm"][i], rtol=1e-4, atol=0)
        close((weights[name] - start).norm(), golden["param_moved"][i], rtol=1e-3, atol=0)
        close((averaged[name] - start).norm(), golden["ema_moved"][i], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("patch", [1, 2])
def test_accumulation_equals_the_big_batch(patch, dtype, off):
    """4 x 8 against 32: losses, gradient norms before clipping, and the weights after plain gradient steps.

    In bfloat16 each part's gradient is rounded, to 8 bits, before float32 sums.
    """
    config = GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=32, block_size=16, num_classes=3)
    codes, labels = torch.randint(32, (32, 16)), torch.randint(3, (32,))
    found = []
    for parts in (1, 4):
        model = fill_by_formula(Transformer(config))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # its steps are as long as the gradients
        batches = list(zip(codes.chunk(parts), labels.chunk(parts), strict=True))
        amp = partial(autocast, torch.device("cpu"), dtype)
        numbers = [gpt_update(PatchLoss(model), optimizer, batches, patch, lr=0.1, amp=amp) for _ in range(5)]
        found.append(([float(value) for pair in numbers for value in pair], list(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=off)
    for one, four in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, four, rtol=off, atol=off / 10)


@pytest.mark.parametrize("most", [0.0, 0.5, 1e3])
def test_clipping_is_that_of_pytorch(most):
    """Bit for bit, where it scales and where it leaves out to scale by 1."""
    norms, gradients = [], []
    for clip in (clip_gradients, lambda m, most: nn.utils.clip_grad_norm_(m.parameters(), most or float("inf"))):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        model(torch.randn(3, 5)).sum().backward()
        norms.append(clip(model, most))
        gradients.append([p.grad for p in model.parameters()])
    assert torch.equal(*norms) and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_with_one_graph_a_level_and_no_recompiles(recompute):
    """Graphs are counted by a backend that runs them as they are; going back over the levels adds none."""
    torch.compiler.reset()
    counter = CompileCounter()
    model = Transformer(
        GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=32, block_size=64, num_classes=3, resid_dropout_p=0.1)
    )
    objective = torch.compile(PatchLoss(model, recompute), backend=counter, dynamic=False, fullgraph=True)
    optimizer = adamw(model, EngineSettings(lr=1e-3))
    batches = [(torch.randint(32, (2, 64)), torch.randint(3, (2,)))]
    frames = []
    for patch in (8, 4, 2, 1, 2, 4, 8):
        gpt_update(objective, optimizer, batches, patch, lr=1e-3, max_grad_norm=1.0)
        model.eval()
        model.loss(to_patches(batches[0][0], 1), batches[0][1])  # validation, between steps
        model.train()
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("able", [False, True])
def test_a_machine_that_cannot_compile_trains_without(able, monkeypatch):
    monkeypatch.setattr("utils.machine.can_compile", lambda device: able)
    monkeypatch.setattr(torch, "compile", lambda objective, **_: nn.Sequential(objective))
    config = GPTConfig(dim=16, n_layer=1, n_head=2, vocab_size=8, block_size=4)
    settings = TrainSettings(code_path=["codes"], compile=True)
    task = GPTTask(Transformer(config), None, Plan([Level(1, 0, 1)], 1, 1e-3), settings, about={})
    trainer = Trainer(task, settings, World(0, 1, torch.device("cpu")), run=None, log=None, manager=None)
    assert (trainer.objective is task.objective) != able


@pytest.fixture
def task_on_gpu():
    """One step at each patch side, with everything that may be in it, and held-out codes."""

    class Codes:
        def __len__(self):
            return 6

        def batch(self, images):
            return np.zeros((len(images), 64), np.int64), np.zeros(len(images), np.int64)

    config = GPTConfig(
        dim=16, n_layer=2, n_head=4, n_kv_head=2, multiple_of=16, vocab_size=32, block_size=64, num_classes=3,
        token_dropout_p=0.1, resid_dropout_p=0.1, ffn_dropout_p=0.1, attn_dropout_p=0.1, drop_path_rate=0.1,
    )  # fmt: skip
    plan = Plan([Level(8, 0, 1), Level(4, 1, 2), Level(2, 2, 3), Level(1, 3, 4)], 4, 1e-3)

    def make(**settings):
        settings = TrainSettings(code_path=["codes"], global_batch_size=2, ema=True, **settings)
        return GPTTask(Transformer(config).to(GPU), Data(None, val=Codes()), plan, settings, about={})

    return make


@pytest.mark.parametrize(("precision", "recompute"), [("auto", False), ("fp16", True)])
def test_on_a_gpu_the_host_waits_for_no_step(task_on_gpu, precision, recompute):
    """auto is bf16 there. Of float16 the loss scaler is a part."""
    batch = torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with fake_gpu() as gpu:
        task = task_on_gpu(mixed_precision=precision, activation_checkpointing=recompute)
        train_steps(task, task.settings, [batch] * 4)
    assert not gpu.waits


def test_on_a_gpu_validation_waits_once(task_on_gpu):
    with fake_gpu() as gpu:
        task = task_on_gpu()
        task.validate(task.model, 4, World(0, 1, GPU), partial(autocast, GPU, torch.bfloat16))
    assert len(gpu.waits) == 1 and "total[1]).item()" in gpu.waits[0]
