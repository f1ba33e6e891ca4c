"""The comparison with next-token training: what tells its arms apart, and the report of what was measured."""

import json

import numpy as np
import pytest

from autoregressive.models.gpt import preset
from dataset.codes import toy
from scripts.experiments.npp_vs_ntp_report import ARMS, Experiment, Trained, main, report, spread, verdict
from utils import samples
from utils.cli import InputError

SCRIPT = "npp_vs_ntp.sh"
STEPS = 20  # an epoch
LEVELS = {  # by arm: patch sides, epochs, validation loss of seed 0
    "ntp": ([1], [2.0], 3.0),
    "npp2": ([2, 1], [1.0, 1.0], 3.2),
    "ntp-compute": ([1], [1.25], 3.3),
    "ntp-half": ([1], [1.0], 3.4),
}


def test_arms_differ_in_schedule_and_seed_only(experiment):
    done, asked = experiment(SCRIPT, SEEDS="0 7", ARMS=" ".join(ARMS), EPOCHS="4")
    assert done.returncode == 0, done.stderr
    trained = [line.split() for line in asked if "train_c2i.py" in line]
    assert len(trained) == 2 * len(ARMS)
    own = ("--scheduler", "--patch-sizes", "--patch-epochs", "--results-dir", "--global-seed")
    common, schedules = set(), {}
    for words in trained:
        flags = {"": []}  # and what stands before the first one
        for word in words:
            if word.startswith("--"):
                flags[word] = []
            else:
                flags[next(reversed(flags))].append(word)
        common.add(json.dumps({flag: values for flag, values in flags.items() if flag not in own}))
        name, _, seed = flags["--results-dir"][0].rpartition("/")[2].rpartition("-")
        assert flags["--global-seed"] == [seed]
        schedules[name] = ["--scheduler" in flags, *flags["--patch-sizes"], *flags["--patch-epochs"]]
    assert len(common) == 1
    assert schedules == {
        "ntp": [True, "1", "4"], "ntp-constant": [False, "1", "4"], "ntp-compute": [True, "1", "2.5"],
        "ntp-half": [True, "1", "2"], "ntp-restart": [True, "1", "1", "2", "2"], "npp2": [True, "2", "1", "2", "2"],
        "npp3": [True, "4", "2", "1", "1", "1", "2"], "npp2-67": [True, "2", "1", "2.68", "1.32"],
    }  # fmt: skip
    again, more = experiment(SCRIPT, SEEDS="0 7", ARMS=" ".join(ARMS), EPOCHS="4")
    assert again.returncode == 0
    assert not [line for line in more[len(asked) :] if "evaluator.py" in line or "train" in line]


def test_an_unknown_arm_is_named_before_work(experiment):
    done, asked = experiment(SCRIPT, ARMS="npp2 npp4")
    assert done.returncode != 0 and "there is no arm npp4" in done.stderr and not asked


def write_arm(run, arm: str, seed: int) -> None:
    """What the stages of an arm leave; FID is lowest at guidance 1.5."""
    patches, epochs, loss = LEVELS[arm]
    folder = run / "arms" / f"{arm}-{seed}"
    args = {
        "patch_sizes": patches, "patch_epochs": epochs, "global_batch_size": 4, "gpt_model": "GPT-XXS", "lr": 1e-3,
        "precision": "float32", "dataset": "toy", "image_size": 32, "results_dir": f"arms/{arm}-{seed}",
    }  # fmt: skip
    gpt = folder / "000-GPT-XXS"
    gpt.mkdir(parents=True)
    (gpt / "run.json").write_text(json.dumps({"id": "a", "args": args, "finished": True}))
    total = round(sum(epochs) * STEPS)
    rows = []
    for step in range(5, total + 1, 5):
        patch = patches[0] if len(patches) > 1 and step <= epochs[0] * STEPS else patches[-1]
        rows.append({"step": step, "loss": 4.0, "patch": patch, "images_per_s": 2.0 * patch**2})
        rows.append({"step": step, "val_loss": loss + 0.1 * seed + (total - step) / 10})
    (gpt / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "samples").mkdir()
    for scale, fid in ((1.25, 4.0), (1.5, 2.0), (2.0, 3.0)):
        name = folder / "samples" / f"GPT-cfg-{scale}-seed-{seed}"
        images = np.full((24, 8, 8, 3), 40 * seed, np.uint8)
        samples.write(name.with_name(f"{name.name}.npz"), [images], images.shape, np.zeros(24, np.int64))
        name.with_name(f"{name.name}.json").write_text(json.dumps({"cfg_scale": scale}))
        figures = {"fid": fid + loss - 3 + 0.01 * seed, "inception_score": 7.0, "precision": 0.8, "recall": 0.6}
        metrics = {"metrics": {**figures, "class_accuracy": 0.9}}
        name.with_name(f"{name.name}.metrics.json").write_text(json.dumps(metrics))
    (run / "done").mkdir(exist_ok=True)
    (run / "done" / f"{arm}-{seed}-evaluate").touch()


@pytest.fixture
def measured(tmp_path):
    with pytest.raises(InputError, match="holds no measured arm ntp"):
        Experiment(tmp_path)
    toy.write_codes(tmp_path / "codes" / "train", images=4 * STEPS, codebook=64, tokens=16)
    figures = {"metrics": {"fid": 1.0}, "samples": {"images": 24}, "reference": {"images": 100}}
    (tmp_path / "reconstructions.metrics.json").write_text(json.dumps(figures))
    for arm in LEVELS:
        for seed in (0, 1, 2):
            write_arm(tmp_path, arm, seed)
    return Experiment(tmp_path)


def test_the_report(measured, monkeypatch):
    assert list(measured.trained) == [arm for arm in ARMS if arm in LEVELS]
    assert all(list(seeds) == [0, 1, 2] for seeds in measured.trained.values())
    assert measured.scale == 1.5
    config = preset("GPT-XXS", vocab_size=64, num_classes=10, block_size=16)
    fine, coarse = (4 * STEPS * config.training_flops(patch) for patch in (1, 2))
    assert measured.flops("ntp") == pytest.approx(2 * fine)
    assert measured.flops("npp2") == pytest.approx(coarse + fine)
    assert measured.flops("npp2", 30) == pytest.approx(coarse + fine / 2)
    seconds = [measured.of(arm, Trained.seconds) for arm in ("ntp", "npp2")]
    assert seconds == [pytest.approx([80.0] * 3), pytest.approx([50.0] * 3)]
    assert measured.of("npp2", lambda run: run.last_loss) == pytest.approx([3.2, 3.3, 3.4])
    monkeypatch.setattr("sys.argv", ["report", str(measured.folder)])
    main()
    text = (measured.folder / "report.md").read_text()
    for name in ("loss_flops.png", "loss_seconds.png", "fid_flops.png", "samples.png"):
        assert f"({name})" in text and (measured.folder / name).is_file()
    assert "npp2 has 0.625 of the positions of the control" in text and "and took 0.625 of its time" in text
    more = "± 0.000 nats a code (more than chance)"
    assert f"- **npp2** beside the control: validation loss +0.200 {more}; FID +0.200 ± 0.000 (more" in text
    assert f"- **npp2** beside next-token training at the compute of npp2: validation loss -0.100 {more}" in text
    assert "| ntp | 3 | 1x1 2 |" in text and "| npp2 | 3 | 2x2 1, 1x1 1 |" in text
    rows = [
        line for line in text.splitlines() if (line.startswith("| ") and " seconds | " in line) or "| ntp | 3 |" in line
    ]
    assert len(rows) == 2 and rows[0].count("|") == rows[1].count("|")
    assert "| ntp | 4.010 ± 0.010 | 2.010 ± 0.010 | 3.010 ± 0.010 |" in text


def test_what_a_difference_says():
    assert "(may be chance)" in verdict([0.1, -0.1, 0.05], "")
    assert "(more than chance)" in verdict([-0.1, -0.12, -0.11], "") and "(more than chance)" in verdict(
        [0.1, 0.12, 0.11], ""
    )
    assert "(may be chance)" in verdict([0.1, 0.2], "")  # two seeds say little
    assert "(more than chance)" in verdict([0.1, 0.2] * 10, "")
    assert "of one seed" in verdict([0.1], "")
    assert spread([1.0]) == "1.000" and spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"


def test_trainings_of_other_settings_are_not_compared(measured):
    path = measured.folder / "arms" / "npp2-1" / "000-GPT-XXS" / "run.json"
    path.write_text(path.read_text().replace("float32", "bfloat16"))
    with pytest.raises(InputError, match="npp2-1 differs from the control by precision float32, now bfloat16"):
        Experiment(measured.folder)


def test_another_experiment_is_not_put_into_the_same_folder(experiment):
    assert experiment(SCRIPT, ARMS="ntp", SEEDS="0")[0].returncode == 0
    done, _ = experiment(SCRIPT, ARMS="ntp", SEEDS="0", EPOCHS="8")
    assert done.returncode == 2 and "holds the experiment of 2 epochs, 5000 samples" in done.stderr


def test_arms_without_a_common_seed_are_not_compared(measured):
    for seed in (0, 1):
        del measured.trained["npp2"][seed]
    del measured.trained["ntp-compute"][2]
    assert "beside next-token training at the compute" not in report(measured)
