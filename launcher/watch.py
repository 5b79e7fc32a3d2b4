"""Waiting for a run: how often to look, and when silence means that it is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from launcher.status import Status

__all__ = ["UNSEEN_LIMIT_S", "intervals", "seldom", "watch"]

UNSEEN_LIMIT_S = 600.0
"""A run that a platform no longer knows is UNKNOWN for so long, then LOST."""


def intervals(*, first: float, most: float) -> Iterator[float]:
    """Seconds between two looks: grows by a tenth each time."""
    pause = first
    while True:
        yield pause
        pause = min(pause * 1.1, most)


_ASK_EVERY_S = 5.0
"""For the sake of a controller, however often somebody looks at the log."""


def seldom(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Asks every few seconds; True stays."""
    asked_at, answer = -math.inf, False

    def ended() -> bool:
        nonlocal asked_at, answer
        if not answer and time.monotonic() - asked_at >= _ASK_EVERY_S:
            answer, asked_at = ask(), time.monotonic()
        return answer

    return ended


def watch(
    ask: Callable[[], Status],
    *,
    first: float = 0.5,
    most: float = 15.0,
    timeout: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Status]:
    """Each status that differs from the one before; ends with a terminal one. TimeoutError after `timeout` seconds."""
    deadline = None if timeout is None else clock() + timeout
    last: Status | None = None
    for pause in intervals(first=first, most=most):
        status = ask()
        if status != last:
            yield status
            last = status
        if status.state.terminal:
            return
        if deadline is not None and clock() + pause > deadline:
            raise TimeoutError(f"still {status.state} after {timeout:g} s")
        sleep(pause)
