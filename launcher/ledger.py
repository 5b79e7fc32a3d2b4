"""What this user has submitted: one JSON file a run, and an index that can be rebuilt from them.

A file is created with O_EXCL and replaced by rename, which NFS and Lustre homes keep; SQLite's locks they don't always.
So the index lives in the cache folder, and the ledger works without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import paths
from launcher.backends.base import Handle
from launcher.errors import CapacityError, ConflictError, SpecError, nearest
from launcher.process import ProcessId
from launcher.status import State, Status

__all__ = ["Ledger", "RunRecord", "RunSummary", "new_run_id", "valid_run_id"]

_RUN_ID = re.compile(r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?")
_ALPHABET = "0123456789abcdefghijklmnopqrstuv"  # base32hex: text order is number order
_EPOCH = 1_577_836_800  # 2020-01-01


def valid_run_id(text: str) -> str:
    """The text itself. SpecError if some platform would not take it as a name."""
    if not _RUN_ID.fullmatch(text) or "--" in text:
        raise SpecError(
            f"{text!r} is not a run id; expected a-z, 0-9 and single -, a letter first, no - at the end, at most 39",
            key="--run-id",
        )
    return text


def new_run_id(name: str, *, now: float, randomness: int) -> str:
    """A slug of the name (24) and ten letters that sort by time: hundredths of a second, then 13 random bits."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    slug = (slug if slug[:1].isalpha() else f"run-{slug}")[:24].strip("-")
    number = (int((now - _EPOCH) * 100) << 13 | randomness & 0x1FFF) & ((1 << 50) - 1)
    return f"{slug}-" + "".join(_ALPHABET[number >> shift & 31] for shift in range(45, -1, -5))


@dataclass(frozen=True)
class RunRecord:
    """One run. Times are Unix seconds.

    target: the target as it was, so that handles outlive targets.yaml. owner: the process that is submitting it.
    plan: text and digests. synced: folder of this machine that results were brought to.
    """

    run_id: str
    name: str
    created: float
    state: State
    backend: str
    target_name: str
    target: Mapping[str, Any]
    output: str
    owner: Mapping[str, Any]
    plan: Mapping[str, Any]
    job: Mapping[str, Any] = field(default_factory=dict)
    handle: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    updated: float = 0.0
    unseen_since: float | None = None
    synced: str | None = None
    attempt: int = 1
    version: int = 1

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunRecord:
        values = {k: v for k, v in value.items() if k in _RECORD_KEYS}
        return cls(**{**values, "state": State(values["state"])})

    @property
    def last_status(self) -> Status:
        return Status(**{**self.status, "state": self.state})

    @property
    def parsed_handle(self) -> Handle | None:
        return Handle.parse(self.handle) if self.handle else None

    @property
    def owner_alive(self) -> bool:
        """Whether the submitting process may still be at it; one on another machine counts as alive."""
        owner = ProcessId.from_json(dict(self.owner))
        return owner.alive if owner.here else True


_RECORD_KEYS = frozenset(f.name for f in dataclasses.fields(RunRecord))


class Ledger:
    """The runs of one user. folder: holds `<run_id>.json`; cache: holds the index."""

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        self.folder = folder or paths.data_folder() / "runs"
        self._cache = cache or paths.cache_folder()

    def create(self, record: RunRecord) -> None:
        """Durable when it returns. ConflictError if the run id is taken."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = self._write_part(record)
        try:
            os.link(part, self._path(record.run_id))  # all of the content, or no file: O_EXCL and rename in one
        except FileExistsError:
            raise ConflictError(f"there is a run {record.run_id!r} already; choose another --run-id") from None
        finally:
            part.unlink()
        _sync_folder(self.folder)

    def update(self, run_id: str, **changes: object) -> RunRecord:
        """Changes fields of a run; what other processes changed meanwhile stays. Durable when it returns."""
        with self._lock(run_id):
            record: RunRecord = dataclasses.replace(self.get(run_id), updated=time.time(), **changes)  # type: ignore[arg-type]
            self._write_part(record).replace(self._path(run_id))
        _sync_folder(self.folder)
        return record

    def record_status(self, run_id: str, status: Status) -> RunRecord:
        """Keeps what a platform says. An end stays an end, but for LOST, which later evidence may revise."""
        known = self.get(run_id)
        ended = known.state.terminal and known.state not in (State.LOST, State.NOT_SUBMITTED)
        facts = {k: v for k, v in dataclasses.asdict(status).items() if k != "state"}
        if ended or (known.state is status.state and dict(known.status) == facts):
            return known
        return self.update(run_id, state=status.state, status=facts)

    def get(self, run_id: str) -> RunRecord:
        """SpecError if there is no such run."""
        try:
            return RunRecord.from_json(json.loads(self._path(run_id).read_text()))
        except FileNotFoundError:
            known = self.ids()
            raise SpecError(
                f"there is no run {run_id!r}{nearest(run_id, known)}; list them with: cvlaunch runs"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"not a run file: {error}", file=self._path(run_id)) from error

    def find(self, text: str) -> RunRecord:
        """By run id, by the beginning of one, or by handle."""
        if "://" in text:
            return self._by_handle(Handle.parse(text))
        if _RUN_ID.fullmatch(text) and self._path(text).exists():
            return self.get(text)
        matching = [run_id for run_id in self.ids() if text and run_id.startswith(text)]
        if len(matching) > 1:
            raise SpecError(f"{text!r} fits {len(matching)} runs: {', '.join(matching[:5])}; give more letters")
        return self.get(matching[0] if matching else text)

    def _by_handle(self, handle: Handle) -> RunRecord:
        for record in self.all():
            if record.handle == str(handle):
                return record
        raise SpecError(f"no run has the handle {handle}; list them with: cvlaunch runs")

    def delete(self, run_id: str) -> None:
        self._path(run_id).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        return sorted(entry.name[:-5] for entry in self._entries())

    def all(self) -> list[RunRecord]:
        """All runs, the newest first. A damaged file is passed over."""
        records = []
        for run_id in self.ids():
            with contextlib.suppress(SpecError):
                records.append(self.get(run_id))
        return sorted(records, key=lambda r: (r.created, r.run_id), reverse=True)

    def summaries(self) -> list[RunSummary]:
        """All runs, the newest first, through the index; without a usable cache folder the files are read."""
        entries = {entry.name[:-5]: entry.stat() for entry in self._entries()}
        try:
            with contextlib.closing(_open_index(self._cache, self.folder)) as index:
                rows = self._refresh(index, entries)
        except (sqlite3.Error, OSError):
            rows = {run_id: self._summary(run_id) for run_id in entries}
        found = [RunSummary(**values) for values in json.loads(f"[{','.join(filter(None, rows.values()))}]")]
        return sorted(found, key=lambda s: (s.created, s.run_id), reverse=True)

    def _refresh(self, index: sqlite3.Connection, entries: Mapping[str, os.stat_result]) -> dict[str, str]:
        known = {row[0]: row[1:] for row in index.execute("SELECT run_id, mtime, size, summary FROM runs")}
        stale = [i for i, s in entries.items() if known.get(i, (0, 0))[:2] != (s.st_mtime_ns, s.st_size)]
        fresh = {run_id: self._summary(run_id) for run_id in stale}
        gone = known.keys() - entries.keys()
        if fresh or gone:
            with index:
                rows = [(i, entries[i].st_mtime_ns, entries[i].st_size, text) for i, text in fresh.items()]
                index.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", rows)
                index.executemany("DELETE FROM runs WHERE run_id = ?", [(run_id,) for run_id in gone])
        return {i: fresh[i] if i in fresh else str(known[i][2]) for i in entries}

    def _summary(self, run_id: str) -> str:
        """JSON of a RunSummary; empty for a damaged file."""
        try:
            return json.dumps(vars(RunSummary.of(self.get(run_id))))
        except (SpecError, OSError, TypeError):
            return ""

    def _path(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise SpecError(
                f"{run_id!r} is not a run; a run looks like digits-0pq8v4k2dm or local://local/digits-0pq8v4k2dm"
            )
        return self.folder / f"{run_id}.json"

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as found:
                return [e for e in found if e.name.endswith(".json") and not e.name.startswith(".")]
        except FileNotFoundError:
            return []

    def _write_part(self, record: RunRecord) -> Path:
        part = self.folder / f".{record.run_id}.{os.getpid()}.{secrets.token_hex(4)}.part"
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump(record.to_json(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CapacityError(f"the run file in {self.folder} can't be written: {error.strerror}") from error
        return part

    @contextlib.contextmanager
    def _lock(self, run_id: str) -> Iterator[None]:
        """A file made with O_EXCL, which every file system keeps; one older than 10 s is a dead process's."""
        lock = self.folder / f".{run_id}.lock"
        while True:
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL, 0o600))
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - lock.stat().st_mtime > _LOCK_STALE_S:
                        lock.unlink(missing_ok=True)
                time.sleep(0.005)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


_LOCK_STALE_S = 10.0


@dataclass(frozen=True)
class RunSummary:
    """What a list of runs shows."""

    run_id: str
    name: str
    created: float
    state: State
    backend: str
    target_name: str
    handle: str | None
    tags: dict[str, str]
    job_digest: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", State(self.state))

    @classmethod
    def of(cls, record: RunRecord) -> RunSummary:
        return cls(
            run_id=record.run_id,
            name=record.name,
            created=record.created,
            state=record.state,
            backend=record.backend,
            target_name=record.target_name,
            handle=record.handle,
            tags=dict(record.tags),
            job_digest=str(record.plan.get("job_digest", "")),
            reason=str(record.status.get("reason", "")),
        )


def _open_index(cache: Path, folder: Path) -> sqlite3.Connection:
    """One index for each ledger folder."""
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    index = sqlite3.connect(cache / f"index-{name}.sqlite", timeout=2)
    index.execute(
        "CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, mtime INTEGER, size INTEGER, summary TEXT)"
    )
    return index


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
