"""Asking a run to stop: signals, the cancel mark and the timeout meet here.

Handlers and other threads only set flags and write to a pipe; the main thread waits at its other end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import FrameType
from typing import Generic, TypeVar

from launcher.runner.init import SIGNALS

__all__ = ["Reason", "Stop", "Stopped", "within"]

T = TypeVar("T")


class Reason(StrEnum):
    """Why a run is stopped; the word in `input/control/stop`. PREEMPTED: a signal without a cancel mark."""

    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


class Stopped(Exception):  # noqa: N818 - no error: it ends a phase that a stop interrupts
    """A stop was asked for while something else was going on."""


class Stop:
    """reason: why, None while nobody asked. since: when, by the clock (monotonic)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason: Reason | None = None
        self.since = 0.0
        self._clock = clock
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask(Reason.PREEMPTED)

    def ask(self, reason: Reason) -> None:
        """The first reason counts, but for a cancel mark that explains a signal."""
        if self.reason is None:
            self.since = self._clock()
            self.reason = reason
        elif reason is Reason.CANCELLED and self.reason is Reason.PREEMPTED:
            self.reason = reason
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b".")

    def wait(self, seconds: float) -> None:
        """Until woken, at most so long. Main thread only."""
        if select.select([self._read], [], [], max(seconds, 0.0))[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)

    def left(self, seconds: float) -> float:
        """What is left of so many seconds after the stop was asked for."""
        return self.since + seconds - self._clock()

    def during(self, work: Callable[[threading.Event], T]) -> T:
        """The result of `work(abort)`; Stopped as soon as a stop is asked for, whatever hangs in there."""
        abort = threading.Event()
        task = _Task(lambda: work(abort), self.wake)
        while not task.done.is_set():
            if self.reason is not None:
                abort.set()
                raise Stopped
            self.wait(1.0)
        return task.result()


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of `work`, or None if that takes longer or fails."""
    task = _Task(work, lambda: None)
    if not task.done.wait(max(seconds, 0.0)):
        return None
    return None if task.failed else task.result()


class _Task(Generic[T]):
    """A function in a daemon thread; a lighter `concurrent.futures`, and one that can be left behind."""

    def __init__(self, work: Callable[[], T], then: Callable[[], None]) -> None:
        self.done = threading.Event()
        self._work, self._then = work, then
        self._results: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error
        self.done.set()
        self._then()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]
