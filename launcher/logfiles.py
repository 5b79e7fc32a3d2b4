"""The runner's log files, `output/logs/attempt-<A>.node-<N>.log`, read from any store while they grow.

A line is `2026-11-21T23:19:31.123Z [0] text`; the tag is the rank, `-` the runner itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from launcher.backends.base import LogLine
from launcher.contract import LOGS, SEGMENTS
from launcher.stores import Store
from launcher.sync import Cursor, read_appended

__all__ = ["PRINTED", "follow_logs", "parse_line", "printed_lines"]

PRINTED = "printed:"
"""Begins the cursor of a line that is in no log file."""

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z) \[(-|\d+)\] ?(.*)", re.DOTALL)
_FILE = re.compile(rf"(?:nodes/\d+/)?{LOGS}/attempt-(\d+)\.node-(\d+)\.log")


def parse_line(text: str, *, attempt: int = 1, node: int = 0, cursor: str = "") -> LogLine:
    """A line of another form is kept as it stands, without time."""
    match = _LINE.fullmatch(text)
    if not match:
        return LogLine(text, attempt=attempt, node=node, cursor=cursor)
    when = datetime.fromisoformat(match[1]).timestamp()
    return LogLine(match[3], when, match[2], node, attempt, cursor)


def follow_logs(
    store: Store,
    *,
    ended: Callable[[], bool] | None = None,
    since: str = "",
    sleep: Callable[[float], None] = time.sleep,
    every: float = 0.5,
) -> Iterator[LogLine]:
    """All whole lines there are; with `ended`, on until it is true, and then also a last line that was cut off.

    Lines of one node keep their order; lines of several nodes are not sorted by time, because clocks differ.
    since: the cursor of a LogLine, to go on after it.
    """
    cursors = _cursors_from(since)
    while True:
        over = ended is not None and ended()
        for path, attempt, node in sorted(_files(store), key=lambda file: file[1:]):
            for text, cursor in _new_lines(store, path, since=cursors.get(path, Cursor()), torn=over):
                cursors[path] = cursor
                yield parse_line(text, attempt=attempt, node=node, cursor=_cursors_text(cursors))
        if over or ended is None:
            return
        sleep(every)


def printed_lines(
    read: Callable[[], bytes], ended: Callable[[], bool], *, follow: bool, since: str, every: float = 0.5
) -> Iterator[LogLine]:
    """What was printed outside of any log file: whole lines; at the end also one that has none. read: all of it."""
    number = int(since.removeprefix(PRINTED) or 0)
    while True:
        over = ended()
        lines = read().split(b"\n")
        for text in (lines if over and lines[-1] else lines[:-1])[number:]:
            number += 1
            yield LogLine(text.decode(errors="replace"), cursor=f"{PRINTED}{number}")
        if over or not follow:
            return
        time.sleep(every)


def _files(store: Store) -> Iterator[tuple[str, int, int]]:
    seen = set()
    for prefix in (LOGS, "nodes", SEGMENTS):
        for entry in store.list(prefix):
            match = _FILE.search(entry.path)
            if match and match[0] not in seen:
                seen.add(match[0])
                yield match[0], int(match[1]), int(match[2])


def _new_lines(store: Store, path: str, *, since: Cursor, torn: bool) -> Iterator[tuple[str, Cursor]]:
    """Lines with the cursor after each. torn: also the last one, if it has no end.

    A line feed alone ends a line, not the other breaks that Python knows, such as U+2028. A cursor within what was
    read keeps the segment that it began with, and reads that again.
    """
    data, end = read_appended(store, path, since=since)
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start) + 1
        if not stop and not torn:
            return
        line, start = data[start : stop or None], stop or len(data)
        cursor = end if start == len(data) else dataclasses.replace(since, offset=since.offset + start)
        yield line.removesuffix(b"\n").decode(errors="replace"), cursor


def _cursors_text(cursors: dict[str, Cursor]) -> str:
    return json.dumps({path: dataclasses.astuple(cursor) for path, cursor in cursors.items()})


def _cursors_from(text: str) -> dict[str, Cursor]:
    return {path: Cursor(*value) for path, value in json.loads(text).items()} if text else {}
