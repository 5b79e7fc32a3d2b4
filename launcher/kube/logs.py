"""Logs of a run from its pods, and from the output store for pods that are gone.

The runner prints the lines of its log file, stamps included, so that both are one text and a place in it is the same in
both: attempt, stamp, and how many lines with that stamp. Lines of a pod in which no runner spoke have kubelet's stamps.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from launcher.backends.base import LogLine
from launcher.errors import SpecError, UnreachableError
from launcher.kube import words
from launcher.kube.client import Cluster, CutError
from launcher.logfiles import follow_logs, parse_line
from launcher.stores import Store

__all__ = ["run_logs"]

_STREAM_S = 60.0
"""A stream that is so old is asked for again, and the pods are looked at."""
_SLACK_S = 5.0
"""How far stamps may stand out of order: threads of the runner, and kubelet's own stamp, which is a little later."""
_PATIENCE_S = 60.0
_HEAD = 200
"""Within so many lines the runner says which attempt it is."""
_COUNTED = 1000
_CUTS = 3
"""So many in a row, with nothing in between, are borne."""
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_NOT_YET = r"waiting to start|ContainerCreating|PodInitializing|not found|is not available|previous terminated"

_Place = tuple[int, float, int]
"""Attempt, stamp in Unix seconds, and which of the lines with this stamp, 1 the first."""
_Numbered = tuple[LogLine, int]
_How = ParamSpec("_How")
_What = TypeVar("_What")


def run_logs(
    cluster: Cluster,
    run_id: str,
    store: Callable[[], Store | None],
    *,
    ended: Callable[[], bool] | None = None,
    since: str = "",
    sleep: Callable[[float], None] = time.sleep,
    every: float = 1.0,
    silence_s: float = 10.0,
) -> Iterator[LogLine]:
    """All lines there are, node by node; with `ended`, on until it is true.

    store: the run's folder, asked for only where pods don't have it all; None where it is not known any more.
    since: the cursor of a LogLine, to go on after it. silence_s: after which a stream is asked for again, since some
    never go on when kubelet has begun a new file.
    """
    reading = _Reading(cluster, run_id, store, since=since, silence_s=silence_s)
    while True:
        over = ended is not None and ended()
        found = False
        for line in reading.new_lines(live=ended is not None and not over, over=over):
            found = True
            yield line
        if over or ended is None:
            return
        if not (found and reading.streams):
            sleep(every)


@dataclass(frozen=True)
class _Head:
    """The beginning of a container's log.

    attempt: as the runner says, 0 if it does not. first: its first line, the first of all if it has not spoken.
    enough: no later line will tell more.
    """

    attempt: int = 0
    first: LogLine | None = None
    spoken: bool = False
    enough: bool = False


@dataclass
class _Piece:
    """The log of one start of a container. last, same: kubelet's latest stamp in µs, and how many lines have it.

    attempt: 0 is not known yet. stamps: of the lines read, and how many there were of each; lost: the same of those
    that the log had before. before: lines that come first, from the store. reached: where we stopped. done: nothing
    more will be read. clean: all has been read.
    """

    pod: str
    container: str
    node: int
    start: int
    has_runner: bool
    begun: bool = False
    live: bool = False
    previous: bool = False
    attempt: int = 0
    last: int = 0
    same: int = 0
    stamps: dict[float, int] = field(default_factory=dict)
    lost: dict[float, int] = field(default_factory=dict)
    before: Sequence[_Numbered] = ()
    reached: _Place | None = None
    done: bool = False
    clean: bool = False

    def read(self, stamp: int, seen: tuple[int, int]) -> bool:
        """Counts a line; False if it was there before. seen: the last stamp then, and how many lines had it."""
        if stamp >= self.last:
            self.same = self.same + 1 if stamp == self.last else 1
            self.last = stamp
        return stamp > seen[0] or (stamp == seen[0] and self.same > seen[1])

    def forget(self) -> None:
        self.last, self.same, self.stamps = 0, 0, dict(self.lost)

    def close(self) -> None:
        """After a reading to the end; a log that is empty has been lost, as runners never say nothing."""
        self.clean = self.live or self.last > 0 or not self.has_runner
        self.done = not self.live


class _Reading:
    """What was read so far, by node and container. streams: new lines come as they are printed, not at each look."""

    def __init__(
        self, cluster: Cluster, run_id: str, store: Callable[[], Store | None], *, since: str, silence_s: float
    ) -> None:
        self._cluster, self._run_id, self._store, self._silence_s = cluster, run_id, store, silence_s
        self._hello = re.compile(rf"{re.escape(run_id)}, attempt (\d+)(?:, node \d+ of (\d+))?")
        self._places = _places(since)
        self._pieces: dict[tuple[str, int], _Piece] = {}
        self._size = 1
        self.streams = False
        self._stored: dict[int, list[LogLine]] | None = None

    def new_lines(self, *, live: bool, over: bool) -> Iterator[LogLine]:
        """What has come since last time. live: waits for more of what runs. over: nothing will come any more."""
        self._stored = None
        nodes = self._look()
        self.streams = live and sum(piece.live for pieces in nodes.values() for piece in pieces) == self._size == 1
        for _, pieces in sorted(nodes.items()):
            yield from self._of_pods(pieces, live=live)
        if not live:
            for node in self._torn(nodes, over=over):
                yield from self._give(node, self._beyond(node, _numbered(self._from_store(over).get(node, ()))))

    def _torn(self, nodes: Mapping[int, Sequence[_Piece]], *, over: bool) -> list[int]:
        """Nodes whose last lines are in the store alone."""
        if not nodes:
            return sorted(self._from_store(over))
        begun = {node: [piece for piece in pieces if piece.begun] for node, pieces in nodes.items()}
        return sorted(set(range(self._size)) - {node for node, pieces in begun.items() if pieces and pieces[-1].clean})

    # -- pods ---------------------------------------------------------------------------------------------------------

    def _look(self) -> dict[int, list[_Piece]]:
        """By node, the oldest first."""
        path, labels = self._cluster.path("pods"), f"{words.RUN_ID}={self._run_id}"
        pods = sorted(self._cluster.list(path, labels=labels), key=_age)
        nodes: dict[int, list[_Piece]] = {}
        for pod in pods:
            nodes.setdefault(words.completion_index(pod), []).extend(self._pieces_of(pod))
        self._size = max([self._size, *(node + 1 for node in nodes)])
        return nodes

    def _pieces_of(self, pod: Mapping[str, Any]) -> Iterator[_Piece]:
        """Of the last two starts of its container; kubelet keeps no more."""
        status = words.main_container(pod)
        state, now = status.get("state") or {}, int(status.get("restartCount") or 0)
        name, container = pod["metadata"]["name"], status.get("name", words.CONTAINER)
        has_runner = bool(pod["spec"]["containers"][0].get("command"))
        over = pod["status"].get("phase") in ("Failed", "Succeeded")
        for start in range(max(now - 1, 0), now + 1):
            fresh = _Piece(name, container, words.completion_index(pod), start, has_runner)
            piece = self._pieces.setdefault((pod["metadata"]["uid"], start), fresh)
            piece.previous = start < now
            piece.begun = piece.previous or over or "running" in state or "terminated" in state
            piece.live = not piece.previous and "running" in state
            yield piece

    def _of_pods(self, pieces: Sequence[_Piece], *, live: bool) -> Iterator[LogLine]:
        earlier = None
        for piece in pieces:
            if piece.begun and not piece.done:
                try:
                    if not piece.attempt and not self._begin(piece, earlier, live=live):
                        return
                    yield from self._more(piece, stream=self.streams and piece.live)
                except (CutError, _AwayError):
                    piece.clean, piece.done = False, not piece.live
            earlier = piece if piece.begun else earlier

    def _begin(self, piece: _Piece, earlier: _Piece | None, *, live: bool) -> bool:
        """Finds its attempt and what stands before it; False if the runner hasn't said yet which attempt it is."""
        head = _uncut(self._head, piece)
        if live and piece.live and not head.enough:
            return False
        before, piece.attempt = self._before(piece, head, earlier)
        piece.before = list(_numbered(before))
        piece.lost = {line.time or 0.0: count for line, count in piece.before if line.attempt == piece.attempt}
        piece.forget()
        return True

    def _head(self, piece: _Piece) -> _Head:
        if not piece.has_runner:
            return _Head(enough=True)
        first, spoken, read = None, False, 0
        for read, (stamp, line) in enumerate(itertools.islice(self._fetch(piece), _HEAD), 1):  # noqa: B007
            if first is None or (not spoken and line.time is not None):
                first, spoken = _timed(line, stamp), line.time is not None
            hello = self._hello.match(line.text) if spoken and line.rank == "-" else None
            if hello:
                self._size = max(self._size, int(hello[2] or 1))
            if hello or line.rank != "-":  # the runner says hello before any command prints: the beginning is gone
                return _Head(int(hello[1]) if hello else 0, first, spoken, True)
        return _Head(0, first, spoken, read >= _HEAD)

    def _before(self, piece: _Piece, head: _Head, earlier: _Piece | None) -> tuple[Sequence[LogLine], int]:
        """(lines of earlier pods and of this one that are in the store alone, attempt)."""
        expected = earlier.attempt + 1 if earlier else 1
        if not piece.has_runner or head.attempt == 1:
            return (), head.attempt or expected
        if earlier and earlier.clean and head.attempt in (0, expected):
            return (), expected
        stored = self._from_store().get(piece.node, [])
        if head.attempt:
            return [line for line in stored if line.attempt < head.attempt], head.attempt
        return _cut(stored, head)

    def _more(self, piece: _Piece, *, stream: bool) -> Iterator[LogLine]:
        """What the pod has beyond the place that we are at; of a stream, what comes until it is cut."""
        place = self._places.get(piece.node)
        if place and piece.attempt < place[0]:
            piece.last = piece.last or 1
            piece.close()
            return
        if place and piece.attempt == place[0] and place != piece.reached:
            lines = itertools.chain(piece.before, _uncut(self._window, piece, place[1]))
            yield from self._given(piece, self._beyond(piece.node, lines))
            piece.before, piece.reached = (), self._places[piece.node]
        else:
            yield from self._given(piece, self._beyond(piece.node, piece.before))
            piece.before = ()
            if not stream:
                yield from self._given(piece, self._all_new(piece))
        if stream:
            with contextlib.suppress(CutError):  # the next look asks again
                yield from self._given(piece, self._streamed(piece))
        else:
            piece.close()

    def _window(self, piece: _Piece, stamp: float) -> list[_Numbered]:
        """Lines from about this stamp on: all of them or none."""
        piece.forget()
        try:
            return list(self._new(piece, sinceTime=_rfc3339(stamp - _SLACK_S)))
        except BaseException:
            piece.forget()
            raise

    def _all_new(self, piece: _Piece) -> Iterator[_Numbered]:
        """To the end, in spite of cuts."""
        cuts, at = 0, (piece.last, piece.same)
        while True:
            try:
                return (yield from self._new(piece))
            except CutError:
                before, at = at, (piece.last, piece.same)
                cuts = cuts + 1 if at == before else 0
                if cuts > _CUTS:
                    raise

    def _streamed(self, piece: _Piece) -> Iterator[_Numbered]:
        until = time.monotonic() + _STREAM_S
        lines = self._new(piece, follow="true")
        with _closing(lines):
            for line in lines:
                yield line
                if time.monotonic() > until:
                    return

    def _new(self, piece: _Piece, **query: str) -> Iterator[_Numbered]:
        """Lines that were not read before. sinceTime has whole seconds, so that some come twice."""
        seen = piece.last, piece.same
        if piece.last:
            query.setdefault("sinceTime", _rfc3339(piece.last / 1e6))
        piece.last, piece.same = 0, 0
        try:
            for stamp, line in self._fetch(piece, **query):
                if piece.read(stamp, seen):
                    line = _timed(line, stamp)
                    yield line, _count(piece.stamps, line.time)
        finally:
            if (piece.last, piece.same) < seen:
                piece.last, piece.same = seen

    def _fetch(self, piece: _Piece, **query: str) -> Iterator[tuple[int, LogLine]]:
        """(kubelet's stamp in µs, line, without time if the runner did not write it).

        What has no stamp is kubelet's excuse for a log that is gone.
        """
        path = self._cluster.path("pods", piece.pod, "log")
        if piece.previous:
            query["previous"] = "true"
        asked = {"container": piece.container, "timestamps": "true", **query}
        silence_s = self._silence_s if "follow" in query else _PATIENCE_S
        lines = self._cluster.lines(path, silence_s=silence_s, **asked)
        with _closing(lines), _log_errors():
            for data in lines:
                stamp, _, text = data.decode(errors="replace").partition(" ")
                if _STAMP.fullmatch(stamp):
                    yield _micros(stamp), parse_line(text, attempt=piece.attempt, node=piece.node)

    # -- the store ----------------------------------------------------------------------------------------------------

    def _from_store(self, over: bool = False) -> dict[int, list[LogLine]]:
        """By node; read once in a round. over: with a last line that was cut off."""
        if self._stored is None:
            found: dict[int, list[LogLine]] = {}
            store = self._store()
            for line in follow_logs(store, ended=(lambda: True) if over else None) if store else ():
                lines = found.setdefault(line.node, [])
                before = lines[-1].time if lines else 0.0
                lines.append(replace(line, time=before, cursor="") if line.time is None else line)
            self._stored = found
        return self._stored

    # -- places -------------------------------------------------------------------------------------------------------

    def _beyond(self, node: int, lines: Iterable[_Numbered]) -> Iterator[_Numbered]:
        """Those after the place that we are at; where its line isn't found, those with a later stamp."""
        place = self._places.get(node)
        later = iter(lines)
        if place is not None:
            attempt, stamp, _ = place
            held = list[_Numbered]()
            for line, count in itertools.dropwhile(lambda item: item[0].attempt < attempt, later):
                if (line.attempt, line.time, count) == place:
                    held = []
                    break
                held.append((line, count))
                if line.attempt > attempt or (line.time or 0.0) > stamp + _SLACK_S:
                    break
            yield from ((line, count) for line, count in held if (line.attempt, line.time or 0.0, count) > place)
        yield from later

    def _given(self, piece: _Piece, lines: Iterable[_Numbered]) -> Iterator[LogLine]:
        for line in self._give(piece.node, lines):
            piece.reached = self._places[piece.node]
            yield line

    def _give(self, node: int, lines: Iterable[_Numbered]) -> Iterator[LogLine]:
        for line, count in lines:
            self._places[node] = line.attempt, line.time or 0.0, count
            yield replace(line, cursor=json.dumps(self._places))


class _AwayError(Exception):
    """The pod's node does not answer; were it the API itself, the next look at the pods would say so."""


@contextlib.contextmanager
def _log_errors() -> Iterator[None]:
    """A container that hasn't started, or has been started so often that its log is gone, is one without lines."""
    try:
        yield
    except CutError:
        raise
    except UnreachableError as error:
        raise _AwayError from error
    except SpecError as error:
        if not re.search(_NOT_YET, error.message):
            raise


@contextlib.contextmanager
def _closing(lines: Iterator[object]) -> Iterator[None]:
    """A generator that is left in the middle lets its connection go now."""
    try:
        yield
    finally:
        if isinstance(lines, Generator):
            lines.close()


def _uncut(read: Callable[_How, _What], *how: _How.args, **keys: _How.kwargs) -> _What:
    """What it gives once no connection breaks off."""
    for _ in range(_CUTS):
        with contextlib.suppress(CutError):
            return read(*how, **keys)
    return read(*how, **keys)


def _age(pod: Mapping[str, Any]) -> tuple[str, str]:
    return pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]


def _timed(line: LogLine, stamp: int) -> LogLine:
    """With kubelet's stamp, if the runner gave none."""
    return replace(line, time=stamp / 1e6) if line.time is None else line


def _cut(stored: Sequence[LogLine], head: _Head) -> tuple[Sequence[LogLine], int]:
    """(the lines before a pod's first one, the pod's attempt), where the pod does not say which it is."""
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


def _numbered(lines: Iterable[LogLine]) -> Iterator[_Numbered]:
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


def _places(cursor: str) -> dict[int, _Place]:
    try:
        found = json.loads(cursor) if cursor else {}
        return {int(node): (int(a), float(stamp), int(n)) for node, (a, stamp, n) in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{cursor!r} is no place in these logs: take the cursor of one of their lines") from error


def _micros(stamp: str) -> int:
    """Kubelet's stamps have nanoseconds, and the zone of its machine."""
    return round(datetime.fromisoformat(stamp).timestamp() * 1e6)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(max(seconds, 0.0) // 1, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
