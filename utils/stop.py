"""Requests to end: SIGTERM, SIGHUP, Ctrl-C and Slurm's SIGUSR1 ask a run to save and end; its processes agree when."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from utils.distributed import collective_timeout


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to end. One that is ignored (by nohup) stays ignored."""
    wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    if "SLURM_JOB_ID" in os.environ:
        wanted.append(signal.SIGUSR1)  # sbatch --signal=USR1@60: a warning before the time limit
    return tuple(number for number in wanted if signal.getsignal(number) != signal.SIG_IGN)


class StopRequest:
    """What has been asked of this process, and what all processes have agreed on.

    Each step calls agreed() once. It starts a sum over processes that the next call reads, so no step waits for it,
    and every process sees the same answer at the same step: one step late.
    """

    def __init__(self, processes: int) -> None:
        self.asked: signal.Signals | None = None
        self.at = 0.0
        self._group = dist.new_group(backend="gloo", timeout=collective_timeout()) if processes > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, number: int, _frame: object = None) -> None:
        """The signal handler. A signal within 2 s of the first is the same request; a later one ends at once."""
        if self.asked is None:
            self.asked, self.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.at > 2:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether all processes end now."""
        if self._group is None:
            return self.asked is not None
        answer = False
        if self._pending:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([int(self.asked is not None)])
        self._pending = (dist.all_reduce(flag, group=self._group, async_op=True), flag)
        return answer

    def exit_status(self) -> int:
        """130 after Ctrl-C, otherwise 0: a scheduler that pre-empts sees a clean end."""
        return 130 if self.asked == signal.SIGINT else 0


@contextmanager
def stop_on_signals(processes: int) -> Iterator[StopRequest]:
    """Give a StopRequest that the signals speak to; at the end the former handlers are back."""
    stop = StopRequest(processes)
    former = {number: signal.signal(number, stop.ask) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        sys.stdout.flush()
