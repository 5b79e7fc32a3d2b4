"""Brings a run home: `<output>/<run_id>/` of any store into a folder of one layout, again and again while it runs.

What comes: checkpoints/, model/, output/, nodes/ and started.json, as contract.py names them. What doesn't: input/,
control/, owner, heartbeat. Append-only files that exist only as `segments/<path>/seg-000123` are joined into `<path>`
as far as they are contiguous from 0; once the object `<path>` is there, it is the file.

`.cvlaunch-sync.json` in the folder remembers what each file was fetched from. Nothing local is ever deleted.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import shutil
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from launcher.contract import OUTPUT_FOLDERS, SEGMENTS, STARTED, write_json
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

__all__ = ["Cursor", "SyncReport", "read_appended", "sync_run", "unpack_tar"]

FOLDERS = (*OUTPUT_FOLDERS, "nodes")
STATE = ".cvlaunch-sync.json"
_THREADS = 8
_SAVE_EVERY_S = 2.0
_SEGMENT = re.compile(r"seg-([0-9]{6})")


@dataclass(frozen=True)
class SyncReport:
    """files, bytes: fetched now. skipped: files that were there already. path: the folder."""

    files: int
    bytes: int
    skipped: int
    path: Path


@dataclass(frozen=True)
class Cursor:
    """How far a follower has read one file.

    offset: bytes it was given. segment: number of the next one, and `covered` the bytes of those before it, which may
    be fewer than `offset` after reading in the whole file.
    """

    offset: int = 0
    segment: int = 0
    covered: int = 0


@dataclass(frozen=True)
class _Joined:
    """A local file made of the first `count` segments."""

    count: int
    size: int


@dataclass
class _State:
    """What the local files were fetched from; thread-safe as each key has one writer."""

    files: dict[str, str] = field(default_factory=dict)
    joined: dict[str, _Joined] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, uri: str) -> _State:
        """Empty for another store, and for a file that can't be read: then files are fetched again."""
        try:
            raw = json.loads(path.read_bytes())
            if raw["uri"] != uri:
                return cls()
            files = {name: str(version) for name, version in raw["files"].items()}
            return cls(files, {name: _Joined(int(c), int(s)) for name, (c, s) in raw["joined"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def save(self, path: Path, uri: str) -> None:
        joined = {name: (j.count, j.size) for name, j in dict(self.joined).items()}
        write_json(path, {"version": 1, "uri": uri, "files": dict(self.files), "joined": joined})


@dataclass(frozen=True)
class _Task:
    """One file to bring: an object, or the segments from `parts[0]` on, of which `have` are in the local file."""

    path: str
    entry: Entry | None = None
    parts: tuple[Entry, ...] = ()
    have: _Joined = _Joined(0, 0)

    @property
    def size(self) -> int:
        return self.entry.size if self.entry else sum(part.size for part in self.parts)


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
    objects, segments = _what_there_is(store, include, exclude)
    tasks = [task for task in _tasks(objects, segments, state, dest) if task is not None]
    require_room(dest, sum(task.size for task in tasks), what=f"bringing home {store.uri}")
    try:
        fetched = _run_tasks(store, dest, tasks, state, progress)
    finally:
        if tasks:
            state.save(dest / STATE, store.uri)
    total = len(objects) + len(segments)
    return SyncReport(len(fetched), sum(fetched), total - len(tasks), dest)


def _refuse_itself(store: Store, dest: Path) -> None:
    home = store.local_path()
    if home is not None and os.path.realpath(home) == os.path.realpath(dest):
        raise SpecError(f"{dest} is where the run itself stands: choose another folder to bring it to")


# -- what to bring ----------------------------------------------------------------------------------------------------


def _what_there_is(
    store: Store, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, Entry], dict[str, list[Entry]]]:
    """(objects by path; contiguous segments by the path that they make, where no object of that path is)."""
    started = store.head(STARTED)
    entries = [*([started] if started else []), *(entry for folder in FOLDERS for entry in store.list(folder))]
    objects = {entry.path: entry for entry in entries if _wanted(entry.path, include, exclude)}
    segments = {
        path: parts
        for path, parts in _segments(store.list(SEGMENTS)).items()
        if path not in objects and _in_layout(path) and _wanted(path, include, exclude)
    }
    _refuse_clashes(store.uri, objects.keys() | segments.keys())
    return objects, segments


def _in_layout(path: str) -> bool:
    return path == STARTED or path.split("/", 1)[0] in FOLDERS


def _wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or _matches(path, include)) and not _matches(path, exclude)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern.rstrip("/") + "/") for pattern in patterns)


def _segments(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Those that follow each other from 0, by the path that they make."""
    numbered: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in entries:
        folder, _, name = entry.path.removeprefix(f"{SEGMENTS}/").rpartition("/")
        if folder and (match := _SEGMENT.fullmatch(name)):
            numbered[folder][int(match[1])] = entry
    joined = {path: list(_from_zero(parts)) for path, parts in numbered.items()}
    return {path: parts for path, parts in joined.items() if parts}


def _from_zero(parts: Mapping[int, Entry]) -> Iterator[Entry]:
    number = 0
    while number in parts:
        yield parts[number]
        number += 1


def _refuse_clashes(uri: str, paths: Iterable[str]) -> None:
    """An object store can hold both `a` and `a/b`, a folder can't."""
    known = set(paths)
    for path in known:
        for parent in PurePosixPath(path).parents:
            if str(parent) in known:
                raise IntegrityError(f"{uri} holds {str(parent)!r} and {path!r}; a folder can't hold both: remove one")


def _tasks(
    objects: Mapping[str, Entry], segments: Mapping[str, list[Entry]], state: _State, dest: Path
) -> Iterator[_Task | None]:
    for path, entry in objects.items():
        if not _is_there(entry, state, dest):
            yield _Task(path, entry)
    for path, parts in segments.items():
        have = state.joined.get(path, _Joined(0, 0))
        if _local_size(dest / path) != have.size or have.count > len(parts):
            have = _Joined(0, 0)
        if have.count < len(parts):
            yield _Task(path, None, tuple(parts[have.count :]), have)


def _is_there(entry: Entry, state: _State, dest: Path) -> bool:
    return state.files.get(entry.path) == _version(entry) and _local_size(dest / entry.path) == entry.size


def _version(entry: Entry) -> str:
    """Equal as long as the content is. Whole seconds, as rclone's list and its head differ in the rest."""
    return f"{entry.size} {entry.etag or int(entry.modified)}"


def _local_size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


# -- bringing it ------------------------------------------------------------------------------------------------------


def _run_tasks(store: Store, dest: Path, tasks: Sequence[_Task], state: _State, progress: Progress | None) -> list[int]:
    """The bytes of each file that came; the first error ends it, with nothing left running."""
    total, fetched, saved = sum(task.size for task in tasks), list[int](), time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for future in as_completed([pool.submit(_bring, store, dest, task, state) for task in tasks]):
                size = future.result()
                if size is not None:
                    fetched.append(size)
                if progress:
                    progress(sum(fetched), total)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    state.save(dest / STATE, store.uri)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return fetched


def _bring(store: Store, dest: Path, task: _Task, state: _State) -> int | None:
    """Bytes fetched; None if the run removed the file meanwhile (old checkpoints, segments that were joined)."""
    to = path_inside(dest, task.path)
    with suppress(FileNotFoundError):
        if task.entry is None:
            return _join(store, task, to, state)
        entry = store.download(task.path, to)
        os.utime(to, (entry.modified, entry.modified))
        state.files[task.path] = _version(entry)
        state.joined.pop(task.path, None)
        return entry.size
    return None


def _join(store: Store, task: _Task, to: Path, state: _State) -> int:
    """Local beginning + new segments, by part file and rename."""
    fetched = 0
    with copy_into_place(to, task.have.size + task.size) as file:
        if task.have.count:
            with to.open("rb") as beginning:
                shutil.copyfileobj(beginning, file, 1 << 20)
        for part in task.parts:
            fetched += file.write(store.read(part.path))
    state.files.pop(task.path, None)
    state.joined[task.path] = _Joined(task.have.count + len(task.parts), task.have.size + fetched)
    return fetched


def _remove_stale_parts(dest: Path) -> None:
    """Of processes that died: none of that number lives here, and a minute without a byte (it may live elsewhere)."""
    for folder, _, names in os.walk(dest):
        for name in filter(is_part_file, names):
            part = Path(folder, name)
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 60 and not _lives(name):
                    part.unlink()


def _lives(part_name: str) -> bool:
    match = re.search(r"\.([0-9]+)(-[0-9a-f]+)?\.part$", part_name)
    if not match or os.name == "nt":  # where os.kill(pid, 0) is no question
        return os.name == "nt"
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# -- following one file -----------------------------------------------------------------------------------------------


def read_appended(store: Store, path: str, *, since: Cursor = Cursor()) -> tuple[bytes, Cursor]:
    """The bytes that were appended to an append-only file since `since`, and where to go on next time.

    Empty if there is nothing new, or no file yet. The last line may be unfinished. Where segments and the whole file
    both exist they hold the same bytes; a follower goes on in the whole file when the next segment isn't there.
    """
    data, cursor = _read_segments(store, path, since)
    if not data:
        with suppress(FileNotFoundError):
            data = store.read_range(path, cursor.offset)
            cursor = dataclasses.replace(cursor, offset=cursor.offset + len(data))
    return data, cursor


def _read_segments(store: Store, path: str, since: Cursor) -> tuple[bytes, Cursor]:
    """What the next segments add to `since.offset`: a segment that was read in the whole file isn't given again."""
    blocks, number, covered = list[bytes](), since.segment, since.covered
    with suppress(FileNotFoundError):
        while True:
            block = store.read(f"{SEGMENTS}/{path}/seg-{number:06}")
            blocks.append(block[max(0, since.offset - covered) :])
            number, covered = number + 1, covered + len(block)
    data = b"".join(blocks)
    return data, Cursor(since.offset + len(data), number, covered)


# -- archives ---------------------------------------------------------------------------------------------------------


def unpack_tar(archive: Path, dest: Path) -> int:
    """Unpacks a tar file (any compression) from a platform into `dest`; the number of files.

    Only regular files and folders come out; a link inside the archive becomes a copy of the file that it names.
    IntegrityError for paths or links that leave the folder, and for devices; nothing is unpacked then. Each file
    appears by rename.
    """
    try:
        with tarfile.open(archive) as tar:
            files = _checked_members(tar, archive, dest)
            require_room(dest, sum(source.size for source in files.values()), what=f"unpacking {archive.name}")
            for path, source in files.items():
                _extract(tar, source, path_inside(dest, path))
            return len(files)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise IntegrityError(f"{archive} is not a tar file, or damaged ({error}): fetch it again") from error


def _checked_members(tar: tarfile.TarFile, archive: Path, dest: Path) -> dict[str, tarfile.TarInfo]:
    """Path → the member that holds its bytes."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        path = member.name.removeprefix("./").rstrip("/")
        if member.isdir() and path in ("", "."):
            continue
        if reason := bad_path(path):
            raise IntegrityError(f"{archive}: {member.name!r} {reason}: nothing was unpacked")
        try:
            tarfile.data_filter(member, str(dest))
        except tarfile.FilterError as error:
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
