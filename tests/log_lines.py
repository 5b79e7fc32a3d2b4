"""Lines of a runner's log, and what tests of all readers of logs ask of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.backends.base import LogLine
from launcher.stores import Store, open_store

__all__ = [
    "NOON",
    "ONE",
    "RUN",
    "TWO",
    "Folder",
    "Read",
    "Story",
    "check_resuming",
    "folder_in",
    "hello",
    "parsed",
    "random_attempts",
    "stamp",
    "tagged",
    "texts",
]

RUN = "digits-1"
NOON = float(int(time.time()) - 3600)
"""An hour ago: CloudWatch takes no lines that are old."""


def stamp(seconds: float, digits: int = 3) -> str:
    micros = round(seconds * 1e6)
    text = datetime.fromtimestamp(micros // 10**6, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{micros % 10**6:06}"[: 20 + digits] + ("000Z" if digits == 9 else "Z")


def tagged(text: str, at: float, rank: str = "0") -> str:
    return f"{stamp(NOON + at)} [{rank}] {text}"


def hello(attempt: int, at: float, node: str = "") -> str:
    return tagged(f"{RUN}, attempt {attempt}{node}; root /opt/ml; shm 64 MiB", at, "-")


ONE = [hello(1, 0), *(tagged(f"line {number}", 1 + number / 4) for number in range(8)), tagged("bye", 3, "-")]
TWO = [hello(2, 100), tagged("again", 101), tagged("again", 101), tagged("done", 102, "-")]
"""Two lines with one stamp: the count tells them apart."""


@dataclass
class Folder:
    """The run's folder in the output store, and how often it was asked for."""

    store: Store
    asked: int = 0

    def __call__(self) -> Store:
        self.asked += 1
        return self.store

    def put(self, *lines: str, attempt: int = 1, node: int = 0) -> None:
        path = f"output/logs/attempt-{attempt}.node-{node}.log"
        where = f"nodes/{node}/{path}" if node else path
        self.store.write(where, "".join(f"{line}\n" for line in lines).encode())


def folder_in(tmp_path: Path) -> Folder:
    return Folder(open_store(str(tmp_path / "out")))


Read = Callable[..., list[LogLine]]


def texts(lines: Sequence[LogLine]) -> list[str]:
    return [line.text.partition(";")[0] for line in lines]


def check_resuming(read: Read) -> list[LogLine]:
    """After each line a new reader gives exactly the rest, cursors included."""
    whole = read()
    for number, line in enumerate(whole, 1):
        assert read(since=line.cursor) == whole[number:], line
    return whole


def parsed(lines: Sequence[str]) -> list[LogLine]:
    return [LogLine(line.split("] ", 1)[1]) for line in lines]


def random_attempts(chance: random.Random) -> list[list[str]]:
    """Of one run: many lines a millisecond, some out of order."""
    attempts, at = [], 0.0
    for attempt in range(1, chance.randint(2, 4)):
        lines = [hello(attempt, at)]
        for number in range(chance.randint(0, 25)):
            at += chance.choice([0, 0, 0.001, 0.3, 4])
            lines.append(tagged(f"line {attempt}.{number}", max(at - chance.choice([0, 0, 0.001]), 0)))
        at += chance.randint(1, 20)
        attempts.append(lines)
    return attempts


class Story:
    """What happens to a run: a step each time that its reader asks whether it has ended."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = iter(steps)

    def ended(self) -> bool:
        step = next(self._steps, None)
        if step is None:
            return True
        step()
        return False
