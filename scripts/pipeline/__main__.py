"""From a folder of images to a trained model, samples, figures and a report, in one command that can be resumed.

    bash scripts/pipeline.sh --images PICTURES --image-size 64 --time-budget 30m [--dry-run]

The plan is printed before anything starts: what is chosen, from the images, the device and the time, and how long each
stage will take. Every choice can be given. RUN/report.html and RUN/report.md hold the results.
"""

import re
import time
from pathlib import Path

from scripts.pipeline import report
from scripts.pipeline.images import Images, open_images
from scripts.pipeline.measure import measure
from scripts.pipeline.models import choose_models, level_count
from scripts.pipeline.plan import Plan, make_plan, recorded, table
from scripts.pipeline.runner import Runner
from scripts.pipeline.settings import PipelineSettings
from scripts.pipeline.stages import stages
from utils import cli
from utils.cli import InputError, note
from utils.distributed import best_device
from utils.files import atomic_path, check_folder, hold
from utils.settings import differences

ROOT = Path(__file__).resolve().parents[2]


def name_of(images: Path) -> str:
    """A word for a data set, from the name of its folder or file."""
    stem = images.expanduser().resolve().name.split(".")[0] or "images"
    return re.sub(r"[^A-Za-z0-9_+-]+", "-", stem).strip("-")[:60] or "images"


def plan_of(s: PipelineSettings, name: str, run: Path, images: Images) -> Plan:
    """The plan of the run's folder, if it is for these settings and images; else a new one. Raises InputError for a folder
    of other images."""
    path = run / "plan.json"
    if known := Plan.read_if_present(path):
        if known.content != images.content:
            raise InputError(f"{run} is of other images ({known.name}): give another --run, or delete it")
        changed = differences(known.settings, recorded(s), defaults=s.defaults())
        if not changed:
            return known
        note(f"settings of {run} are others than before ({'; '.join(changed[:4])}): planning anew")
    device = best_device()
    models = choose_models(s, images, device)
    note("measuring this machine")
    patches = [2**i for i in range(level_count(s))]
    costs = measure(models.vq, models.gpt, patches, models.image_size, images.some_paths)
    return make_plan(s, name, images, models, costs, device)


def write_left_out(path: Path, images: Images) -> None:
    """RUN/left_out.txt: each file that is no image of a class, and why."""
    with atomic_path(path) as temporary, open(temporary, "w", errors="surrogateescape") as file:
        for reason, names in images.left_out.items():
            file.writelines(f"{name!r}: {reason}\n" for name in names)


def main() -> None:
    s = PipelineSettings.from_command_line(__doc__)
    name = s.name or name_of(s.images)
    run = check_folder((s.run or ROOT / "runs" / name).expanduser().absolute())
    run.mkdir(parents=True, exist_ok=True)
    lock = hold(run / "lock", str(run), "wait for it, or give another --run")
    images = open_images(s, run)
    plan = plan_of(s, name, run, images)
    todo = stages(plan, run, images.train, images.test)
    runner = Runner(run / "done", ROOT)
    print(table(plan, done=runner.took(plan.seconds)), flush=True)
    if s.dry_run:
        for stage in todo:
            print(f"== {stage.name}: {' '.join(stage.command)}")
        return
    images.write()
    plan.write(run / "plan.json")
    write_left_out(run / "left_out.txt", images)
    with runner:
        for stage in todo:
            runner.run(stage)
    start = time.monotonic()
    report.write(run, plan, images, runner.took(plan.seconds))
    print(f"report after {time.monotonic() - start:.0f} s", flush=True)
    lock.close()


if __name__ == "__main__":
    cli.run(main)
