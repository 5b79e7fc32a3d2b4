"""PID 1 of a container: forwards signals, reaps whatever dies, exits with the child's code.

It has to be a process of its own: reaping beside `Popen` takes the command's exit code away, and a failed job would
end with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

__all__ = ["SIGNALS", "stand_aside_as_init"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stand_aside_as_init() -> None:
    """If this is PID 1, forks and returns in the child only, with SIGNALS blocked; else does nothing.

    Signals stay blocked around the fork, so that none is lost and none meets a default action.
    """
    if os.getpid() != 1:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child:
        os._exit(_serve(child))


def _serve(child: int) -> int:
    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    from launcher.process import exit_code  # signals count already

    while True:
        pid, status = os.wait()
        if pid == child:
            return exit_code(os.waitstatus_to_exitcode(status))
