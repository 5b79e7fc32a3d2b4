"""Logs of a run from its pods, and from the output store for pods that are gone.

The lines of a pod in which no runner spoke have kubelet's stamps.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from launcher.backends.base import LogLine
from launcher.errors import SpecError, UnreachableError
from launcher.kube import words
from launcher.kube.client import Cluster, CutError
from launcher.logfiles import parse_line
from launcher.logplaces import SLACK_S, Head, Numbered, Piece, Reading, read_head, timed
from launcher.stores import Store

__all__ = ["run_logs"]

_STREAM_S = 60.0
"""A stream that is so old is asked for again, and the pods are looked at."""
_PATIENCE_S = 60.0
_CUTS = 3
"""So many in a row, with nothing in between, are borne."""
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_NOT_YET = r"waiting to start|ContainerCreating|PodInitializing|not found|is not available|previous terminated"

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
    pods = _Pods(cluster, run_id, store, since=since, silence_s=silence_s)
    while True:
        over = ended is not None and ended()
        found = False
        for line in pods.new_lines(live=ended is not None and not over, over=over):
            found = True
            yield line
        if over or ended is None:
            return
        if not (found and pods.streams):
            sleep(every)


@dataclass
class _Start:
    """One start of a container. last, same: kubelet's latest stamp in µs, and how many lines have it."""

    pod: str
    previous: bool = False
    last: int = 0
    same: int = 0

    def read(self, stamp: int, seen: tuple[int, int]) -> bool:
        """Counts a line; False if it was there before. seen: the last stamp then, and how many lines had it."""
        if stamp >= self.last:
            self.same = self.same + 1 if stamp == self.last else 1
            self.last = stamp
        return stamp > seen[0] or (stamp == seen[0] and self.same > seen[1])


_Piece = Piece[_Start]


class _Pods:
    """The containers of a run. streams: new lines come as they are printed, not at each look."""

    def __init__(
        self, cluster: Cluster, run_id: str, store: Callable[[], Store | None], *, since: str, silence_s: float
    ) -> None:
        self._cluster, self._run_id, self._silence_s = cluster, run_id, silence_s
        self._reading = Reading(self, store, since=since, broken=(CutError, _AwayError))
        self._pieces: dict[tuple[str, int], _Piece] = {}
        self.streams = False

    def new_lines(self, *, live: bool, over: bool) -> Iterator[LogLine]:
        """What has come since last time. live: waits for more of what runs. over: nothing will come any more."""
        nodes = self._look()
        self._reading.begin_round(nodes)
        running = [piece for pieces in nodes.values() for piece in pieces if piece.live]
        self.streams = live and len(running) == self._reading.size == 1
        for _, pieces in sorted(nodes.items()):
            for piece in pieces:
                piece.streamed = self.streams and piece.live
            yield from self._reading.of_node(pieces, live=live)
        if not live:
            yield from self._reading.torn(nodes, over=over)

    def _look(self) -> dict[int, list[_Piece]]:
        """By node, the oldest first."""
        path, labels = self._cluster.path("pods"), f"{words.RUN_ID}={self._run_id}"
        pods = sorted(self._cluster.list(path, labels=labels), key=_age)
        nodes: dict[int, list[_Piece]] = {}
        for pod in pods:
            nodes.setdefault(words.completion_index(pod), []).extend(self._pieces_of(pod))
        return nodes

    def _pieces_of(self, pod: Mapping[str, Any]) -> Iterator[_Piece]:
        """Of the last two starts of its container; kubelet keeps no more."""
        status = words.main_container(pod)
        state, now = status.get("state") or {}, int(status.get("restartCount") or 0)
        name, has_runner = pod["metadata"]["name"], words.has_runner(pod)
        over = pod["status"].get("phase") in ("Failed", "Succeeded")
        for start in range(max(now - 1, 0), now + 1):
            fresh = Piece(_Start(name), words.completion_index(pod), has_runner)
            piece = self._pieces.setdefault((pod["metadata"]["uid"], start), fresh)
            piece.of.previous = start < now
            piece.begun = piece.of.previous or over or "running" in state or "terminated" in state
            piece.live = not piece.of.previous and "running" in state
            yield piece

    # -- one container ------------------------------------------------------------------------------------------------

    def head(self, piece: _Piece) -> Head:
        return _uncut(lambda: read_head((stamp / 1e6, line) for stamp, line in self._fetch(piece)))

    def window(self, piece: _Piece, since: float | None) -> list[Numbered]:
        """All of them or none."""
        return _uncut(self._window, piece, since)

    def _window(self, piece: _Piece, since: float | None) -> list[Numbered]:
        query = {} if since is None else {"sinceTime": _rfc3339(since - SLACK_S)}
        _forget(piece)
        try:
            return list(self._unread(piece, **query))
        except BaseException:
            _forget(piece)
            raise

    def new(self, piece: _Piece) -> Iterable[Numbered]:
        return self._streamed(piece) if piece.streamed else self._all_new(piece)

    def _all_new(self, piece: _Piece) -> Iterator[Numbered]:
        """To the end, in spite of cuts."""
        start = piece.of
        cuts, at = 0, (start.last, start.same)
        while True:
            try:
                return (yield from self._unread(piece))
            except CutError:
                before, at = at, (start.last, start.same)
                cuts = cuts + 1 if at == before else 0
                if cuts > _CUTS:
                    raise

    def _streamed(self, piece: _Piece) -> Iterator[Numbered]:
        """Until it is cut, or old; the next look asks again."""
        until = time.monotonic() + _STREAM_S
        lines = self._unread(piece, follow="true")
        with _closing(lines), contextlib.suppress(CutError):
            for line in lines:
                yield line
                if time.monotonic() > until:
                    return

    def _unread(self, piece: _Piece, **query: str) -> Iterator[Numbered]:
        """Lines that were not read before. sinceTime has whole seconds, so that some come twice."""
        start = piece.of
        seen = start.last, start.same
        if start.last:
            query.setdefault("sinceTime", _rfc3339(start.last / 1e6))
        start.last, start.same = 0, 0
        try:
            for stamp, line in self._fetch(piece, **query):
                if start.read(stamp, seen):
                    yield piece.numbered(timed(line, stamp / 1e6))
        finally:
            if (start.last, start.same) < seen:
                start.last, start.same = seen

    def _fetch(self, piece: _Piece, **query: str) -> Iterator[tuple[int, LogLine]]:
        """(kubelet's stamp in µs, line, without time if the runner did not write it).

        What has no stamp is kubelet's excuse for a log that is gone.
        """
        path = self._cluster.path("pods", piece.of.pod, "log")
        if piece.of.previous:
            query["previous"] = "true"
        asked = {"container": words.CONTAINER, "timestamps": "true", **query}
        silence_s = self._silence_s if "follow" in query else _PATIENCE_S
        lines = self._cluster.lines(path, silence_s=silence_s, **asked)
        with _closing(lines), _log_errors():
            for data in lines:
                stamp, _, text = data.decode(errors="replace").partition(" ")
                if _STAMP.fullmatch(stamp):
                    yield _micros(stamp), parse_line(text, attempt=piece.attempt, node=piece.node)


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


def _forget(piece: _Piece) -> None:
    piece.recount()
    piece.of.last, piece.of.same = 0, 0


def _micros(stamp: str) -> int:
    """Kubelet's stamps have nanoseconds, and the zone of its machine."""
    return round(datetime.fromisoformat(stamp).timestamp() * 1e6)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(max(seconds, 0.0) // 1, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
