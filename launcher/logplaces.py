"""Places in a run's log, and reading on from one, wherever its lines are kept.

The runner prints the lines of its log file, stamps included, so that what a platform keeps and the output store are one
text and a place in it is the same in both: attempt, stamp, and how many lines with that stamp. Lines that no runner
wrote have the platform's stamps.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from launcher.backends.base import LogLine
from launcher.errors import SpecError
from launcher.logfiles import follow_logs
from launcher.stores import Store

__all__ = [
    "HEAD",
    "SLACK_S",
    "Head",
    "Numbered",
    "Piece",
    "Place",
    "Reading",
    "Source",
    "StaleError",
    "read_head",
    "timed",
]

HEAD = 200
"""Within so many lines the runner says which attempt it is."""
SLACK_S = 5.0
"""How far stamps may stand out of order: threads of the runner, and the platform's own stamp, a little later."""
_COUNTED = 1000
_HELLO = re.compile(r"\S+, attempt (\d+)(?:, node \d+ of (\d+))?;")

Place = tuple[int, float, int]
"""Attempt, stamp in Unix seconds, and which of the lines with this stamp, 1 the first."""
Numbered = tuple[LogLine, int]

_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Head:
    """The beginning of a container's log.

    attempt: as the runner says, 0 if it does not. first: its first line, the first of all if it has not spoken.
    enough: no later line will tell more.
    """

    attempt: int = 0
    nodes: int = 1
    first: LogLine | None = None
    spoken: bool = False
    enough: bool = False


@dataclass
class Piece(Generic[_Of]):
    """The log of one start of a container. of: what its source knows of it.

    attempt: 0 is not known yet. streamed: reading its new lines waits for more. heard: it has lines. stamps: of the
    lines read, and how many there were of each; lost: the same of those that the log had before. before: lines that
    come first, from the store. reached: where we stopped. done: nothing more will be read. clean: all has been read.
    """

    of: _Of
    node: int
    has_runner: bool
    begun: bool = False
    live: bool = False
    streamed: bool = False
    attempt: int = 0
    heard: bool = False
    stamps: dict[float, int] = field(default_factory=dict)
    lost: dict[float, int] = field(default_factory=dict)
    before: Sequence[Numbered] = ()
    reached: Place | None = None
    done: bool = False
    clean: bool = False

    def numbered(self, line: LogLine) -> Numbered:
        self.heard = True
        return line, _count(self.stamps, line.time)

    def recount(self) -> None:
        """Before its lines are read anew."""
        self.heard, self.stamps = False, dict(self.lost)

    def close(self) -> None:
        """After a reading to the end; a log that is empty has been lost, as runners never say nothing."""
        self.clean = self.live or self.heard or not self.has_runner
        self.done = not self.live


class StaleError(Exception):
    """A source can't go on where it stopped."""


class Source(Protocol[_Of]):
    """Where a platform keeps the logs of containers."""

    def head(self, piece: Piece[_Of]) -> Head: ...

    def window(self, piece: Piece[_Of], since: float | None) -> Iterable[Numbered]:
        """Lines from about this stamp on, or all, after `recount`; what breaks off is asked for again."""

    def new(self, piece: Piece[_Of]) -> Iterable[Numbered]:
        """Lines that were not read before. StaleError, before any line."""


class Reading(Generic[_Of]):
    """What was read so far, node by node.

    store: the run's folder, asked for only where the source doesn't have it all; None where it is not known any more.
    since: the cursor of a LogLine, to go on after it. broken: what the source raises for a log that breaks off.
    """

    def __init__(
        self, source: Source[_Of], store: Callable[[], Store | None], *, since: str, broken: tuple[type[Exception], ...]
    ) -> None:
        self._source, self._store, self._broken = source, store, broken
        self._places = _places(since)
        self._stored: dict[int, list[LogLine]] | None = None
        self.size = 1
        """How many nodes there are, as far as is known."""

    def begin_round(self, nodes: Iterable[int]) -> None:
        """nodes: those that there are now."""
        self._stored = None
        self.size = max([self.size, *(node + 1 for node in nodes)])

    def of_node(self, pieces: Sequence[Piece[_Of]], *, live: bool) -> Iterator[LogLine]:
        """What has come since last time; the oldest piece first. live: of what runs, more will come."""
        earlier = None
        for piece in pieces:
            if piece.begun and not piece.done:
                try:
                    if not piece.attempt and not self._begin(piece, earlier, live=live):
                        return
                    yield from self._more(piece)
                except self._broken:
                    piece.clean, piece.done = False, not piece.live
            earlier = piece if piece.begun else earlier

    def torn(self, nodes: Mapping[int, Sequence[Piece[_Of]]], *, over: bool) -> Iterator[LogLine]:
        """The last lines of nodes that have them in the store alone. over: nothing will come any more."""
        for node in self._torn_nodes(nodes, over=over):
            yield from self._give(node, self._beyond(node, _numbered(self._from_store(over).get(node, ()))))

    def _torn_nodes(self, nodes: Mapping[int, Sequence[Piece[_Of]]], *, over: bool) -> list[int]:
        if not nodes:
            return sorted(self._from_store(over))
        begun = {node: [piece for piece in pieces if piece.begun] for node, pieces in nodes.items()}
        return sorted(set(range(self.size)) - {node for node, pieces in begun.items() if pieces and pieces[-1].clean})

    def of_store(
        self, store: Store, *, ended: Callable[[], bool] | None, sleep: Callable[[float], None], every: float
    ) -> Iterator[LogLine]:
        """The lines of the store alone, as `follow_logs` gives them."""
        gates: dict[int, _Gate] = {}
        counts: dict[tuple[int, int], dict[float, int]] = {}
        for line in _with_times(follow_logs(store, ended=ended, sleep=sleep, every=every)):
            gate = gates.setdefault(line.node, _Gate(self._places.get(line.node)))
            number = _count(counts.setdefault((line.node, line.attempt), {}), line.time)
            yield from self._give(line.node, gate.take(line, number))
        for node, gate in gates.items():
            yield from self._give(node, gate.rest())

    # -- one piece ----------------------------------------------------------------------------------------------------

    def _begin(self, piece: Piece[_Of], earlier: Piece[_Of] | None, *, live: bool) -> bool:
        """Finds its attempt and what stands before it; False if the runner hasn't said yet which attempt it is."""
        head = self._source.head(piece) if piece.has_runner else Head(enough=True)
        self.size = max(self.size, head.nodes)
        if live and piece.live and not head.enough:
            return False
        before, piece.attempt = self._before(piece, head, earlier)
        piece.before = list(_numbered(before))
        piece.lost = {line.time or 0.0: count for line, count in piece.before if line.attempt == piece.attempt}
        piece.recount()
        return True

    def _before(self, piece: Piece[_Of], head: Head, earlier: Piece[_Of] | None) -> tuple[Sequence[LogLine], int]:
        """(lines of earlier pieces and of this one that are in the store alone, attempt)."""
        expected = earlier.attempt + 1 if earlier else 1
        if not piece.has_runner or head.attempt == 1:
            return (), head.attempt or expected
        if earlier and earlier.clean and head.attempt in (0, expected):
            return (), expected
        stored = self._from_store().get(piece.node, [])
        if head.attempt:
            return [line for line in stored if line.attempt < head.attempt], head.attempt
        return _cut(stored, head)

    def _more(self, piece: Piece[_Of]) -> Iterator[LogLine]:
        """What the piece has beyond the place that we are at; of a stream, what comes until it is cut."""
        place = self._places.get(piece.node)
        if place and piece.attempt < place[0]:
            piece.heard = True
            piece.close()
            return
        resumed = place is not None and piece.attempt == place[0] and place != piece.reached
        if resumed:
            yield from self._again(piece)
        else:
            yield from self._given(piece, self._beyond(piece.node, piece.before))
            piece.before = ()
        if piece.streamed or not resumed:
            yield from self._on(piece)
        if not piece.streamed:
            piece.close()

    def _again(self, piece: Piece[_Of]) -> Iterator[LogLine]:
        """From about the place that we are at."""
        place = self._places.get(piece.node)
        since = place[1] if place and place[0] == piece.attempt else None
        piece.reached = None
        lines = itertools.chain(piece.before, self._source.window(piece, since))
        yield from self._given(piece, self._beyond(piece.node, lines))
        piece.before, piece.reached = (), self._places.get(piece.node)

    def _on(self, piece: Piece[_Of]) -> Iterator[LogLine]:
        try:
            yield from self._given(piece, self._source.new(piece))
        except StaleError:
            yield from self._again(piece)

    # -- the store ----------------------------------------------------------------------------------------------------

    def _from_store(self, over: bool = False) -> dict[int, list[LogLine]]:
        """By node; read once in a round. over: with a last line that was cut off."""
        if self._stored is None:
            found: dict[int, list[LogLine]] = {}
            store = self._store()
            for line in _with_times(follow_logs(store, ended=(lambda: True) if over else None)) if store else ():
                found.setdefault(line.node, []).append(line)
            self._stored = found
        return self._stored

    # -- places -------------------------------------------------------------------------------------------------------

    def _beyond(self, node: int, lines: Iterable[Numbered]) -> Iterator[Numbered]:
        gate = _Gate(self._places.get(node))
        for line, count in lines:
            yield from gate.take(line, count)
        yield from gate.rest()

    def _given(self, piece: Piece[_Of], lines: Iterable[Numbered]) -> Iterator[LogLine]:
        for line in self._give(piece.node, lines):
            piece.reached = self._places[piece.node]
            yield line

    def _give(self, node: int, lines: Iterable[Numbered]) -> Iterator[LogLine]:
        for line, count in lines:
            self._places[node] = line.attempt, line.time or 0.0, count
            yield replace(line, cursor=json.dumps(self._places))


class _Gate:
    """Lets those lines through that come after a place; where its line isn't found, those with a later stamp."""

    def __init__(self, place: Place | None) -> None:
        self._place = place
        self._held: list[Numbered] = []

    def take(self, line: LogLine, count: int) -> Sequence[Numbered]:
        if self._place is None:
            return ((line, count),)
        attempt, stamp, _ = self._place
        if line.attempt < attempt:
            return ()
        if (line.attempt, line.time, count) == self._place:
            self._place, self._held = None, []
            return ()
        self._held.append((line, count))
        return self.rest() if line.attempt > attempt or (line.time or 0.0) > stamp + SLACK_S else ()

    def rest(self) -> Sequence[Numbered]:
        """Nothing is held back any more."""
        place, held = self._place, self._held
        self._place, self._held = None, []
        return [(line, count) for line, count in held if place and (line.attempt, line.time or 0.0, count) > place]


def read_head(lines: Iterable[tuple[float, LogLine]]) -> Head:
    """lines: each with the platform's stamp in Unix seconds, and without time if the runner did not write it."""
    first, spoken, read = None, False, 0
    for read, (stamp, line) in enumerate(itertools.islice(lines, HEAD), 1):  # noqa: B007
        if first is None or (not spoken and line.time is not None):
            first, spoken = timed(line, stamp), line.time is not None
        hello = _HELLO.match(line.text) if spoken and line.rank == "-" else None
        if hello:
            return Head(int(hello[1]), int(hello[2] or 1), first, spoken=True, enough=True)
        if line.rank != "-":  # the runner says hello before any command prints: the beginning is gone
            return Head(0, 1, first, spoken, enough=True)
    return Head(0, 1, first, spoken, enough=read >= HEAD)


def timed(line: LogLine, stamp: float) -> LogLine:
    """With the platform's stamp if the runner gave none: then its rank is not the runner's either."""
    return replace(line, time=stamp, rank="0") if line.time is None else line


def _with_times(lines: Iterable[LogLine]) -> Iterator[LogLine]:
    """Of log files: a line without a time has that of the one before it."""
    last: dict[int, float] = {}
    for line in lines:
        when = last.get(line.node, 0.0) if line.time is None else line.time
        last[line.node] = when
        yield replace(line, time=when, cursor="")


def _cut(stored: Sequence[LogLine], head: Head) -> tuple[Sequence[LogLine], int]:
    """(the lines before a piece's first one, its attempt), where the piece does not say which it is."""
    first = head.first
    same = (line for line in enumerate(stored) if first and _words(line[1]) == _words(first))
    at, found = next(same, (len(stored), None))
    if found:
        return stored[:at], found.attempt
    before = [line for line in stored if not first or (line.time or 0.0) < (first.time or 0.0)]
    attempt = before[-1].attempt if before else 0
    return before, max(attempt if head.spoken and head.enough else attempt + 1, 1)


def _words(line: LogLine) -> tuple[float | None, str, str]:
    return line.time, line.rank, line.text


def _numbered(lines: Iterable[LogLine]) -> Iterator[Numbered]:
    counts: dict[float, int] = {}
    attempt = 0
    for line in lines:
        if line.attempt != attempt:
            counts, attempt = {}, line.attempt
        yield line, _count(counts, line.time)


def _count(counts: dict[float, int], stamp: float | None) -> int:
    """Which one with this stamp it is; only the last stamps are kept."""
    key = stamp or 0.0
    counts[key] = counts.pop(key, 0) + 1
    if len(counts) > _COUNTED:
        del counts[next(iter(counts))]
    return counts[key]


def _places(cursor: str) -> dict[int, Place]:
    try:
        found = json.loads(cursor) if cursor else {}
        return {int(node): (int(a), float(stamp), int(n)) for node, (a, stamp, n) in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{cursor!r} is no place in these logs: take the cursor of one of their lines") from error
