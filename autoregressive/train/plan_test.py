"""The plan: its table, its costs, its picture; and what a run takes, against what PyTorch counts and a step measures."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.models.patches import to_patches
from autoregressive.train import memory
from autoregressive.train.memory import meta_model, parameters, step_bytes
from autoregressive.train.plan import PlanSettings, main
from utils.cli import InputError
from utils.testing import ROOT

STATE_DICTS = json.loads((ROOT / "autoregressive/models/testdata/gpt_state_dicts.json").read_text())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_parameters_are_those_of_the_published_weights(name):
    assert parameters(meta_model(PlanSettings().config(name))) == STATE_DICTS[name]["parameters"]


@pytest.mark.parametrize("patch", [1, 2])
def test_flops_are_those_that_pytorch_counts(patch):
    """Whose attention is not causal: half of its forward pass, and the backward pass twice that."""
    config = PlanSettings().config("GPT-B")
    model = meta_model(config).train()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.to_empty(device="cpu")
        codes, labels = (torch.zeros(shape, dtype=torch.int64) for shape in ((2, 256), (2,)))
        with sdpa_kernel(SDPBackend.MATH):
            model.loss(to_patches(codes, patch), labels).backward()
    by_operation = counter.get_flop_counts()["Global"]
    attention = by_operation.pop(torch.ops.aten.bmm)
    assert sum(by_operation.values()) + attention / 2 == pytest.approx(2 * config.training_flops(patch), rel=0.01)


MEASURE = """
import sys
import torch
from autoregressive.models.gpt import Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.memory import memory
from autoregressive.train.plan import PlanSettings
from utils.update import adamw, ema_copy, update, update_ema
from utils.machine import peak_memory, reset_peak_memory
from utils.task import EngineSettings

def step(config):
    model = Transformer(config).train()
    ema, optimizer = ema_copy(model), adamw(model, EngineSettings())
    codes, labels = torch.zeros(1, config.block_size, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        loss = lambda _: {"loss": model.loss(to_patches(codes, 1), labels)}
        update(loss, model, optimizer, [()], lr=1e-3, max_grad_norm=1.0)
        update_ema(ema, model, 0.9)

device, config = torch.device("cpu"), PlanSettings(grid=4).config("GPT-S")
step(PlanSettings(grid=4, vocab_size=64, num_classes=3).config("GPT-XXS"))  # what PyTorch makes at its first step
reset_peak_memory(device)
before = peak_memory(device)
step(config)
held = memory(config, 1, data_parallel="ddp", gpus=1, ema=True, dtype=torch.float32)
print((peak_memory(device) - before) / held.total)
"""


def test_memory_is_what_a_step_takes():
    """Of a process of its own, beyond what it had before; weights, moments and average dominate."""
    result = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(1, abs=0.1), result.stdout


def test_activations_grow_with_the_images_and_shrink_by_recomputing():
    config = replace(PlanSettings(vocab_size=512).config("GPT-XS"), n_layer=3)
    counted = [step_bytes(config, images) for images in (8, 16, 32)]
    assert counted[2] - counted[1] == pytest.approx(2 * (counted[1] - counted[0]), rel=0.05)
    assert step_bytes(config, 32, recompute=True) < counted[2] / 2
    assert step_bytes(config, 32, dtype=torch.float32) > 1.3 * counted[2]


def test_a_deep_model_is_counted_by_some_of_its_blocks(monkeypatch):
    config = replace(PlanSettings(vocab_size=512).config("GPT-XS"), n_layer=6)
    whole = step_bytes(config, 8)
    monkeypatch.setattr(memory, "COUNTED", 4)
    monkeypatch.setattr(memory, "step_bytes", step_bytes.__wrapped__)
    assert memory.step_bytes(config, 8) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(
    ("gigabytes", "advice"),
    [
        (1, "train by: --data-parallel ddp\n"),
        (4, "train by: --data-parallel ddp --gradient-accumulation-steps 2\n"),
        (14, "train by: --data-parallel fsdp --gradient-accumulation-steps 4\n"),
        (30, "train by: --data-parallel ddp --activation-checkpointing\n"),
        (10000, "it does not fit: take more GPUs, or larger ones\n"),
    ],
)
def test_the_command_says_what_fits(monkeypatch, capsys, gigabytes, advice):
    """So many GB an image without recomputing, a tenth with it; 20 GB of states, sharded 2 on each of 8 GPUs."""

    def made_up(_config, images, *, data_parallel, recompute=False, **_):
        states = 20e9 if data_parallel == "ddp" else 2e9
        return memory.Memory(states, 0, 0, 0, 0, images * gigabytes * 1e9 * (0.1 if recompute else 1.0))

    monkeypatch.setattr("autoregressive.train.plan.memory", made_up)
    main(["--gpus", "8", "--gpu", "h200"])
    assert advice in capsys.readouterr().out


def test_hours_follow_from_flops_and_rate(monkeypatch, capsys):
    monkeypatch.setattr("autoregressive.train.plan.memory", lambda *_, **__: memory.Memory(0, 0, 0, 0, 0, 0))
    main(["--gpus", "8", "--gpu", "a100", "--mfu", "0.5"])
    hours = 1.5e11 * 300 * 1281167 * 0.625 / (8 * 0.5 * 312e12) / 3600
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2x2, 1x1: 300 epochs")]
    assert float(said[0].split(" hours")[0].split()[-1]) == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--gpus 7", "--global-batch-size 256: expected a multiple of the 7 GPUs"),
        ("--grid 3", "patches of side 2, which does not divide the grid of 3x3 codes"),
        ("--all --images-per-s 9", "--images-per-s is of one model"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch, capsys, arguments, line):
    monkeypatch.setattr("autoregressive.train.plan.memory", lambda *_, **__: memory.Memory(0, 0, 0, 0, 0, 0))
    with pytest.raises((SystemExit, InputError)) as refused:
        main(arguments.split())
    assert line in capsys.readouterr().err + str(refused.value)
