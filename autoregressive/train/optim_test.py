"""One update: the published trajectory, accumulation, and graphs of torch.compile."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from autoregressive.models.gpt import GPTConfig, Transformer
from autoregressive.models.patches import to_patches
from autoregressive.train.optim import Objective, adamw, update
from autoregressive.train.schedule import in_steps, learning_rate, patch_stages
from utils.ema import ema_copy, update_ema
from utils.testing import close, fill_by_formula, formula


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
    stages = in_steps(patch_stages(train["epochs"], train["patch_level"], train["epoch_rate"]), steps_per_epoch)
    betas = tuple(train["betas"])
    optimizer = adamw(model, train["lr"], train["weight_decay"], betas)
    rate = partial(
        learning_rate, stages=stages, lr=train["lr"], end_lr=train["end_lr"],
        warmup=train["warmup_epochs"] * steps_per_epoch, decay_ratio=train["decay_ratio"],
    )  # fmt: skip
    for step in range(len(golden["loss"])):
        assert rate(step) == pytest.approx(float(golden["lr"][step]), rel=1e-6)
        batch = (
            torch.from_numpy(golden["idx"][step].astype(np.int64)),
            torch.from_numpy(golden["cls"][step].astype(np.int64)),
        )
        patch = int(golden["p"][step])
        max_norm = train["max_grad_norm"]
        loss, norm = update(Objective(model), optimizer, [batch], patch, lr=rate(step), max_grad_norm=max_norm)
        update_ema(ema, model, train["ema_decay"])
        close(loss, golden["loss"][step])
        close(norm, golden["grad_norm_before_clip"][step], rtol=1e-4, atol=0)
    weights, averaged = dict(model.named_parameters()), dict(ema.named_parameters())
    for i, name in enumerate(golden["names"]):
        start = torch.from_numpy(formula(str(name), tuple(weights[name].shape)))
        close(weights[name].norm(), golden["param_norm"][i], rtol=1e-4, atol=0)
        close((weights[name] - start).norm(), golden["param_moved"][i], rtol=1e-3, atol=0)
        close((averaged[name] - start).norm(), golden["ema_moved"][i], rtol=1e-3, atol=0)


@pytest.mark.parametrize("patch", [1, 2])
def test_accumulation_equals_the_big_batch(patch):
    """4 x 8 against 32: losses, gradient norms before clipping, and the weights after plain gradient steps."""
    config = GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=32, block_size=16, num_classes=3)
    codes, labels = torch.randint(32, (32, 16)), torch.randint(3, (32,))
    found = []
    for parts in (1, 4):
        model = fill_by_formula(Transformer(config))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # its steps are as long as the gradients
        batches = list(zip(codes.chunk(parts), labels.chunk(parts), strict=True))
        numbers = [update(Objective(model), optimizer, batches, patch, lr=0.1) for _ in range(5)]
        found.append(([float(value) for pair in numbers for value in pair], list(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, four in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_with_one_graph_a_level_and_no_recompiles(recompute):
    """Graphs are counted by a backend that runs them as they are; a second round over the levels adds none."""
    torch.compiler.reset()
    counter = CompileCounter()
    model = Transformer(
        GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=32, block_size=64, num_classes=3, resid_dropout_p=0.1)
    )
    objective = torch.compile(Objective(model, recompute), backend=counter, dynamic=False, fullgraph=True)
    optimizer = adamw(model, 1e-3, 0.05, (0.9, 0.95))
    batches = [(torch.randint(32, (2, 64)), torch.randint(3, (2,))) for _ in range(2)]
    frames = []
    for patch in (4, 4, 2, 2, 1, 1, 1, 2, 4):
        update(objective, optimizer, batches, patch, lr=1e-3, max_grad_norm=1.0)
        model.eval()
        model.loss(to_patches(batches[0][0], 1), batches[0][1])  # validation, between steps
        model.train()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 3, 3, 3, 3, 3]
