"""The command-line manners of every entry point: one clear line for a user's mistake, exit status 2, no traceback."""

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class InputError(ValueError):
    """Something the user can mend: the message says what was given, what was expected and what to do."""


def fail(message: str) -> None:
    """Print one line and exit with status 2. Under torchrun only one process of a machine gets to speak."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # the first process says the same and ends the others; one that fails alone still speaks
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)


def note(message: str) -> None:
    """Say something on stderr: one line, from the first of all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help and one line for a wrong argument."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> None:
        fail(f"{message} (see {Path(sys.argv[0]).name} --help)")


def run(main: Callable[[], None]) -> None:
    """Call main(); an InputError becomes one line and exit status 2, Ctrl-C exit status 130.

    One of several processes ends here, without the interpreter's farewell: gloo's threads may still hold the last
    tensor, and one that lets go of it then aborts the process (about one run in twenty on two busy cores).
    """
    try:
        _call(main)
    except BaseException as error:
        if not _one_of_several():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        _leave(error.code if isinstance(error, SystemExit) else 1)
    if _one_of_several():
        _leave(0)


def _call(main: Callable[[], None]) -> None:
    try:
        main()
    except InputError as error:
        fail(str(error).rsplit("InputError: ", 1)[-1])  # a DataLoader's worker puts its traceback in front
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        time.sleep(5)  # gloo says that another process has ended: it has said why, and the launcher ends this one
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave(code: int | str | None) -> None:
    """What sys.exit(code) does, then the end at once; other threads of Python's are waited for."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _number(kind: type, low: float, high: float, low_open: bool, wanted: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
        if not (low < value if low_open else low <= value) or value > high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
        return value

    return parse


_INF = float("inf")
positive_int = _number(int, 1, _INF, False, "a whole number of at least 1")
count = _number(int, 0, _INF, False, "a whole number of at least 0")
positive = _number(float, 0, _INF, True, "a number above 0")
at_least_one = _number(float, 1, _INF, False, "a number of at least 1 (1 is off)")
non_negative = _number(float, 0, _INF, False, "a number of at least 0")
fraction = _number(float, 0, 1, False, "a number in [0, 1]")
positive_fraction = _number(float, 0, 1, True, "a number in (0, 1]")


def existing_file(text: str) -> Path:
    """argparse type: a path that is a file."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def existing_folder(text: str) -> Path:
    """argparse type: a path that is a folder."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path
