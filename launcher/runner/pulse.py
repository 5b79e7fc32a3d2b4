"""The run's sign of life, and its ear: writes `heartbeat`, reads `control/cancel` and `control/watch`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.contract import CANCEL, HEARTBEAT, WATCH, canonical_json
from launcher.runner.stop import Reason, Stop
from launcher.stores import Store

__all__ = ["Pulse", "Rhythm", "read_heartbeat"]

_WATCH_FRESH_S = 60.0
_LAST_TICK_S = 5.0
"""How long the end waits for the thread."""


@dataclass(frozen=True)
class Rhythm:
    """Seconds. quick: in the first `quick_for_s` and while watched; look: at the marks; beat: of the heart."""

    quick_for_s: float = 600.0
    look_quick_s: float = 5.0
    look_s: float = 15.0
    beat_quick_s: float = 30.0
    beat_s: float = 120.0

    @classmethod
    def of(cls, store: Store) -> Rhythm:
        """In a folder, looking and writing cost nothing."""
        if store.local_path() is None:
            return cls()
        return cls(look_quick_s=1.0, look_s=1.0, beat_quick_s=5.0, beat_s=5.0)


class Pulse:
    """Runs in a thread from `start` on, or one `tick` at a time.

    facts: what else stands in the heartbeat. where: prefix of the heartbeat's path, `nodes/1/` for the second node.
    """

    def __init__(
        self,
        store: Store,
        stop: Stop,
        facts: Callable[[], dict[str, Any]],
        *,
        where: str = "",
        rhythm: Rhythm | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._stop, self._facts, self._where = store, stop, facts, where
        self._rhythm = rhythm or Rhythm.of(store)
        self._clock = clock
        self._born = clock()
        self._beat_at = 0.0
        self._watch_seen: tuple[float, float] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Waits for a look that is under way, if the store does not hold it up for long: the next beat is the last."""
        self._end.set()
        if self._thread.ident:
            self._thread.join(_LAST_TICK_S)

    def _run(self) -> None:
        while not self._end.wait(self._rhythm.look_quick_s if self.quick else self._rhythm.look_s):
            self.tick()

    @property
    def watched(self) -> bool:
        """Whether somebody renewed the watch mark in the last minute, by our clock."""
        return self._watch_seen is not None and self._clock() - self._watch_seen[1] < _WATCH_FRESH_S

    @property
    def quick(self) -> bool:
        return self.watched or self._clock() - self._born < self._rhythm.quick_for_s

    def tick(self) -> None:
        """One look and, when it is due, one beat. A store that is away is no reason to end a training."""
        try:
            self._look()
            if self._clock() - self._beat_at >= (self._rhythm.beat_quick_s if self.quick else self._rhythm.beat_s):
                self.beat()
        except Exception:  # noqa: S110 - the uploader says it; here it would be said every few seconds
            pass

    def beat(self) -> None:
        now = self._clock()
        self._store.write(self._where + HEARTBEAT, canonical_json({"time": now, **self._facts()}) + b"\n")
        self._beat_at = now

    def _look(self) -> None:
        if self._store.head(CANCEL) is not None:
            self._stop.ask(Reason.CANCELLED)
        mark = self._store.head(WATCH)
        if mark is None:
            return
        if self._watch_seen is None:  # by the store's clock; from then on only changes count
            self._watch_seen = (mark.modified, mark.modified)
        elif mark.modified != self._watch_seen[0]:
            self._watch_seen = (mark.modified, self._clock())


def read_heartbeat(store: Store, where: str = "") -> dict[str, Any]:
    """The last heartbeat of an earlier attempt, empty without one."""
    try:
        content = json.loads(store.read(where + HEARTBEAT))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
