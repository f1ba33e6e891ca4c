"""The house rules that no single file can hold: who may import whom, no path hacks, and strict bash scripts.

Imports go only downwards: scripts (L3) > entry points (L2) > rooms (L1) > utils (L0). A new file that no row below places
fails, as does an entry point outside the rows that may have one.
"""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("autoregressive", "dataset", "evaluations", "pretrained_models", "scripts", "tokenizer", "utils")


class Room(NamedTuple):
    """Files (globs), the rooms they may import, and the packages: None for any, a set for these and the standard library.

    `entry` is None where a file may but need not be runnable, else whether each one is (`if __name__ == "__main__"`).
    """

    files: str
    imports: str
    packages: set[str] | None = None
    entry: bool | None = False


L1 = "patches gpt generate load schedule plan optim tokenizer dataset evaluations weights utils"

# The first row that matches a file is its room.
ROOMS = {
    "testing": Room("utils/testing.py conftest.py", "utils"),
    "toy": Room("dataset/codes/toy.py autoregressive/train/toy.py", "dataset toy utils"),
    "utils tests": Room("utils/*_test.py", "utils testing launcher export"),
    "tests": Room("*_test.py", f"{L1} helpers stages scripts testing toy launcher export"),
    # L3
    "scripts": Room("scripts/*.py", f"{L1} helpers stages scripts toy", entry=None),
    # L2: stages meet only in files
    "stages": Room(
        "autoregressive/train/extract_codes_c2i.py autoregressive/train/train_c2i.py autoregressive/sample/sample_c2i*.py "
        "tokenizer/tokenizer_image/vq_train.py tokenizer/tokenizer_image/reconstruction_vq_ddp.py "
        "dataset/fashion_mnist.py dataset/codes/__main__.py evaluations/c2i/evaluator.py evaluations/c2i/reference.py "
        "evaluations/c2i/train_classifier.py pretrained_models/download.py",
        f"{L1} helpers",
        entry=True,
    ),
    "helpers": Room(
        "autoregressive/train/trainer.py autoregressive/train/preview.py autoregressive/train/extraction.py "
        "autoregressive/sample/pipeline.py "
        "tokenizer/tokenizer_image/vq_data.py",
        L1,
    ),
    # L1
    "patches": Room("autoregressive/models/patches.py", "", {"torch"}),
    "gpt": Room("autoregressive/models/gpt.py", "patches", {"torch"}),
    "generate": Room("autoregressive/models/generate.py", "gpt utils"),
    "load": Room("autoregressive/models/load.py", "gpt utils"),
    "schedule": Room("autoregressive/train/schedule.py", "", set()),
    "plan": Room("autoregressive/train/plan.py", "schedule utils"),
    "optim": Room("autoregressive/train/optim.py", "gpt patches utils"),
    "tokenizer": Room("tokenizer/tokenizer_image/*.py", "tokenizer utils"),
    "dataset": Room("dataset/*.py", "dataset utils"),
    "evaluations": Room("evaluations/c2i/*.py", "evaluations utils"),
    "weights": Room("pretrained_models/*.py", "weights utils"),
    # L0
    "export": Room("utils/export.py", "utils", entry=True),
    "launcher": Room("utils/launch.py", "utils", entry=True),
    "utils": Room("utils/*.py", "utils"),
}


def room_of(path: str) -> str | None:
    """The room of a file (its path from the root); None if no row places it."""
    rows = ((name, pattern) for name, room in ROOMS.items() for pattern in room.files.split())
    return next((name for name, pattern in rows if fnmatch(path, pattern)), None)


@cache
def project_files() -> frozenset[str]:
    """Every Python file of the project, as paths from the root."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return frozenset(path.relative_to(ROOT).as_posix() for path in paths)


def imported(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Each import, wherever it stands: a module's name, or a module's and the name taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def resolve(names: tuple[str, ...], path: str) -> str | None:
    """The project's file behind an import in the file `path` (also one beside it by its bare name); None if outside.

    A package is its `__init__.py`; a module's name taken from a package is the module.
    """
    modules = [".".join(names[:n]).replace(".", "/") for n in range(len(names), 0, -1)]
    candidates = [module + ending for module in modules for ending in (".py", "/__init__.py")]
    beside = Path(path).with_name(names[0].split(".")[0] + ".py").as_posix()
    return next((file for file in (*candidates, beside) if file in project_files()), None)


def is_entry(tree: ast.Module) -> bool:
    """Whether a module runs something when it is the main one."""
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return any(isinstance(n, ast.Name) and n.id == "__name__" for test in tests for n in ast.walk(test))


def hacks_the_path(tree: ast.AST) -> bool:
    """Whether a module touches the interpreter's search path."""
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(names & {"sys.path", "site.addsitedir"}) or ("sys", "path") in imported(tree)


def violations(path: str, source: str) -> list[str]:
    """What a file (its path from the root, and its text) does against the rules."""
    name = room_of(path)
    if name is None:
        return [f"{path}: no row of ROOMS places this file"]
    room, tree = ROOMS[name], ast.parse(source)
    found = []
    for names in sorted(set(imported(tree))):
        what, top = ".".join(names), names[0].split(".")[0]
        file = resolve(names, path)
        if file:
            theirs = room_of(file)
            if theirs not in room.imports.split():
                found.append(f"{name} may not import {theirs} ({what})")
        elif top in FOLDERS or not top:
            found.append(f"{what} is not a file of the project; imports are absolute")
        elif room.packages is not None and top not in room.packages | sys.stdlib_module_names:
            found.append(f"{name} may not import {top}")
    if room.entry is not None and is_entry(tree) != room.entry:
        found.append(f"{name} {'must have' if room.entry else 'may not have'} an `if __name__ == '__main__'`")
    if hacks_the_path(tree):
        found.append("touches sys.path")
    if Path(path).stem in sys.stdlib_module_names:
        found.append("hides a module of the standard library from scripts that run in its folder")
    return [f"{path}: {problem}" for problem in found]


def test_the_house_keeps_its_rules():
    found = [line for path in sorted(project_files()) for line in violations(path, (ROOT / path).read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("utils/new.py", "from dataset.codes import Codes", "utils may not import dataset"),
        ("utils/new_test.py", "import autoregressive.models.gpt", "utils tests may not import gpt"),
        ("dataset/new.py", "from tokenizer.tokenizer_image import vq_model", "dataset may not import tokenizer"),
        ("dataset/new.py", "def f():\n    from autoregressive.models.gpt import preset", "dataset may not import gpt"),
        ("dataset/new.py", "from dataset.fashion_mnist import main", "dataset may not import stages"),
        ("evaluations/c2i/new.py", "import dataset.images as images", "evaluations may not import dataset"),
        ("tokenizer/tokenizer_image/load.py", "import vq_train", "tokenizer may not import stages"),
        ("autoregressive/models/gpt.py", "import numpy", "gpt may not import numpy"),
        ("autoregressive/models/gpt.py", "from utils import streams", "gpt may not import utils"),
        (
            "autoregressive/models/patches.py",
            "from autoregressive.models.gpt import preset",
            "patches may not import gpt",
        ),
        ("autoregressive/train/schedule.py", "import torch", "schedule may not import torch"),
        ("autoregressive/train/train_c2i.py", "from tokenizer.tokenizer_image.vq_train import main", "import stages"),
        ("autoregressive/train/train_c2i.py", "from utils.testing import close", "stages may not import testing"),
        ("autoregressive/sample/pipeline.py", "from autoregressive.sample import sample_c2i", "may not import stages"),
        ("autoregressive/sample/new.py", "", "no row of ROOMS places this file"),
        ("setup.py", "", "no row of ROOMS places this file"),
        ("dataset/new.py", "from .codes import Codes", "imports are absolute"),
        ("dataset/new.py", "from utils.nowhere import x", "utils.nowhere.x is not a file of the project"),
        ("dataset/new.py", "if __name__ == '__main__':\n    pass", "dataset may not have an `if __name__"),
        ("dataset/fashion_mnist.py", "", "stages must have an `if __name__"),
        ("dataset/codes/__main__.py", "", "stages must have an `if __name__"),
        ("dataset/codes/new.py", "import dataset.codes.__main__", "dataset may not import stages"),
        ("dataset/codes/new.py", "from dataset.codes import toy", "dataset may not import toy"),
        ("dataset/codes/new.py", "import tokenizer.tokenizer_image.load", "dataset may not import tokenizer"),
        ("scripts/new.py", "import sys\nsys.path.insert(0, '.')", "touches sys.path"),
        ("scripts/new.py", "from sys import path", "touches sys.path"),
        ("scripts/profile.py", "", "hides a module of the standard library"),
    ],
)
def test_a_violation_is_caught(path, source, problem):
    assert any(problem in line for line in violations(path, source)), violations(path, source)


def test_what_is_allowed_is_left_alone():
    assert not violations(
        "autoregressive/models/gpt.py", "import math\nimport torch.nn as nn\nfrom torch import Tensor"
    )
    assert not violations("autoregressive/train/schedule.py", "from typing import NamedTuple")
    assert not violations("scripts/benchmark/new.py", "from card import card\nimport autoregressive.train.train_c2i")
    assert not violations("dataset/codes/new.py", "from dataset.codes import manifest\nimport dataset.codes")
    assert not violations("dataset/new.py", "import sys, numpy\nfrom dataset.codes import Codes\nprint(sys.argv)")


def scripts() -> list[Path]:
    return sorted(path for path in (ROOT / "scripts").rglob("*.sh") if path.name != "env.sh")  # env.sh is sourced


def strict(source: str) -> bool:
    """Whether a bash script stops at the first failure, from its first command on."""
    lines = (line.strip() for line in source.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "") == "set -euo pipefail"


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_stop_at_the_first_failure(path):
    assert strict(path.read_text()), f"{path}: the first command is not `set -euo pipefail`"


def test_a_comment_does_not_make_a_script_strict():
    assert strict("#!/usr/bin/env bash\n# why\n\nset -euo pipefail\nls\n")
    assert not strict("#!/usr/bin/env bash\n# set -euo pipefail\nls\n")
