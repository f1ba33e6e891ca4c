"""For the tests of experiments: their scripts, without the work."""

import os
import subprocess

import pytest

from utils.testing import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sys.prefix*) dirname "$0" ;;
    *) echo "$*" >> "$(dirname "$0")/asked" ;;
esac
case "$*" in
    *dataset.emoji*) mkdir -p "$3/a" "$3/b"; for i in $(seq 10 30); do touch "$3/a/$i.png" "$3/b/$i b.png"; done ;;
esac
"""


@pytest.fixture
def experiment(tmp_path):
    """Run a script with a Python that only notes what it is asked for."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(PYTHON)
    path.chmod(0o755)

    def run(script, **env):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(path), "RUN": str(tmp_path / "run"), **env}
        command = ["bash", str(ROOT / "scripts/experiments" / script)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60, check=False)
        return done, (path.parent / "asked").read_text().splitlines() if (path.parent / "asked").is_file() else []

    return run
