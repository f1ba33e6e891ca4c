"""How every entry point ends: one clear line for a user's mistake, exit status 2, no traceback."""

import argparse
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LONGEST_LINE = 1500  # characters of a message


class InputError(ValueError):
    """Something the user can mend: the message says what was given, what was expected and what to do."""


def fail(message: str) -> None:
    """Print one line and exit with status 2. Under torchrun only one process of a machine prints it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # the first process prints the same and ends the others; one that fails alone still prints
    line = re.sub(r"\S{300,}", lambda word: word[0][:200] + "...", " ".join(message.split()))
    print("error: " + line[:LONGEST_LINE], file=sys.stderr, flush=True)
    sys.exit(2)


def note(message: str) -> None:
    """Print one line on stderr, from the first of all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def counted(n: int, noun: str) -> str:
    """`1 class`, `1,200 classes`."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help and one line for a wrong argument."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> None:
        fail(f"{message} (see {Path(sys.argv[0]).name} --help)")


def run(main: Callable[[], None]) -> None:
    """Call main(). Whatever a user can mend becomes one line and exit status 2, Ctrl-C status 130, SIGTERM 143.

    TRACEBACK=1 in the environment shows where in the code it happened. One of several processes ends by leave().
    """
    _end_on_signals()
    try:
        _call(main)
    except BaseException as error:
        if not one_of_several():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        leave(error.code if isinstance(error, SystemExit) else 1)
    if one_of_several():
        leave(0)


def _call(main: Callable[[], None]) -> None:
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if os.environ.get("TRACEBACK"):
            traceback.print_exception(error)
        if isinstance(error, RuntimeError) and message.startswith("another process"):
            time.sleep(5)  # it has printed why, and the launcher ends this one
        fail(message)


def explain(error: BaseException) -> str | None:
    """What a user can do about an error, in one line; None for a bug of this code."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text.rsplit("InputError: ", 1)[-1]  # a DataLoader's worker puts its traceback in front
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (so that the interpreter's last flush does not fail too)
        return "the output was cut off: what reads it has ended (broken pipe)"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text.lower():
        return f"out of memory ({text[:160] or 'MemoryError'}): give a smaller batch, image size or model, or fewer workers"
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, RuntimeError):
        if any(mark in text for mark in DISK_MARKS):
            return f"a file could not be written ({text[:160]}): is the disk full? Make room and run the same command again"
        if "InputError: " in text:  # of a DataLoader's worker
            return text.rsplit("InputError: ", 1)[-1]
        if "DataLoader worker" in text:
            more = ": shared memory (/dev/shm) is too small" if "bus error" in text.lower() or "shm" in text else ""
            advice = "give --num-workers 0, or more shared memory (docker: --shm-size)"
            return f"a reading process ended{more} ({text[:160]}): {advice}"
        if any(mark in text for mark in PEER_MARKS):
            return f"another process of this run has ended or hangs ({text[:160]}); the same command resumes"
    return None


# What PyTorch says where a write fails, and where another process is gone.
DISK_MARKS = ("unexpected pos", "PytorchStreamWriter failed", "file write failed")
PEER_MARKS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "timed out")


def _explain_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = {
        errno.ENOSPC: "the disk is full: make room, or give another folder, and run the same command again",
        errno.EDQUOT: "the quota is used up: make room, or give another folder, and run the same command again",
        errno.EROFS: "this file system is read-only: give another folder",
        errno.EACCES: "change its permissions, or give another path",
        errno.EPERM: "change its permissions, or give another path",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a file stands where a folder is expected: give another path",
        errno.EISDIR: "a folder stands where a file is expected: give another path",
        errno.ENAMETOOLONG: "the name is too long: give a shorter one",
        errno.EMFILE: "too many open files: raise `ulimit -n`",
        errno.EIO: "the disk or the network file system fails: check it and run the same command again",
        errno.ESTALE: "the network file system went away: run the same command again",
    }.get(error.errno, "run the same command again when this is mended")
    return f"{place}{reason[:300]}; {advice}"


def _end_on_signals() -> None:
    """SIGTERM and SIGHUP end this process by an exception, so that temporary files are removed; an ignored one stays so."""
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def one_of_several() -> bool:
    """Whether torchrun started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def leave(code: int | str | None) -> None:
    """What sys.exit(code) does, then the end at once, without the interpreter's shutdown.

    Gloo's threads may still hold the last tensor, and one that drops it during the shutdown aborts or blocks the process.
    Other threads of Python's are waited for.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
