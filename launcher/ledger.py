"""What this user has submitted: one JSON file a run, and an index that can be rebuilt from them.

A file is created with O_EXCL and replaced by rename, which NFS and Lustre homes keep; SQLite's locks they don't always.
So the index lives in the cache folder, and the ledger works without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import paths
from launcher.backends.base import Handle
from launcher.errors import AuthError, CapacityError, ConflictError, SpecError, UnsupportedError, nearest
from launcher.process import ProcessId
from launcher.status import State, Status
from launcher.stores import join_uri

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
    plan: text and digests. synced: folder of this machine that results were brought to. rerun_of: the earlier run whose
    job this is.
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
    rerun_of: str | None = None
    version: int = 1

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

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
    def made_elsewhere(self) -> bool:
        """Without cvlaunch: it has no run folder, its places are not ours to change, and it can't be sent again."""
        outputs = self.plan.get("outputs", ())
        return bool(outputs) and all(output["into"] for output in outputs)

    @property
    def folder(self) -> str:
        """URI of the run's folder in the output store; of a job made elsewhere, the place of its results."""
        return str(self.plan["outputs"][0]["uri"]) if self.made_elsewhere else join_uri(self.output, self.run_id)

    def require_ours(self, what: str) -> None:
        """UnsupportedError if it was made elsewhere. what: can't be done, then."""
        if self.made_elsewhere:
            raise UnsupportedError(f"{self.run_id} was made without cvlaunch, so {what}")

    @property
    def owner_alive(self) -> bool:
        """Whether the submitting process may still be at it; on another machine it is given an hour."""
        if not self.owner:  # it has given up
            return False
        owner = ProcessId.from_json(dict(self.owner))
        return owner.alive if owner.here else time.time() - max(self.created, self.updated) < _FOREIGN_OWNER_S


_FOREIGN_OWNER_S = 3600.0
_RECORD_KEYS = frozenset(f.name for f in dataclasses.fields(RunRecord))


class Ledger:
    """The runs of one user. folder: holds `<run_id>.json`; cache: holds the index."""

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        self.folder = folder or paths.data_folder() / "runs"
        self._cache = cache or paths.cache_folder()

    def create(self, record: RunRecord) -> None:
        """Durable when it returns. ConflictError if the run id is taken."""
        if self.create_many([record]):
            raise ConflictError(f"there is a run {record.run_id!r} already; choose another --run-id")

    def create_many(self, records: Sequence[RunRecord]) -> list[RunRecord]:
        """Those whose run id is taken; the others are durable when it returns."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        taken = []
        with self._parts(records) as parts:
            for record, part in zip(records, parts, strict=True):
                try:
                    _put_if_absent(part, self._path(record.run_id))
                except FileExistsError:
                    taken.append(record)
        return taken

    def update(
        self, run_id: str, *, only_if: Callable[[RunRecord], bool] = lambda record: True, **changes: object
    ) -> RunRecord:
        """Changes fields of a run; what other processes changed meanwhile stays. Durable when it returns.

        only_if: asked about the run as it is now; if it says no, nothing is changed. Returns the run as it then is.
        """
        return self.update_many({run_id: changes}, only_if=only_if)[run_id]

    def update_many(
        self,
        changes: Mapping[str, Mapping[str, object]],
        *,
        only_if: Callable[[RunRecord], bool] = lambda record: True,
    ) -> dict[str, RunRecord]:
        """`update` of each run (run id → fields), at the price of one: a disk makes many files durable together."""
        with self._lock(changes):
            known = {run_id: self.get(run_id) for run_id in changes}
            chosen = [run_id for run_id, record in known.items() if only_if(record)]
            now = time.time()
            new: dict[str, RunRecord] = {
                run_id: dataclasses.replace(known[run_id], updated=now, **changes[run_id])  # type: ignore[arg-type]
                for run_id in chosen
            }
            if new:
                with self._parts(list(new.values())) as parts:
                    for run_id, part in zip(new, parts, strict=True):
                        part.replace(self._path(run_id))
        return known | new

    def record_status(self, run_id: str, status: Status, *, attempt: int) -> RunRecord:
        """Keeps what a platform says of a submission (`RunRecord.attempt`).

        An end stays an end, but for LOST, which later evidence may revise; a run that is being sent is left alone.
        """
        return self.record_statuses({run_id: (status, attempt)})[run_id]

    def record_statuses(self, found: Mapping[str, tuple[Status, int]]) -> dict[str, RunRecord]:
        """`record_status` of each run: run id → status and attempt."""
        facts = {
            run_id: {"state": status.state, "status": {k: v for k, v in vars(status).items() if k != "state"}}
            for run_id, (status, _) in found.items()
        }

        def news(known: RunRecord) -> bool:
            new, attempt = facts[known.run_id], found[known.run_id][1]
            settled = known.state.terminal and known.state is not State.LOST
            sending = known.state in (State.PREPARING, State.SENDING)
            same = known.state is new["state"] and dict(known.status) == new["status"]
            return not (settled or sending or same) and known.attempt == attempt

        return self.update_many(facts, only_if=news)

    def get(self, run_id: str) -> RunRecord:
        """SpecError if there is no such run."""
        try:
            return RunRecord.from_json(json.loads(self._path(run_id).read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = self.ids()
            raise SpecError(
                f"there is no run {run_id!r}{nearest(run_id, known)}; list them with: cvlaunch runs"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"not a run file: {error}", file=self._path(run_id)) from error

    def __contains__(self, run_id: str) -> bool:
        return self._path(run_id).exists()

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
            if record.handle in (str(handle), f"{handle}.{record.run_id}"):  # SLURM's id alone says enough
                return record
        raise SpecError(f"no run has the handle {handle}; list them with: cvlaunch runs")

    def delete(self, run_id: str) -> None:
        with self._lock([run_id]):
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
        entries: dict[str, os.stat_result] = {}
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                entries[entry.name[:-5]] = entry.stat()
        found = _summaries(self._rows(entries).values())
        return sorted(found, key=lambda s: (s.created, s.run_id), reverse=True)

    def _rows(self, entries: Mapping[str, os.stat_result]) -> dict[str, str]:
        """Run id → JSON of its summary. An index that is damaged is made anew."""
        path = _index_path(self._cache, self.folder)
        for _ in range(2):
            try:
                with contextlib.closing(_open_index(path)) as index:
                    return self._refresh(index, entries)
            except sqlite3.OperationalError:  # locked, or on a disk that is full or read-only
                break
            except sqlite3.DatabaseError:
                path.unlink(missing_ok=True)
            except OSError:
                break
        return {run_id: self._summary(run_id) for run_id in entries}

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

    @contextlib.contextmanager
    def _parts(self, records: Sequence[RunRecord]) -> Iterator[list[Path]]:
        """Durable files of their content beside their places; what the block puts into place is durable after it.

        CapacityError or AuthError if they can't be written; nothing is left then.
        """
        parts: list[Path] = []
        try:
            for record in records:
                parts.append(self.folder / f".{record.run_id}.{os.getpid()}.{secrets.token_hex(4)}.part")
                _write_new(parts[-1], json.dumps(record.to_json()))
            _sync_files(parts)
        except OSError as error:
            _remove(parts)
            kind = CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else AuthError
            raise kind(f"the run file in {self.folder} can't be written: {error.strerror}") from error
        try:
            yield parts
        finally:
            _remove(parts)
        _sync_folder(self.folder)

    @contextlib.contextmanager
    def _lock(self, run_ids: Iterable[str]) -> Iterator[None]:
        """Held by one process at a time, and given back by the kernel when it dies.

        On a file system without locks (some Lustre mounts) two updates in the same moment may lose one of them.
        """
        numbers = {int(hashlib.sha256(run_id.encode()).hexdigest(), 16) % _LOCK_FILES for run_id in run_ids}
        with contextlib.ExitStack() as held:
            for number in sorted(numbers):  # all in one order, so that no two processes wait for each other
                fd = os.open(self.folder / f".lock-{number:02}", os.O_RDWR | os.O_CREAT, 0o600)
                held.callback(os.close, fd)
                _lock_file(fd)
            yield


_LOCK_FILES = 16
"""Shared by all runs, because a lock file that is removed locks nobody out."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def _lock_file(fd: int) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


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


def _summaries(rows: Iterable[str]) -> list[RunSummary]:
    return [RunSummary(**values) for values in json.loads(f"[{','.join(filter(None, rows))}]")]


def _index_path(cache: Path, folder: Path) -> Path:
    """One index for each ledger folder and form of a summary."""
    form = ",".join(field.name for field in dataclasses.fields(RunSummary))
    name = hashlib.sha256(f"{folder.absolute()}\0{form}".encode()).hexdigest()[:16]
    return cache / f"index-{name}.sqlite"


def _open_index(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    index = sqlite3.connect(path, timeout=2)
    index.execute(
        "CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, mtime INTEGER, size INTEGER, summary TEXT)"
    )
    return index


def _write_new(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _sync_files(paths: Sequence[Path]) -> None:
    """Many wait for the disk together."""
    shares = [share for share in (paths[first::_SYNCS_AT_ONCE] for first in range(_SYNCS_AT_ONCE)) if share]
    if len(shares) == 1:
        _sync_each(shares[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        list(pool.map(_sync_each, shares))


_SYNCS_AT_ONCE = 16


def _sync_each(paths: Iterable[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _put_if_absent(part: Path, path: Path) -> None:
    """All of the content or no file; where there are no hard links, for a moment an empty one."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        part.replace(path)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
