"""What the runner moves to the output store: segments while it runs, whole files at the end.

Append-only files (metrics, logs) leave as numbered segments of whole lines, `segments/<path>/seg-000000`; other files
leave once when they are new and again at the end if they changed; a checkpoint leaves when it is complete, its
`complete.json` last. A store that fails in mid-run is warned about once and tried again.
"""

from __future__ import annotations

import fnmatch
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher import contract
from launcher.contract import COMPLETE, METRICS, SEGMENTS
from launcher.stores import Store, is_part_file

__all__ = ["Pace", "Uploader"]

_APPENDED = (METRICS, f"{contract.LOGS}/*.log")
_LEFT_OUT = (contract.RESULT, "output/exit.json")
"""result.json is written when all else has left; exit.json is between the command and the runner."""
_SEGMENT_SIZE = 8 << 20


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
    """How far a growing file has left."""

    offset: int
    number: int


@dataclass
class _Sent:
    """What the store has: path → (size, mtime) of files, steps of complete checkpoints that also stood here."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    appended: dict[str, _Appended] = field(default_factory=dict)
    steps: set[str] = field(default_factory=set)


class Uploader:
    """Sends what stands in `home` to `store`, with `where` before every path (`nodes/1/` for the second node).

    folders: of OUTPUT_FOLDERS, those that the runner moves. restored: path → bytes of growing files that the store
    has from earlier attempts. Use `start` and `finish`; `round` and `send_all` are their single steps.
    """

    def __init__(
        self,
        home: Path,
        store: Store,
        folders: Collection[str],
        *,
        where: str = "",
        quick: Callable[[], bool] = lambda: True,
        watched: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
        restored: Mapping[str, int] | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home, self._store, self._folders, self._where = home, store, folders, where
        self._quick, self._watched, self._say, self._clock = quick, watched, say, clock
        self._pace = pace or Pace()
        self._restored = dict(restored or {})
        self._budget = _Budget(self._pace, clock)
        self._sent = _Sent()
        self._failures = 0
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
        self.complete = self.send_all()
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
            self._send_segments(path)
        for path in self._whole_files():
            if path not in self._sent.files and self._settled(path) and self._may_put():
                self._send_file(path)

    def _may_put(self) -> bool:
        return self._watched() or self._budget.afford()

    def _put(self, path: str, data: bytes | Path) -> None:
        self._put_as(self._where + path, data)

    def _put_as(self, path: str, data: bytes | Path) -> None:
        self._store.write(path, data)
        self.progress_at = self._clock()
        if not self._watched():
            self._budget.spend()

    def _settled(self, path: str) -> bool:
        """Whether nobody has written to it for a moment: half a file is no use to anyone."""
        try:
            return time.time() - (self._home / path).stat().st_mtime >= self._pace.settled_s
        except FileNotFoundError:
            return False

    def _send_file(self, path: str) -> None:
        try:
            facts = (self._home / path).stat()
            self._put(path, self._home / path)
        except FileNotFoundError:  # removed meanwhile
            return
        self._sent.files[path] = (facts.st_size, facts.st_mtime_ns)

    def _changed(self, path: str) -> bool:
        try:
            facts = (self._home / path).stat()
        except FileNotFoundError:
            return False
        return self._sent.files.get(path) != (facts.st_size, facts.st_mtime_ns)

    def _send_segments(self, path: str) -> None:
        state = self._appended_state(path)
        full = self._home / path
        if full.stat().st_size < state.offset:  # somebody cut it; the whole file at the end is right
            state.offset = full.stat().st_size
        while self._may_put():
            with full.open("rb") as file:
                file.seek(state.offset)
                data = file.read(_SEGMENT_SIZE)
            lines = data[: data.rfind(b"\n") + 1] or (data if len(data) == _SEGMENT_SIZE else b"")
            if not lines:
                return
            self._put_as(f"{self._segments(path)}/seg-{state.number:06}", lines)
            state.offset += len(lines)
            state.number += 1

    def _segments(self, path: str) -> str:
        return f"{SEGMENTS}/{self._where}{path}"

    def _appended_state(self, path: str) -> _Appended:
        """Numbers go on after those of earlier attempts."""
        if path not in self._sent.appended:
            numbers = [int(entry.path[-6:]) for entry in self._store.list(self._segments(path))]
            self._sent.appended[path] = _Appended(self._restored.get(path, 0), max(numbers, default=-1) + 1)
        return self._sent.appended[path]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _send_checkpoints(self) -> None:
        """Newest first; then those that the command removed leave the store too, if a newer one is there."""
        steps = self._complete_steps()
        for step in steps:
            if step not in self._sent.steps and self._may_put():
                self._send_checkpoint(step)
        newest = max(self._sent.steps, key=int, default="")
        for step in self._sent.steps - set(steps) - {newest}:
            self._delete_checkpoint(step)

    def _complete_steps(self) -> list[str]:
        folder = self._home / "checkpoints"
        if "checkpoints" not in self._folders or not folder.is_dir():
            return []
        steps = [p.name for p in folder.iterdir() if p.name.isdigit() and (p / COMPLETE).is_file()]
        return sorted(steps, key=int, reverse=True)

    def _send_checkpoint(self, step: str) -> None:
        folder = self._home / "checkpoints" / step
        try:
            names = json.loads((folder / COMPLETE).read_text())["files"]
            for name in [*sorted(names), COMPLETE]:
                self._put(f"checkpoints/{step}/{name}", folder / name)
        except (FileNotFoundError, ValueError, KeyError):  # removed meanwhile, or damaged: it is no checkpoint
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
                if not _is_appended(relative) and relative not in _LEFT_OUT and _is_whole(path):
                    yield relative

    def _appended_files(self) -> list[str]:
        if "output" not in self._folders:
            return []
        found = [p for pattern in _APPENDED for p in self._home.glob(pattern) if p.is_file()]
        return sorted(p.relative_to(self._home).as_posix() for p in found)

    # -- at the end ---------------------------------------------------------------------------------------------------

    def send_all(self) -> bool:
        """Everything, newest checkpoint first; False if it had to be given up."""
        return all(self._persist(step) for step in self._last_steps())

    def _last_steps(self) -> Iterator[Callable[[], None]]:
        newest, *older = self._complete_steps() or [""]
        if newest and newest not in self._sent.steps:
            yield lambda: self._send_checkpoint(newest)
        for path in self._appended_files():
            yield lambda path=path: self._join(path)  # type: ignore[misc]
        for path in self._whole_files():
            if self._changed(path):
                yield lambda path=path: self._send_file(path)  # type: ignore[misc]
        for step in older:
            if step not in self._sent.steps:
                yield lambda step=step: self._send_checkpoint(step)  # type: ignore[misc]
        yield self._send_checkpoints
        if "output" in self._folders:
            yield self._join_earlier

    def _persist(self, step: Callable[[], None]) -> bool:
        """Tries until it works or is given up."""
        back_off = 1.0
        while not self._give_up.is_set():
            try:
                step()
            except Exception as error:  # as in guarded_round
                if not self._failures:
                    self._say(f"the output store fails, trying again: {error}")
                self._failures += 1
                self._give_up.wait(back_off)
                back_off = min(2 * back_off, 30.0)
            else:
                return True
        return False

    def _join(self, path: str) -> None:
        """The whole file, then away with its segments: a reader finds the one or the other."""
        self._put(path, self._home / path)
        self._store.delete([entry.path for entry in self._store.list(self._segments(path))])

    def _join_earlier(self) -> None:
        """Logs of attempts that died before they could."""
        found: dict[str, list[str]] = {}
        for entry in self._store.list(self._segments(contract.LOGS)):
            path = entry.path.removeprefix(f"{SEGMENTS}/").rpartition("/")[0]
            found.setdefault(path, []).append(entry.path)
        for path, segments in found.items():
            if self._store.head(path) is None:
                self._put_as(path, b"".join(self._store.read(segment) for segment in sorted(segments)))
            self._store.delete(segments)


def _is_appended(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _APPENDED)


def _is_whole(path: Path) -> bool:
    return path.is_file() and not path.name.endswith(".part") and not is_part_file(path.name)
