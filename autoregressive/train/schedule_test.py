"""The published schedule, segment by segment and step by step, and where it is buggy ours is right."""

import json
from pathlib import Path

import pytest
from PIL import Image

from autoregressive.models.gpt import preset
from autoregressive.train.schedule import Level, Plan, free_levels, in_steps, patch_levels, relative_cost

CASES = json.loads((Path(__file__).parent / "testdata" / "schedule.json").read_text())


def plan(args: dict) -> Plan:
    levels = in_steps(patch_levels(args["epochs"], args["patch_level"], args["epoch_rate"]), args["steps_per_epoch"])
    return Plan(
        levels, args["steps_per_epoch"], args["lr"], scheduler=True, end_lr=args["end_lr"],
        warmup_epochs=args["warmup_epochs"], decay_ratio=args["decay_ratio"],
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c["args"].values()))
class TestPublished:
    def test_segments(self, case):
        args = case["args"]
        levels = patch_levels(args["epochs"], args["patch_level"], args["epoch_rate"])
        ends = case["epoch_range"]
        kept = [i for i, stop in enumerate(ends) if stop > (ends[i - 1] if i else 0)]
        assert [s.stop for s in levels] == [ends[i] for i in kept]
        assert [s.patch**2 for s in levels] == [case["patch_sizes"][i] for i in kept]
        assert [s.start for s in levels] == [0, *(s.stop for s in levels[:-1])]

    def test_patch_at_every_epoch(self, case):
        args, expected = case["args"], case["patch_size_at_epoch_start"]
        starts = [epoch * args["steps_per_epoch"] for epoch in range(args["epochs"])]
        assert [plan(args).level(step).patch ** 2 for step in starts] == expected[:-1]

    def test_learning_rate(self, case):
        args, rate = case["args"], plan(case["args"]).rate
        last = args["epochs"] * args["steps_per_epoch"]
        known = dict(enumerate(case.get("lr_every_step", []))) | dict(map(tuple, case["lr_at_step"]))
        known |= {e * args["steps_per_epoch"]: lr for e, lr in enumerate(case["lr_at_epoch_start"])}
        inside = {step: lr for step, lr in known.items() if step < last}
        assert len(inside) > 5
        for step, lr in inside.items():
            assert rate(step) == pytest.approx(lr, rel=1e-9, abs=1e-18), step
        assert rate(case["last_step"]) == pytest.approx(case["lr_last_step"], rel=1e-9)

    def test_trap_past_the_end_it_stays_at_end_lr(self, case):
        """The published code returns the base rate as a multiplier there, so base_lr squared (or a warm-up's 0)."""
        args = case["args"]
        end = args["epochs"] * args["steps_per_epoch"]
        assert [plan(args).rate(end + extra) for extra in (0, 1, 10**6)] == [args["end_lr"]] * 3


def test_trap_boundaries_are_powers_of_the_rate_not_thirds():
    assert patch_levels(300, 3, 0.5) == [Level(4, 0, 75), Level(2, 75, 150), Level(1, 150, 300)]


@pytest.mark.parametrize(
    ("level", "epoch_rate", "cost"),
    [(2, 0.5, 0.625), (3, 0.5, 0.578), (4, 0.5, 0.572), (2, 0.67, 0.498), (4, 0.67, 0.400)],
)
def test_relative_cost_of_the_papers_schedules(level, epoch_rate, cost):
    assert relative_cost(patch_levels(300, level, epoch_rate)) == pytest.approx(cost, abs=6e-4)


@pytest.mark.parametrize("wrong", [(0, 1, 0.5), (10, 0, 0.5), (10, 2**31 - 1, 0.5), (10, 2, 0.0), (10, 2, 1.5)])
def test_refusals(wrong):
    with pytest.raises(ValueError, match="expected epochs >= 1"):
        patch_levels(*wrong)


def test_free_levels_are_the_published_ones_where_they_say_the_same():
    assert free_levels([4, 2, 1], [75, 75, 150]) == patch_levels(300, 3, 0.5)
    assert free_levels([8, 1], [0.5, 2]) == [Level(8, 0, 0.5), Level(1, 0.5, 2.5)]


def test_stages_in_steps():
    assert in_steps([Level(2, 0, 0.5), Level(1, 0.5, 2)], 11) == [Level(2, 0, 6), Level(1, 6, 22)]
    with pytest.raises(ValueError, match=r"0\.01 epochs of 11 steps on patches of side 2 are no step"):
        in_steps([Level(2, 0, 0.01), Level(1, 0.01, 1)], 11)


@pytest.mark.parametrize("wrong", [([2, 1], [3]), ([], []), ([2, 1], [1, 0]), ([0, 1], [1, 1]), ([2, 1], [1, 1e308])])
def test_free_levels_refuse(wrong):
    with pytest.raises(ValueError, match="expected a length above 0 and at most 2147483648 for each patch side"):
        free_levels(*wrong)


def test_remaining_cost_falls_from_all_to_nothing():
    plan = Plan(in_steps(patch_levels(4, 2, 0.5), 10), 10, lr=1.0)
    cost = {2: 1.0, 1: 4.0}
    assert [plan.remaining(step, cost.get) for step in (0, 5, 20, 25, 40, 99)] == [100, 95, 80, 60, 0, 0]


def test_the_table_says_what_each_level_costs():
    """Also in FLOPs: attention falls faster than linearly, so they are a little less than positions."""
    plan = Plan(in_steps(patch_levels(300, 3, 0.5), 5004), 5004, lr=1e-4, scheduler=True, end_lr=1e-5, warmup_epochs=5)
    lines = plan.table(256, 256, preset("GPT-B").training_flops).splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["4x4", "0-75", "375300"], ["2x2", "75-150", "375300"], ["1x1", "150-300", "750600"],
    ]  # fmt: skip
    assert lines[4].endswith("0.578 (positions), 0.577 (FLOPs)")
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[2] == pytest.approx(86.6, abs=0.5)
    assert len(lines) == 5


def test_a_plan_that_does_not_end_on_single_codes_says_so():
    plan = Plan([Level(1, 0, 10), Level(2, 10, 20)], 10, lr=1e-4)
    assert "note: the last level is not on single codes" in plan.table(8, 256, preset("GPT-XXS").training_flops)


def test_without_a_scheduler_the_rate_is_constant():
    plan = Plan([Level(2, 0, 10), Level(1, 10, 20)], 10, lr=3e-4, end_lr=1e-5, warmup_epochs=1, decay_ratio=0.5)
    assert {plan.rate(step) for step in range(25)} == {3e-4}


def test_the_picture(tmp_path):
    plan = Plan([Level(2, 0, 10), Level(1, 10, 20)], 10, lr=3e-4, scheduler=True, warmup_epochs=0.2, decay_ratio=0.5)
    plan.draw(tmp_path / "plan.png", "GPT-B")
    with Image.open(tmp_path / "plan.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10
