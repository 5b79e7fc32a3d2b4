"""Logs of a training job from CloudWatch, and from the output store what CloudWatch has no more, or not for us.

Each start of an instance has a stream, `<job>/algo-<number>-<epoch>`, that is there once the container has written; an
event is a line. CloudWatch cuts what is longer than it keeps in one event (256 KB; the runner cuts lines at 64 KiB):
the rest then is a line of its own, without the runner's tag. Lines that no runner tagged have the time of their event.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.backends.base import LogLine
from launcher.errors import AuthError, CvlaunchError, SpecError, UnreachableError
from launcher.logfiles import parse_line
from launcher.logplaces import HEAD, SLACK_S, Head, Numbered, Piece, Reading, StaleError, read_head, timed
from launcher.sagemaker.client import LOG_GROUP, Account, Json, MissingError
from launcher.stores import Store

__all__ = ["run_logs"]


_PAGE = 10_000
"""The most events of a page; it also ends at 1 MB."""
_SLOWER, _SLOWEST = 1.5, 5
"""While nothing comes, each pause is so many times the one before, up to so many times the first."""
_A_STREAM_S = 0.3
"""Pause for each stream that grows: an account has 10 GetLogEvents a second, and new lines take two."""
_LOOK_S, _SELDOM_S = 5.0, 30.0
"""Between two looks for new streams; the longer one while lines come from all nodes."""
_GRACE_S = 5.0
"""CloudWatch may show the last lines so long after a job's end."""
_TROUBLES = 3
"""So many rounds in a row that fail are borne; each call has been made several times by then."""
_DENIED = ("AccessDenied", "AccessDeniedException")
_STALE = "InvalidParameterException"
"""Of a token from an earlier pass: they last 24 hours."""
_LAST_WORD = re.compile(r"[A-Z_]+, exit code -?\d+")


def run_logs(
    account: Account,
    job_name: str,
    store: Callable[[], Store | None],
    *,
    ended: Callable[[], bool] | None = None,
    since: str = "",
    has_runner: bool = True,
    sleep: Callable[[float], None] = time.sleep,
    every: float = 2.0,
    page: int = _PAGE,
) -> Iterator[LogLine]:
    """All lines there are, node by node; with `ended`, on until it is true, as they appear.

    store: the run's folder, asked for only where CloudWatch doesn't have it all or may not be asked (then it serves
    alone); None where there is none. since: the cursor of a LogLine, to go on after it. has_runner: False for a job
    that does not print the runner's tagged lines, and has no log file; otherwise lines wait until the runner has said
    which attempt it is.
    """
    streams = _Streams(account, job_name, store, since=since, has_runner=has_runner, page=page)
    try:
        yield from _lines(streams, ended, sleep, every)
    except AuthError as error:
        folder = store() if has_runner and _refusal(error) in _DENIED else None
        if folder is None:
            raise
        found = bool(since)
        for line in streams.reading.of_store(folder, ended=ended, sleep=sleep, every=every):
            found = True
            yield line
        if not found:  # nothing at all would say nothing of why
            raise


def _lines(
    streams: _Streams, ended: Callable[[], bool] | None, sleep: Callable[[float], None], every: float
) -> Iterator[LogLine]:
    pause, grace, troubles = every, 0.0, 0
    while True:
        over = ended is None or ended()
        last = over and (grace <= 0 or streams.said_all)
        found = False
        try:
            for line in streams.new_lines(live=not last):
                found = True
                yield line
            troubles = 0
        except UnreachableError:
            troubles += 1
            if ended is None or troubles > _TROUBLES:
                raise
        if last and not troubles:
            break
        if over and streams.said_all and not troubles:
            continue
        pause = every if found or over else min(pause * _SLOWER, every * _SLOWEST)
        pause = max(pause, streams.growing * _A_STREAM_S)
        streams.unseen_s += pause
        grace = grace - pause if over else _GRACE_S
        sleep(pause)
    yield from streams.torn(over=ended is not None)


@dataclass
class _Stream:
    """name: in the group. token: where to go on, in what has come since `since` (Unix ms)."""

    name: str
    started: int
    since: int | None = None
    token: str | None = None
    last: LogLine | None = None

    @property
    def closed(self) -> bool:
        """The runner has said its last word."""
        last = self.last
        return last is not None and last.rank == "-" and bool(_LAST_WORD.match(last.text))


_Piece = Piece[_Stream]


class _Streams:
    """The streams of a job, by node, the oldest first. unseen_s: how long ago new ones were looked for."""

    def __init__(
        self,
        account: Account,
        job_name: str,
        store: Callable[[], Store | None],
        *,
        since: str,
        has_runner: bool,
        page: int,
    ) -> None:
        self._account, self._job, self._has_runner, self._page = account, job_name, has_runner, page
        self._name = re.compile(rf"{re.escape(job_name)}/algo-(\d+)-(\d+)")
        self._nodes: dict[int, list[_Piece]] = {}
        self._silent = True
        self.reading = Reading(self, store, since=since, broken=(MissingError,))
        self.unseen_s = float("inf")

    @property
    def growing(self) -> int:
        return sum(piece.live for pieces in self._nodes.values() for piece in pieces)

    @property
    def said_all(self) -> bool:
        """Each node's runner has said its last word; of other jobs nobody knows."""
        last = [pieces[-1] for pieces in self._nodes.values()]
        return len(last) == self.reading.size and all(piece.has_runner and piece.of.closed for piece in last)

    def new_lines(self, *, live: bool) -> Iterator[LogLine]:
        """What has come since last time. live: the job goes on."""
        if not live or self.unseen_s >= (_LOOK_S if self._silent else _SELDOM_S):
            self._look()
        self.reading.begin_round(self._nodes)
        self._silent = len(self._nodes) < self.reading.size
        for _, pieces in sorted(self._nodes.items()):
            for piece in pieces:
                piece.live = live and piece is pieces[-1]
            silent = True
            for line in self.reading.of_node(pieces, live=live):
                silent = False
                yield line
            self._silent = self._silent or silent

    def torn(self, *, over: bool) -> Iterator[LogLine]:
        """From the store, of runners that did not say their last word here. over: nothing will come any more."""
        for pieces in self._nodes.values():
            last = pieces[-1]
            last.clean = last.clean and (last.of.closed or not (over and last.has_runner))
        self.reading.begin_round(self._nodes)
        yield from self.reading.torn(self._nodes, over=over)

    def _look(self) -> None:
        known = {piece.of.name for pieces in self._nodes.values() for piece in pieces}
        for name in self._names():
            match = self._name.fullmatch(name)
            if match and name not in known:
                node = int(match[1]) - 1
                piece = Piece(_Stream(name, int(match[2])), node, self._has_runner, begun=True)
                self._nodes.setdefault(node, []).append(piece)
                self._nodes[node].sort(key=lambda piece: piece.of.started)
        self.unseen_s = 0.0

    def _names(self) -> list[str]:
        where = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{self._job}/"}
        try:
            found = list(self._account.pages("logs", "describe_log_streams", "logStreams", **where))
        except MissingError:  # nor is the group there before somebody writes
            return []
        return [stream["logStreamName"] for stream in found]

    # -- one stream ---------------------------------------------------------------------------------------------------

    def head(self, piece: _Piece) -> Head:
        begin = _Stream(piece.of.name, piece.of.started)
        return read_head(self._lines(piece, begin, limit=min(HEAD, self._page)))

    def window(self, piece: _Piece, since: float | None) -> Iterator[Numbered]:
        """Page by page: one that fails is asked for again where it stands."""
        piece.recount()
        piece.of.token = None
        piece.of.since = None if since is None else max(int((since - SLACK_S) * 1000), 0)
        return self.new(piece)

    def new(self, piece: _Piece) -> Iterator[Numbered]:
        for stamp, line in self._lines(piece, piece.of, limit=self._page):
            piece.of.last = line
            yield piece.numbered(timed(line, stamp))

    def _lines(self, piece: _Piece, stream: _Stream, *, limit: int) -> Iterator[tuple[float, LogLine]]:
        """(time of the event in Unix seconds, line, without time if no runner wrote it), up to the last."""
        known = stream.token
        while True:
            try:
                answer = self._ask(stream, limit)
            except SpecError as error:
                if known and stream.token == known and _refusal(error) == _STALE:
                    raise StaleError from error
                raise
            for event in answer["events"]:
                text = event["message"].removesuffix("\n")
                yield event["timestamp"] / 1000, parse_line(text, attempt=piece.attempt, node=piece.node)
            if answer["nextForwardToken"] == stream.token:
                return
            stream.token = answer["nextForwardToken"]

    def _ask(self, stream: _Stream, limit: int) -> Json:
        where: dict[str, Any] = {"logGroupName": LOG_GROUP, "logStreamName": stream.name, "startFromHead": True}
        if stream.since is not None:
            where["startTime"] = stream.since
        if stream.token is not None:
            where["nextToken"] = stream.token
        return self._account.call("logs", "get_log_events", limit=limit, **where)


def _refusal(error: CvlaunchError) -> str:
    """The code of what AWS said no with."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
