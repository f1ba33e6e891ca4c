"""The plan: its table, its costs, and its picture."""

import pytest
from PIL import Image

from autoregressive.models.gpt import preset
from autoregressive.train.plan import Plan
from autoregressive.train.schedule import Stage, in_steps, patch_stages


def test_remaining_cost_falls_from_all_to_nothing():
    plan = Plan(in_steps(patch_stages(4, 2, 0.5), 10), 10, lr=1.0)
    cost = {2: 1.0, 1: 4.0}
    assert [plan.remaining(step, cost.get) for step in (0, 5, 20, 25, 40, 99)] == [100, 95, 80, 60, 0, 0]


def test_the_table_says_what_each_stage_costs():
    """Also in FLOPs: attention falls faster than linearly, so they are a little less than positions."""
    plan = Plan(in_steps(patch_stages(300, 3, 0.5), 5004), 5004, lr=1e-4, scheduler=True, end_lr=1e-5, warmup_epochs=5)
    lines = plan.table(256, 256, preset("GPT-B").training_flops).splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["4x4", "0-75", "375300"], ["2x2", "75-150", "375300"], ["1x1", "150-300", "750600"],
    ]  # fmt: skip
    assert lines[4].endswith("0.578 (positions), 0.577 (FLOPs)")
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[2] == pytest.approx(86.6, abs=0.5)
    assert len(lines) == 5


def test_a_plan_that_does_not_end_on_single_codes_says_so():
    plan = Plan([Stage(1, 0, 10), Stage(2, 10, 20)], 10, lr=1e-4)
    assert "note: the last stage is not on single codes" in plan.table(8, 256, preset("GPT-XXS").training_flops)


def test_without_a_scheduler_the_rate_is_constant():
    plan = Plan([Stage(2, 0, 10), Stage(1, 10, 20)], 10, lr=3e-4, end_lr=1e-5, warmup_epochs=1, decay_ratio=0.5)
    assert {plan.rate(step) for step in range(25)} == {3e-4}


def test_the_picture(tmp_path):
    plan = Plan([Stage(2, 0, 10), Stage(1, 10, 20)], 10, lr=3e-4, scheduler=True, warmup_epochs=0.2, decay_ratio=0.5)
    plan.draw(tmp_path / "plan.png", "GPT-B")
    with Image.open(tmp_path / "plan.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10
