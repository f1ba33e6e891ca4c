"""Pre-emption: SIGTERM or Ctrl-C asks a run to save and end; its processes agree on the step after which they do."""

import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Stop:
    """What has been asked of this process, and what all processes have agreed on.

    Each step calls agreed() once. It starts a sum over processes that the next call reads, so no step waits for it,
    and every process sees the same answer at the same step: one step late.
    """

    def __init__(self, processes: int) -> None:
        self.asked: signal.Signals | None = None
        self.at = 0.0
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if processes > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, number: int, _frame: object = None) -> None:
        """The signal handler. A signal within 2 s of the first is the same request; a later one ends at once."""
        if self.asked is None:
            self.asked, self.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.at > 2:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether all processes end here."""
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
        """0 after SIGTERM (a scheduler that pre-empts sees a clean end), 130 after Ctrl-C."""
        return 130 if self.asked == signal.SIGINT else 0


@contextmanager
def stop_signals(processes: int):
    """Give a Stop that SIGTERM and SIGINT speak to; at the end the former handlers are back."""
    stop = Stop(processes)
    former = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        sys.stdout.flush()
