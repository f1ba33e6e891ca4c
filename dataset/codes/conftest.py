"""`layout` is each layout in turn; `command(...)` runs `python -m dataset.codes ...` in this process."""

import pytest

from dataset.codes import LAYOUTS, __main__
from utils import cli


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command: its exit status, its lines, and those on stderr that tell what is wrong."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr("sys.argv", ["codes", *map(str, arguments)])
        status = 0
        try:
            cli.run(__main__.main)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status or 0, out, [line for line in err.splitlines() if line.startswith(("wrong: ", "error: "))]

    return run
