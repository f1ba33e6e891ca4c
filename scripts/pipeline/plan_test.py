"""The plan: what is chosen from the data, the time and what is given."""

import math

import pytest
import torch

from scripts.pipeline.images import Images
from scripts.pipeline.measure import Costs
from scripts.pipeline.models import choose_models
from scripts.pipeline.pages import Page
from scripts.pipeline.plan import Plan, make_plan, table
from scripts.pipeline.report import _next
from scripts.pipeline.settings import PipelineSettings, parse_flags
from scripts.pipeline.stages import stages
from utils.cli import InputError

COSTS = Costs(1e-3, 1e-3, 4e-3, 1e-3, {2**i: 1e-2 / 4**i for i in range(4)}, 2e-2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "1")


def images_of(n: int, classes: int, side: int) -> Images:
    names = [f"class {i}" for i in range(classes)]
    return Images("train.csv", "test.csv", n, n // 9, names, side, [], "content", {}, lambda: None)


def plan_for(n: int = 1700, classes: int = 9, side: int = 64, device: torch.device = CPU, **given) -> Plan:
    images = images_of(n, classes, side)
    s = PipelineSettings.checked(images="images", **given)
    return make_plan(s, "toy", images, choose_models(s, images, device), COSTS, device)


def test_the_time_is_used_and_kept_to():
    for minutes in (15, 30, 120):
        plan = plan_for(time_budget=f"{minutes}m")
        assert 0.6 * 60 * minutes < sum(plan.seconds.values()) < 1.05 * 60 * minutes
    short = plan_for(time_budget="10s")
    assert short.epochs == 2 and "too short" in short.notes[0]


def test_choices_follow_from_the_data_and_the_device():
    small = plan_for()
    assert (small.image_size, small.tokenizer, small.vq_model, small.gpt_model, small.tokens) == (
        64, "train", "VQ-4-small", "GPT-XXS", 256,
    )  # fmt: skip
    assert plan_for(side=30).image_size == 32
    photos = plan_for(n=100_000, side=500, device=torch.device("cuda"))
    assert (photos.image_size, photos.tokenizer, photos.gpt_model) == (256, "vq_ds16_c2i", "GPT-B")
    assert next(iter(photos.seconds)) == "weights"
    flat = plan_for(classes=1)
    assert flat.network == "none" and "evaluate" not in flat.seconds and "classifier" not in flat.seconds


def test_fine_tuning_takes_the_published_models_a_lower_rate_and_no_coarse_levels():
    plan = plan_for(init="c2i_B_256", init_classes=["class 1=207"])
    assert (plan.gpt_model, plan.image_size, plan.tokenizer, plan.tokens) == ("GPT-B", 256, "vq_ds16_c2i", 256)
    flags = plan.flags["gpt"]
    assert flags["--patch-level"] == ["1"] and flags["--init-classes"] == ["class 1=207"]
    assert float(flags["--lr"][0]) < 2e-4
    assert plan_for(init="c2i_B_256", patch_level=2).flags["gpt"]["--patch-level"] == ["2"]


def test_files_are_found_from_the_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pt2").touch()
    assert plan_for(network="net.pt2").network == str(tmp_path / "net.pt2")


def test_what_is_given_takes_the_place_of_what_is_planned():
    plan = plan_for(
        epochs=7, gpt_flags="--lr 1e-4 --val-every=3", tokenizer_flags="--epochs 2", batch_size=50, samples=123
    )
    assert plan.epochs == 7 and plan.flags["gpt"]["--lr"] == ["1e-4"] and plan.flags["gpt"]["--val-every"] == ["3"]
    assert plan.flags["tokenizer"]["--epochs"] == ["2"] and plan.flags["sample"]["--num-fid-samples"] == ["123"]
    free = plan_for(gpt_flags="--patch-sizes 4 1 --patch-epochs 2 3").flags["gpt"]
    assert free["--patch-sizes"] == ["4", "1"] and "--epochs" not in free and "--patch-level" not in free
    assert parse_flags("--a --b='x y' --c 1 2") == {"--a": [], "--b": ["x y"], "--c": ["1", "2"]}


@pytest.mark.parametrize("processes", [1, 3, 5, 6, 7, 64, 100])
def test_the_global_batch_divides_by_any_number_of_processes(monkeypatch, processes):
    monkeypatch.setenv("NPROC_PER_NODE", str(processes))
    batch = plan_for(batch_size=64).batch_size
    assert batch % processes == 0 and 54 <= batch <= max(64, processes)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"image_size": 62}, "no multiple of 4"), ({"image_size": 20}, "patches of side 2 do not divide"),
        ({"tokenizer": "c2i_B_256"}, "is a GPT"),
        ({"init": "vq_ds16_c2i"}, "is a tokenizer"), ({"init": "c2i_B_256", "gpt_model": "GPT-L"}, "is a GPT-B"),
        ({"init": "c2i_B_256", "tokenizer": "train"}, "give that --tokenizer"), ({"batch_size": 9999}, "more than the 1700"),
        ({"gpt_flags": "--patch-level x"}, "whole number"),
        ({"gpt_flags": "--val-every 0"}, "whole number"), ({"gpt_flags": "--sample-every"}, "whole number"),
        ({"gpt_flags": "--learning-rate 1"}, "unknown flag --learning-rate"),
        ({"sample_flags": "--sample-dir x"}, "is set by the pipeline"), ({"network": "nowhere.pt2"}, "there is no file"),
        ({"tokenizer": "nowhere.pt"}, "there is no file"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(given, part):
    with pytest.raises(InputError, match=part):
        plan_for(**given)


def test_the_stages_of_a_plan_are_those_of_its_table(tmp_path):
    for given in ({}, {"network": "none"}, {"network": "inception"}, {"tokenizer": "vq_ds16_c2i", "image_size": 128}):
        plan = plan_for(**given)
        names = [stage.name for stage in stages(plan, tmp_path, tmp_path / "train.csv", tmp_path / "test.csv")]
        assert [*names, "report"] == list(plan.seconds)
        text = table(plan)
        assert all(math.isfinite(seconds) and name in text for name, seconds in plan.seconds.items())
    read = Plan.model_validate_json(plan.model_dump_json())
    assert read == plan


def test_the_command_to_train_further_starts_from_the_new_weights_with_their_classes(tmp_path):
    plan = plan_for(init="c2i_B_256", init_classes=["class 1=207"])
    page = Page("t", tmp_path)
    _next(page, tmp_path, plan, images_of(1700, 9, 64))
    command = next(line for line in page.as_markdown().splitlines() if "train_c2i.sh" in line)
    assert "--init-classes" not in command and "c2i_B_256" not in command
    assert f"--gpt-ckpt '{tmp_path}/gpt/*-GPT-B/checkpoints/*.pt'" in command and command.endswith("--fresh")


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2h", 7200), ("90", 90), ("1.5d", 129600), ("45s", 45)])
def test_times(text, seconds):
    assert PipelineSettings(images="x", time_budget=text).time_budget == seconds


@pytest.mark.parametrize("text", ["", "0", "-3m", "nan", "1y", "9" * 30, "m"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="expected a time such as 30m"):
        PipelineSettings(images="x", time_budget=text)
