"""Log lines: to the runner's stdout as they are, to `output/logs/` with time and rank, secrets masked in both.

Where the platform keeps what is printed, $CVLAUNCH_LOG=tagged prints the very lines of the file.

A line of the file is `2026-11-21T23:19:31.123Z [0] text`; the tag is the rank, `-` the runner itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["LONGEST_LINE", "LineSplitter", "RunLog", "rank_of_line"]

LONGEST_LINE = 64 * 1024
_OVERHANG = 8 * 1024
"""Read beyond the cut, so that a secret that lies across it is still recognised."""
_SHORTEST_SECRET = 4
"""Shorter values would be masked out of every other word."""
_PROGRESS_S = 1.0
_BREAK = re.compile(rb"\r\n|\n|\r(?!\Z)")
_RANK = re.compile(r"\[default(\d+)\]:")


class RunLog:
    """Thread-safe. What is said before `open` is kept and written to the file then."""

    def __init__(self, *, out: int = 1, tagged: bool = False, clock: Callable[[], float] = time.time) -> None:
        """tagged: time and rank on stdout, too."""
        self._out: int | None = out
        self._tagged = tagged
        self._clock = clock
        self._lock = threading.Lock()
        self._early: list[bytes] = []
        self._file: int | None = None
        self._secrets: re.Pattern[str] | None = None
        self._last: deque[str] = deque(maxlen=30)

    def open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            _write(self._file, b"".join(self._early))
            self._early.clear()

    def hide(self, values: Iterable[str]) -> None:
        """Masks these from now on; a value of several lines is masked line by line."""
        parts = {part for value in values for part in (value, *value.splitlines()) if len(part) >= _SHORTEST_SECRET}
        if parts:
            longest_first = sorted(parts, key=len, reverse=True)
            self._secrets = re.compile("|".join(map(re.escape, longest_first)))

    def mask(self, text: str) -> str:
        return self._secrets.sub("***", text) if self._secrets else text

    def say(self, text: str) -> None:
        """The runner's own words, one or more lines."""
        for line in text.splitlines():
            self._put("-", line, shown=f"cvlaunch: {line}")

    def line(self, tag: str, text: str) -> None:
        """One line of the command; tag: its rank, or `-` for torchrun's own."""
        self._put(tag, text, shown=text)

    def last_lines(self) -> list[str]:
        """The command's last lines, masked."""
        return list(self._last)

    def begin_command(self) -> None:
        """A restart: what went before is not its last lines."""
        with self._lock:
            self._last.clear()

    def _put(self, tag: str, text: str, *, shown: str) -> None:
        text, shown = _cut(self.mask(text)), _cut(self.mask(shown))
        entry = f"{_timestamp(self._clock())} [{tag}] {text}\n".encode(errors="replace")
        with self._lock:
            if tag != "-":
                self._last.append(text)
            self._show(entry if self._tagged else shown.encode(errors="replace") + b"\n")
            self._keep(entry)

    def _keep(self, entry: bytes) -> None:
        if self._file is None:
            self._early.append(entry)
            return
        with contextlib.suppress(OSError):  # a full disk costs log lines, not the training
            _write(self._file, entry)

    def _show(self, data: bytes) -> None:
        if self._out is None:
            return
        try:
            _write(self._out, data)
        except OSError:  # nobody reads it any more; the file is still there
            self._out = None


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}… (cut)"


def _timestamp(seconds: float) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milliseconds:03}Z"


def rank_of_line(text: str, first_rank: int) -> tuple[str, str]:
    """(tag, text) of a line of torchrun: `[default1]:text` is the second rank of this node; other lines are its own."""
    match = _RANK.match(text)
    return (str(first_rank + int(match[1])), text[match.end() :]) if match else ("-", text)


class LineSplitter:
    r"""Cuts a stream into lines. A line that ends in \r is a progress bar: at most one a second comes through."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rest = b""
        self._skipping = False
        self._shown_at = -_PROGRESS_S
        self._held = b""

    def feed(self, data: bytes) -> list[str]:
        lines: list[str] = []
        buffer = self._rest + data
        start = 0
        for match in _BREAK.finditer(buffer):
            self._take(buffer[start : match.start()], progress=match[0] == b"\r", lines=lines)
            start = match.end()
        self._rest = buffer[start:]
        if len(self._rest) > LONGEST_LINE + _OVERHANG:
            self._take(self._rest, progress=False, lines=lines)
            self._rest, self._skipping = b"", True
        return lines

    def end(self) -> list[str]:
        """What is left when the stream ends."""
        lines: list[str] = []
        rest = self._rest.removesuffix(b"\r") or self._held
        if rest:
            self._take(rest, progress=False, lines=lines)
        self._rest = b""
        return lines

    def _take(self, piece: bytes, *, progress: bool, lines: list[str]) -> None:
        if self._skipping:  # the tail of a line that was cut
            self._skipping = False
            return
        if progress and (not piece or self._clock() - self._shown_at < _PROGRESS_S):
            self._held = piece or self._held
            return
        if progress:
            self._shown_at = self._clock()
        elif not piece:
            piece = self._held
        self._held = b""
        lines.append(piece.decode(errors="replace"))
