"""What the runner moves to the output store: segments while it runs, whole files at the end.

Append-only files (metrics, logs) leave as segments of whole lines (sync.py says how they are named); other files
leave once when they are new and again at the end if they changed; a checkpoint leaves when it is complete, its
`complete.json` last. A store that fails in mid-run is warned about once and tried again. A file that can't leave,
whatever the store does, is warned about once and makes the upload incomplete; the others leave.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from launcher import contract
from launcher.contract import COMPLETE, METRICS, SEGMENTS
from launcher.errors import IntegrityError, SpecError
from launcher.stores import Store, check_path
from launcher.sync import read_appended, segment_path

__all__ = ["Pace", "Uploader"]

_APPENDED = (METRICS, f"{contract.LOGS}/*.log")
_LEFT_OUT = (contract.RESULT, "output/exit.json")
"""result.json is written when all else has left; exit.json is between the command and the runner."""
_SEGMENT_SIZE = 8 << 20
_OF_ONE_FILE = (IntegrityError, OSError, SpecError)
"""Its name, its permissions, its length: no second try helps. All else is the store's."""
_ODD_FILES_SAID = 10
_FAILURES_IN_A_ROW = 3
"""After so many the store is taken to be away."""

_Step = tuple[str, Callable[[], None]]
"""Path, relative to home, and what sends it."""


@dataclass(frozen=True)
class Pace:
    """Seconds, and writes unwatched: `burst` at once, then as many as add up to `puts_a_day` on the first day.

    With the heartbeats that is less than 3,000 a day.
    """

    quick_s: float = 5.0
    slow_s: float = 60.0
    longest_back_off_s: float = 300.0
    settled_s: float = 2.0
    puts_a_day: int = 2200
    burst: int = 600


@dataclass
class _Budget:
    """A token bucket. It may be overdrawn by one checkpoint, never by segments."""

    pace: Pace
    clock: Callable[[], float]
    tokens: float = 0.0
    at: float = 0.0

    def __post_init__(self) -> None:
        self.tokens, self.at = float(self.pace.burst), self.clock()

    def spend(self) -> None:
        self.tokens -= 1

    def afford(self) -> bool:
        now = self.clock()
        refill = (self.pace.puts_a_day - self.pace.burst) / 86400
        self.tokens, self.at = min(self.tokens + (now - self.at) * refill, self.pace.burst), now
        return self.tokens >= 1


@dataclass
class _Appended:
    """How far a growing file has left. end: of the segment that is being sent, which may have arrived unnoticed."""

    offset: int
    end: int


@dataclass
class _Sent:
    """What the store has: path → (size, mtime) of files, steps of complete checkpoints that also stood here."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    appended: dict[str, _Appended] = field(default_factory=dict)
    steps: set[str] = field(default_factory=set)


class Uploader:
    """Sends what stands in `home` to `store`, with `where` before every path (`nodes/1/` for the second node).

    folders: of OUTPUT_FOLDERS, those that the runner moves. without: a folder in them that it doesn't.
    restored: path → bytes of growing files that the store has from earlier attempts. Use `start` and `finish`;
    `round` and `send_all` are their single steps.
    """

    def __init__(
        self,
        home: Path,
        store: Store,
        folders: Collection[str],
        *,
        where: str = "",
        without: str = "",
        quick: Callable[[], bool] = lambda: True,
        watched: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
        restored: Mapping[str, int] | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home, self._store, self._folders, self._where = home, store, folders, where
        self._without = f"{without}/" if without else ""
        self._quick, self._watched, self._say, self._clock = quick, watched, say, clock
        self._pace = pace or Pace()
        self._budget = _Budget(self._pace, clock)
        self._sent = _Sent(appended={path: _Appended(size, size) for path, size in (restored or {}).items()})
        self._failures = 0
        self._odd: set[str] = set()
        self._ending, self._give_up, self.done = threading.Event(), threading.Event(), threading.Event()
        self.complete = False
        self.progress_at = clock()
        """When something last reached the store."""

    # -- the thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def finish(self) -> None:
        """Starts the last round; `done` is set when it has ended, `complete` says how."""
        self._ending.set()

    def give_up(self) -> None:
        self._give_up.set()

    def _run(self) -> None:
        last = self._clock()
        while not self._ending.wait(self._pace.quick_s):
            if self._clock() - last >= self._interval():
                self.guarded_round()
                last = self._clock()
        try:
            self.complete = self.send_all()
        except Exception as error:
            self._say(f"the upload broke off: {error!r}")
        finally:
            self.done.set()

    def _interval(self) -> float:
        if self._failures:
            return min(self._pace.quick_s * 2.0**self._failures, self._pace.longest_back_off_s)
        return self._pace.quick_s if self._quick() else self._pace.slow_s

    def guarded_round(self) -> None:
        """A round whose failure is said once and leaves the training alone."""
        try:
            self.round()
        except Exception as error:  # whatever the store's library throws, the training goes on
            if not self._failures:
                self._say(f"the output store fails, the run goes on and tries again: {error}")
            self._failures += 1
        else:
            if self._failures:
                self._say("the output store answers again")
            self._failures = 0

    # -- while the run goes on ----------------------------------------------------------------------------------------

    def round(self) -> None:
        """Sends what is new. Raises what the store raises; what has left is not sent again."""
        self._send_checkpoints()
        for path in self._appended_files():
            self._try(path, partial(self._send_segments, path))
        for path in self._whole_files():
            if path not in self._sent.files and self._settled(path) and self._may_put():
                self._try(path, partial(self._send_file, path))

    def _try(self, path: str, send: Callable[[], None]) -> bool:
        """False if this file can't be sent, which is said once. Raises what the store raises."""
        try:
            send()
        except _OF_ONE_FILE as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(self._home / path):  # removed meanwhile
                return True
            self._say_odd(path, error)
            return False
        return True

    def _say_odd(self, path: str, error: Exception) -> None:
        if path not in self._odd and len(self._odd) < _ODD_FILES_SAID:
            self._say(f"not uploaded, the others are: {error}")
        self._odd.add(path)

    def _may_put(self) -> bool:
        return self._watched() or self._budget.afford()

    def _put(self, path: str, file: Path) -> None:
        """OSError if the file can't be read, which stores tell in other ways."""
        file.open("rb").close()
        self._put_as(self._where + path, file)

    def _put_as(self, path: str, data: bytes | Path) -> None:
        self._store.write(path, data)
        self.progress_at = self._clock()
        if not self._watched():
            self._budget.spend()

    def _settled(self, path: str) -> bool:
        """Whether nobody has written to it for a moment: half a file is no use to anyone."""
        facts = self._facts(path)
        return facts is not None and time.time() - facts.st_mtime >= self._pace.settled_s

    def _facts(self, path: str) -> os.stat_result | None:
        try:
            return (self._home / path).stat()
        except OSError:
            return None

    def _send_file(self, path: str) -> None:
        facts = (self._home / path).stat()
        self._put(path, self._home / path)
        self._sent.files[path] = (facts.st_size, facts.st_mtime_ns)

    def _changed(self, path: str) -> bool:
        facts = self._facts(path)
        return facts is not None and self._sent.files.get(path) != (facts.st_size, facts.st_mtime_ns)

    def _send_segments(self, path: str) -> None:
        state = self._sent.appended.setdefault(path, _Appended(0, 0))
        full = self._home / path
        if full.stat().st_size < state.offset:  # somebody cut it: no segment fits now; the whole file at the end will
            state.offset = sys.maxsize
            return
        while self._may_put() and (block := _next_block(full, state)):
            state.end = state.offset + len(block)
            self._put_as(segment_path(self._where + path, state.offset), block)
            state.offset = state.end

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _send_checkpoints(self) -> None:
        """Newest first; then those that the command removed leave the store too, if a newer one is there."""
        steps = self._complete_steps()
        for step in steps:
            if step not in self._sent.steps and self._may_put():
                self._try(f"checkpoints/{step}", partial(self._send_checkpoint, step))
        newest = max(self._sent.steps, key=int, default="")
        for step in self._sent.steps - set(steps) - {newest}:
            self._delete_checkpoint(step)

    def _complete_steps(self) -> list[str]:
        folder = self._home / "checkpoints"
        if "checkpoints" not in self._folders or not folder.is_dir():
            return []
        steps = [p.name for p in folder.iterdir() if p.name.isdecimal() and (p / COMPLETE).is_file()]
        return sorted(steps, key=int, reverse=True)

    def _send_checkpoint(self, step: str) -> None:
        """All of it or, if the store can't hold one of its names, none."""
        folder = self._home / "checkpoints" / step
        try:
            names = [check_path(name) for name in sorted(json.loads((folder / COMPLETE).read_text())["files"])]
            for name in [*names, COMPLETE]:
                self._put(f"checkpoints/{step}/{name}", folder / name)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # removed, or damaged
            return
        self._sent.steps.add(step)

    def _delete_checkpoint(self, step: str) -> None:
        """complete.json first: without it, it does not exist."""
        prefix = f"{self._where}checkpoints/{step}"
        self._store.delete([f"{prefix}/{COMPLETE}"])
        self._store.delete([entry.path for entry in self._store.list(prefix)])
        self._sent.steps.discard(step)

    def keep(self, step: str) -> None:
        """Says that the store has this checkpoint, so that it isn't sent again."""
        self._sent.steps.add(step)

    # -- files --------------------------------------------------------------------------------------------------------

    def _whole_files(self) -> Iterator[str]:
        """Files of output/ and model/ that aren't append-only; the model first."""
        for name in ("model", "output"):
            if name not in self._folders:
                continue
            for path in sorted((self._home / name).rglob("*")):
                relative = path.relative_to(self._home).as_posix()
                if not self._left_out(relative) and not _is_appended(relative) and _is_whole(path):
                    yield relative

    def _left_out(self, path: str) -> bool:
        return path in _LEFT_OUT or bool(self._without and path.startswith(self._without))

    def _appended_files(self) -> list[str]:
        if "output" not in self._folders:
            return []
        found = [p for pattern in _APPENDED for p in self._home.glob(pattern) if p.is_file()]
        return sorted(p.relative_to(self._home).as_posix() for p in found)

    # -- at the end ---------------------------------------------------------------------------------------------------

    def send_all(self) -> bool:
        """Everything, newest checkpoint first; False if something could not leave, or it had to be given up."""
        steps, whole, back_off = list(self._last_steps()), True, 1.0
        while steps and not self._give_up.is_set():
            left, sent = self._pass(steps)
            whole = whole and sent
            if left:
                back_off = 1.0 if len(left) < len(steps) else min(2 * back_off, 30.0)
                self._give_up.wait(back_off)
            steps = left
        return whole and not steps

    def _last_steps(self) -> Iterator[_Step]:
        newest, *older = [step for step in self._complete_steps() if step not in self._sent.steps] or [""]
        if newest:
            yield f"checkpoints/{newest}", partial(self._send_checkpoint, newest)
        for path in self._appended_files():
            yield path, partial(self._join, path)
        for path in self._whole_files():
            if self._changed(path):
                yield path, partial(self._send_file, path)
        for step in older:
            yield f"checkpoints/{step}", partial(self._send_checkpoint, step)
        yield "checkpoints", self._send_checkpoints
        if "output" in self._folders:
            yield contract.LOGS, self._join_earlier

    def _pass(self, steps: Sequence[_Step]) -> tuple[list[_Step], bool]:
        """(what the store did not take, whether all else has left). One bad apple doesn't hold up those after it."""
        left: list[_Step] = []
        whole, failures = True, 0
        for number, (path, send) in enumerate(steps):
            if failures == _FAILURES_IN_A_ROW or self._give_up.is_set():
                return [*left, *steps[number:]], whole
            try:
                whole = self._try(path, send) and whole
                failures = 0
            except Exception as error:  # as in guarded_round
                self._say_failure(error)
                left.append((path, send))
                failures += 1
        return left, whole

    def _say_failure(self, error: Exception) -> None:
        if not self._failures:
            self._say(f"the output store fails, trying again: {error}")
        self._failures += 1

    def _join(self, path: str) -> None:
        """The whole file, then away with its segments: a reader finds the one or the other."""
        self._put(path, self._home / path)
        self._store.delete([entry.path for entry in self._store.list(f"{SEGMENTS}/{self._where}{path}")])

    def _join_earlier(self) -> None:
        """Logs of attempts of this node that died before they could."""
        found: dict[str, list[str]] = {}
        for entry in self._store.list(f"{SEGMENTS}/{self._where}{contract.LOGS}"):
            path = entry.path.removeprefix(f"{SEGMENTS}/").rpartition("/")[0]
            found.setdefault(path, []).append(entry.path)
        for path, segments in found.items():
            if self._store.head(path) is None:
                self._put_as(path, read_appended(self._store, path)[0])
            self._store.delete(segments)


def _next_block(file: Path, state: _Appended) -> bytes:
    """Whole lines from `state.offset` on; what was tried before is tried again as it was, as readers may have it."""
    again = state.end - state.offset
    with file.open("rb") as opened:
        opened.seek(state.offset)
        data = opened.read(again or _SEGMENT_SIZE)
    lines = data if again else data[: data.rfind(b"\n") + 1]
    return lines or (data if len(data) == _SEGMENT_SIZE else b"")


def _is_appended(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _APPENDED)


def _is_whole(path: Path) -> bool:
    if path.name.endswith(".part") or contract.is_marker(path.name):
        return False
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a folder can't be entered
