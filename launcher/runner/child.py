"""The command as a running process: its lines, its end, and how it is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from launcher.errors import SpecError
from launcher.process import descendants, exit_code, processes, signal_group
from launcher.runner.command import Command
from launcher.runner.logs import LineSplitter, RunLog, rank_of_line

__all__ = ["Child"]

_LAST_WORDS_S = 2.0
"""How long lines are read on after the command has ended, while something that it left behind holds the pipe."""


class Child:
    """Starts at once, in a session of its own. SpecError if the command can't be started.

    ended: called from another thread when the process has ended. first_rank: of this node.
    """

    def __init__(self, command: Command, log: RunLog, *, first_rank: int, ended: Callable[[], None]) -> None:
        self._command = command
        self._log = log
        self._first_rank = first_rank
        self._process, self._pipe = _start(command)
        self._groups = {self._process.pid}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _wait(self, ended: Callable[[], None]) -> None:
        self._process.wait()
        ended()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask_to_stop(self) -> None:
        """TERM to the ranks, not to torchrun, which would kill them 30 s later; nor to the whole group, where data
        loaders would die under a command that wants to finish its step. (A rank that is slower than another gets a
        second TERM, from torchrun.)"""
        self._see_family()
        me = self._process.pid
        ranks = [p.pid for p in processes() if p.parent == me] if self._command.torchrun else []
        for pid in ranks or [me]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def finish(self, seconds: float) -> int:
        """The exit code, 128 + n for signal n.

        What is left of the command gets TERM when its first process has ended, and KILL after `seconds`.
        """
        self._settle(time.monotonic() + seconds)
        self._see_family()
        self._signal_all(signal.SIGKILL)
        code = self._process.wait()
        self._reader.join(_LAST_WORDS_S)
        return exit_code(code)

    def _settle(self, end: float) -> None:
        told = False
        while self._alive() and time.monotonic() < end:
            if not told and not self.running:  # a shell that died of TERM and left its program behind
                self._signal_all(signal.SIGTERM)
                told = True
            time.sleep(0.05)

    def _alive(self) -> bool:
        return self.running or any(p.group in self._groups for p in processes())

    def _see_family(self) -> None:
        """torchrun gives each rank a session of its own; they are found as long as their parent lives."""
        self._groups |= {p.group for p in descendants(self._process.pid)} - {os.getpgrp()}

    def _signal_all(self, number: signal.Signals) -> None:
        for group in self._groups:
            signal_group(group, number)

    def _read(self) -> None:
        splitter = LineSplitter()
        while data := os.read(self._pipe, 1 << 16):
            self._log_lines(splitter.feed(data))
        self._log_lines(splitter.end())

    def _log_lines(self, lines: list[str]) -> None:
        for line in lines:
            if self._command.torchrun:
                self._log.line(*rank_of_line(line, self._first_rank))
            else:
                self._log.line(str(self._first_rank), line)


def _start(command: Command) -> tuple[subprocess.Popen[bytes], int]:
    """The process and the reading end of its output."""
    reading, writing = os.pipe()
    try:
        with _deaf_to_warnings(command):
            process = subprocess.Popen(
                command.argv,
                env=dict(command.env),
                cwd=command.cwd,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        os.close(reading)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"the command {command.argv[0]!r} can't be started: {reason}") from error
    finally:
        os.close(writing)
    return process, reading


@contextlib.contextmanager
def _deaf_to_warnings(command: Command) -> Iterator[None]:
    """Some SLURM sites (proctrack/linuxproc, pgid) give USR1, which warns the runner, to all that it has started, and
    it kills whatever does not expect it. A mask is inherited."""
    if "SLURM_STEP_ID" not in command.env:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
