"""Brings a run home: `<output>/<run_id>/` of any store into a folder of one layout, again and again while it runs.

What comes: checkpoints/, model/, output/, nodes/, started.json and job.json, as contract.py names them. What doesn't:
other input, control/, owner, heartbeat.

How an append-only file (metrics, logs) stands in an object store: as the object `<path>`, or as segments
`segments/<path>/seg-<start>`, or both. All are pieces of one sequence of bytes that only grows:

* `<path>` holds its first W bytes. It appears when an attempt ends, and is replaced by a longer one when a later ends.
* `seg-<start>` holds the bytes from `start` on, in twelve digits; the next segment starts where it ends. A name is
  never used for other bytes. When `<path>` has come to hold them, its attempt deletes the segments.
* An attempt that resumes takes all that is there for the beginning of its own file, and its first segment starts
  there: at W, or after the last segment of an attempt that died. It leaves `<path>` as it is.

So the file is `<path>`, if there is one, and the segments that follow each other from its end, or from 0. A follower
asks for the segment that starts where it is, and reads on in `<path>` when that is not there.

`.cvlaunch-sync.json` in the folder remembers what each file was made of. Nothing local is ever deleted.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from launcher.contract import JOB, OUTPUT_FOLDERS, SEGMENTS, STARTED, write_json
from launcher.errors import IntegrityError, SpecError
from launcher.stores import (
    Entry,
    Progress,
    Store,
    bad_path,
    copy_into_place,
    is_part_file,
    path_inside,
    require_room,
)
from launcher.tarfiles import check_member

__all__ = ["Cursor", "SyncReport", "read_appended", "segment_path", "sync_run", "unpack_tar"]

FOLDERS = (*OUTPUT_FOLDERS, "nodes")
_FILES = (STARTED, JOB)
STATE = ".cvlaunch-sync.json"
_THREADS = 8
_SAVE_EVERY_S = 2.0
_SEGMENT = re.compile(r"seg-([0-9]{12})")


@dataclass(frozen=True)
class SyncReport:
    """files, bytes: fetched now. skipped: files that were there already. path: the folder."""

    files: int
    bytes: int
    skipped: int
    path: Path


@dataclass(frozen=True)
class Cursor:
    """How far a follower has read one file: `offset` bytes.

    segment: where the segment starts that it reads next. It may start before `offset`, so that a follower can stop
    inside: `dataclasses.replace(earlier_cursor, offset=…)`.
    """

    offset: int = 0
    segment: int = 0


@dataclass(frozen=True)
class _File:
    """A file of the run. parts: by their start, the segments that follow each other from the end of `whole`, or 0."""

    path: str
    whole: Entry | None
    parts: Mapping[int, Entry]

    @property
    def start(self) -> int:
        return self.whole.size if self.whole else 0

    @property
    def size(self) -> int:
        return self.start + sum(part.size for part in self.parts.values())


@dataclass(frozen=True)
class _Have:
    """What a local file is made of: the object of this version (empty: none), then segments up to `size` bytes."""

    version: str
    size: int


@dataclass
class _State:
    """What the local files are made of, by path; thread-safe as each key has one writer."""

    files: dict[str, _Have] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, uri: str) -> _State:
        """Empty for another store, and for a file that can't be read: then files are fetched again."""
        try:
            raw = json.loads(path.read_bytes())
            if raw["uri"] != uri:
                return cls()
            return cls({name: _Have(str(version), int(size)) for name, (version, size) in raw["files"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def save(self, path: Path, uri: str) -> None:
        files = {name: (have.version, have.size) for name, have in dict(self.files).items()}
        write_json(path, {"version": 1, "uri": uri, "files": files})


@dataclass(frozen=True)
class _Task:
    """What one file lacks. whole: to be fetched anew; then, or else to what is `have` already, `parts` are appended."""

    path: str
    whole: Entry | None
    parts: tuple[Entry, ...]
    have: _Have

    @property
    def size(self) -> int:
        return (self.whole.size if self.whole else 0) + sum(part.size for part in self.parts)


def sync_run(
    store: Store,
    dest: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> SyncReport:
    """Brings what is new. `store` is the run's folder. May be killed and repeated at any time.

    include, exclude: folders or files (`model`, `output/logs`) or patterns in which `*` also stands for `/`
    (`checkpoints/*`, `*.pt`); exclude wins.
    CapacityError if the disk has no room, IntegrityError if the store holds paths that a folder can't hold.
    """
    _refuse_itself(store, dest)
    dest.mkdir(parents=True, exist_ok=True)
    _remove_stale_parts(dest)
    state = _State.load(dest / STATE, store.uri)
    files = _what_there_is(store, include, exclude)
    tasks = [task for file in files if (task := _task(file, state, dest)) is not None]
    require_room(dest, sum(task.size for task in tasks), what=f"bringing home {store.uri}")
    try:
        count, size = _run_tasks(store, dest, tasks, state, progress)
    finally:
        if tasks:
            state.save(dest / STATE, store.uri)
    return SyncReport(count, size, len(files) - len(tasks), dest)


def _refuse_itself(store: Store, dest: Path) -> None:
    home = store.local_path()
    if home is not None and os.path.realpath(home) == os.path.realpath(dest):
        raise SpecError(f"{dest} is where the run itself stands: choose another folder to bring it to")


# -- what to bring ----------------------------------------------------------------------------------------------------


def _what_there_is(store: Store, include: Sequence[str], exclude: Sequence[str]) -> list[_File]:
    single = [entry for path in _FILES if (entry := store.head(path)) is not None]
    objects = {entry.path: entry for entry in (*single, *(e for folder in FOLDERS for e in store.list(folder)))}
    segments = _segments(store.list(SEGMENTS))
    paths = [p for p in {**objects, **segments} if _in_layout(p) and _wanted(p, include, exclude)]
    found = [_file(path, objects.get(path), segments.get(path, {})) for path in paths]
    files = [file for file in found if file.whole or file.parts]
    _refuse_clashes(store.uri, (file.path for file in files))
    return files


def _in_layout(path: str) -> bool:
    return path in _FILES or path.split("/", 1)[0] in FOLDERS


def _wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or _matches(path, include)) and not _matches(path, exclude)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern.rstrip("/") + "/") for pattern in patterns)


def _segments(entries: Iterable[Entry]) -> dict[str, dict[int, Entry]]:
    """By the path that they make and by their start."""
    found: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in entries:
        folder, _, name = entry.path.removeprefix(f"{SEGMENTS}/").rpartition("/")
        if folder and (match := _SEGMENT.fullmatch(name)):
            found[folder][int(match[1])] = entry
    return found


def _file(path: str, whole: Entry | None, segments: Mapping[int, Entry]) -> _File:
    parts: dict[int, Entry] = {}
    at = whole.size if whole else 0
    while (part := segments.get(at)) and part.size:
        parts[at] = part
        at += part.size
    return _File(path, whole, parts)


def _refuse_clashes(uri: str, paths: Iterable[str]) -> None:
    """An object store can hold both `a` and `a/b`, a folder can't."""
    known = set(paths)
    for path in known:
        for parent in PurePosixPath(path).parents:
            if str(parent) in known:
                raise IntegrityError(f"{uri} holds {str(parent)!r} and {path!r}; a folder can't hold both: remove one")


def _task(file: _File, state: _State, dest: Path) -> _Task | None:
    """None if nothing is lacking. A listing made while segments were deleted may show less than we have."""
    have, version = state.files.get(file.path), _version(file.whole) if file.whole else ""
    if have and have.version == version and have.size == _local_size(dest / file.path):
        if have.size >= file.size:
            return None
        if have.size in file.parts:
            rest = tuple(part for start, part in file.parts.items() if start >= have.size)
            return _Task(file.path, None, rest, have)
    return _Task(file.path, file.whole, tuple(file.parts.values()), _Have(version, file.start))


def _version(entry: Entry) -> str:
    """Equal as long as the content is. Whole seconds, as rclone's list and its head differ in the rest."""
    return f"{entry.size} {entry.etag or int(entry.modified)}"


def _local_size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


# -- bringing it ------------------------------------------------------------------------------------------------------


def _run_tasks(
    store: Store, dest: Path, tasks: Sequence[_Task], state: _State, progress: Progress | None
) -> tuple[int, int]:
    """How many files came, and their bytes; the first error ends it, with nothing left running."""
    total, count, done, saved = sum(task.size for task in tasks), 0, 0, time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for future in as_completed([pool.submit(_bring, store, dest, task, state) for task in tasks]):
                size = future.result()
                if size is not None:
                    count, done = count + 1, done + size
                if progress:
                    progress(done, total)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    state.save(dest / STATE, store.uri)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return count, done


def _bring(store: Store, dest: Path, task: _Task, state: _State) -> int | None:
    """Bytes fetched; None if the run removed the file meanwhile (old checkpoints, segments that were joined)."""
    to, have, size = path_inside(dest, task.path), task.have, None
    with suppress(FileNotFoundError):
        if task.whole:
            entry = store.download(task.path, to)
            os.utime(to, (entry.modified, entry.modified))
            state.files[task.path] = have = _Have(_version(entry), entry.size)
            size = entry.size
            if entry.size != task.whole.size:  # replaced since it was listed: the parts begin elsewhere
                return size
        if task.parts:
            fetched = _append(store, task.parts, to, have.size)
            state.files[task.path] = _Have(have.version, have.size + fetched)
            size = (size or 0) + fetched
    return size


def _append(store: Store, parts: Sequence[Entry], to: Path, have: int) -> int:
    """Local beginning of `have` bytes + new segments, by part file and rename; the new bytes."""
    with copy_into_place(to, have + sum(part.size for part in parts)) as file:
        if have:
            with to.open("rb") as beginning:
                shutil.copyfileobj(beginning, file, 1 << 20)
        return sum(file.write(store.read(part.path)) for part in parts)


def _remove_stale_parts(dest: Path) -> None:
    """Ours, of processes that died: none of that number lives here, and a minute without a byte (it may elsewhere)."""
    for folder, _, names in os.walk(dest):
        for name in filter(is_part_file, names):
            part = Path(folder, name)
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 60 and not _lives(name):
                    part.unlink()


def _lives(part_name: str) -> bool:
    """Also true of what names no process: it isn't ours."""
    match = re.search(r"\.([0-9]+)(-[0-9a-f]+)?\.part$", part_name)
    if not match or os.name == "nt":  # where os.kill(pid, 0) is no question
        return True
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# -- following one file -----------------------------------------------------------------------------------------------


def segment_path(path: str, start: int) -> str:
    return f"{SEGMENTS}/{path}/seg-{start:012}"


def read_appended(store: Store, path: str, *, since: Cursor = Cursor()) -> tuple[bytes, Cursor]:
    """The bytes that were appended to an append-only file since `since`, and where to go on next time.

    Empty if there is nothing new, or no file yet. The last line may be unfinished.
    """
    data, cursor = _read_segments(store, path, since)
    with suppress(FileNotFoundError):
        tail = store.read_range(path, cursor.offset)
        rest, cursor = _read_segments(store, path, _after_whole(store, path, cursor, len(tail)))
        data += tail + rest
    return data, cursor


def _after_whole(store: Store, path: str, cursor: Cursor, read: int) -> Cursor:
    """Where to go on when so many bytes came from the whole file; it may end before a cursor inside of a segment."""
    end = cursor.offset + read
    if read or cursor.segment >= end:
        return Cursor(end, end)
    whole = store.head(path)
    return Cursor(end, whole.size) if whole and whole.size <= end else cursor


def _read_segments(store: Store, path: str, since: Cursor) -> tuple[bytes, Cursor]:
    """What the segments from `since.segment` on hold after `since.offset`."""
    blocks, at = list[bytes](), since.segment
    with suppress(FileNotFoundError):
        while block := store.read(segment_path(path, at)):
            blocks.append(block[max(0, since.offset - at) :])
            at += len(block)
    data = b"".join(blocks)
    return data, Cursor(since.offset + len(data), at)


# -- archives ---------------------------------------------------------------------------------------------------------


def unpack_tar(archive: Path, dest: Path) -> int:
    """Unpacks a tar file (any compression) from a platform into `dest`; the number of files.

    Only regular files and folders come out; a link inside the archive becomes a copy of the file that it names.
    IntegrityError for paths or links that leave the folder, and for devices; nothing is unpacked then. Each file
    appears by rename.
    """
    try:
        with tarfile.open(archive) as tar:
            files = _checked_members(tar, archive)
            require_room(dest, sum(source.size for source in files.values()), what=f"unpacking {archive.name}")
            for path, source in files.items():
                _extract(tar, source, path_inside(dest, path))
            return len(files)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise IntegrityError(f"{archive} is not a tar file, or damaged ({error}): fetch it again") from error


def _checked_members(tar: tarfile.TarFile, archive: Path) -> dict[str, tarfile.TarInfo]:
    """Path → the member that holds its bytes."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        path = member.name.removeprefix("./").rstrip("/")
        if member.isdir() and path in ("", "."):
            continue
        if reason := bad_path(path):
            raise IntegrityError(f"{archive}: {member.name!r} {reason}: nothing was unpacked")
        try:
            check_member(member)
        except tarfile.TarError as error:
            raise IntegrityError(f"{archive}: {error}: nothing was unpacked") from error
        members[path] = member
    files = {path: _source(path, members, archive) for path, member in members.items() if not member.isdir()}
    _refuse_clashes(str(archive), files)
    return files


def _source(path: str, members: Mapping[str, tarfile.TarInfo], archive: Path) -> tarfile.TarInfo:
    """The regular file behind a member, through at most ten links."""
    at = path
    for _ in range(10):
        member = members.get(at)
        if member is None or member.isdir():
            break
        if member.isreg():
            return member
        base = os.path.dirname(at) if member.issym() else ""  # noqa: PTH120 - a path in the archive
        at = os.path.normpath(os.path.join(base, member.linkname))  # noqa: PTH118
    raise IntegrityError(
        f"{archive}: {path!r} is a link to something that is no file of the archive: nothing was unpacked"
    )


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, to: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise IntegrityError(f"{member.name!r} holds no bytes: fetch the archive again")
    with source, copy_into_place(to, member.size) as file:
        while block := source.read(1 << 20):
            file.write(block)
