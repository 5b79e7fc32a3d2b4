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

What a platform brings out itself stands elsewhere in the store, and comes home as a view of it:

* `artifacts/<job>/output/`, of the newest job that has it: model.tar.gz is `model/`, output.tar.gz `output/data/`, and
  what stands in its `.cvlaunch/` is the run's folder; or, not packed, `model/…` and `data/…`.
* `checkpoints/.cvlaunch/` is the run's folder as a runner kept it that reached no store, segments and all. What is
  newer counts, of it and of an archive.

Neither replaces what the runner itself has put at the same path.

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
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from launcher.contract import ARTIFACTS, JOB, MIRROR, OUTPUT_FOLDERS, PACKED, SEGMENTS, STARTED, is_marker, write_json
from launcher.errors import CapacityError, CvlaunchError, IntegrityError, SpecError
from launcher.quantities import format_size
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

__all__ = [
    "MODEL_ARCHIVE",
    "OUTPUT_ARCHIVE",
    "Cursor",
    "SyncReport",
    "newest_model",
    "read_appended",
    "segment_path",
    "sync_run",
    "unpack_tar",
]

MODEL_ARCHIVE = "model.tar.gz"
OUTPUT_ARCHIVE = "output.tar.gz"

FOLDERS = (*OUTPUT_FOLDERS, "nodes")
_FILES = (STARTED, JOB)
STATE = ".cvlaunch-sync.json"
_THREADS = 8
_SAVE_EVERY_S = 2.0
_SEGMENT = re.compile(r"seg-([0-9]{12})")
_DATA = "output/data"
_ARTIFACT = re.compile(rf"{ARTIFACTS}/([^/]+)/output/(?:(model|output)\.tar\.gz|(model|data)/(.+))", re.DOTALL)
_MOST_PACKED = 1032
"""Bytes that one byte of a gzip file stands for, at most (deflate); only a hostile archive says more."""


@dataclass(frozen=True)
class SyncReport:
    """files, bytes: fetched now, archives in one piece. skipped: files that were there already. path: the folder."""

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

    @property
    def modified(self) -> float:
        whole = self.whole.modified if self.whole else 0.0
        return max([whole, *(part.modified for part in self.parts.values())])


@dataclass(frozen=True)
class _Have:
    """What a local file is made of: the object of this version (empty: none), then segments up to `size` bytes.

    Of a file out of an archive, the version is the archive's.
    """

    version: str
    size: int


@dataclass
class _State:
    """What the local files are made of, by path; thread-safe as each key has one writer.

    archives: version → path in the run's folder → bytes, so that an archive is not fetched for nothing.
    """

    files: dict[str, _Have] = field(default_factory=dict)
    archives: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, uri: str) -> _State:
        """Empty for another store, and for a file that can't be read: then files are fetched again."""
        try:
            raw = json.loads(path.read_bytes())
            if raw["uri"] != uri:
                return cls()
            files = {name: _Have(str(version), int(size)) for name, (version, size) in raw["files"].items()}
            archives = raw.get("archives", {})
            return cls(files, {str(v): {str(p): int(size) for p, size in of.items()} for v, of in archives.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def forget_archives(self, path: str) -> None:
        """All versions of the archive at `path`."""
        self.archives = {v: members for v, members in self.archives.items() if not v.startswith(f"{path} ")}

    def save(self, path: Path, uri: str) -> None:
        files = {name: (have.version, have.size) for name, have in dict(self.files).items()}
        write_json(path, {"version": 1, "uri": uri, "files": files, "archives": dict(self.archives)})


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
    CapacityError if the disk has no room, IntegrityError if the store holds paths that a folder can't hold, or an
    archive that is damaged or hostile; then all else has come.
    """
    _refuse_itself(store, dest)
    dest.mkdir(parents=True, exist_ok=True)
    _remove_stale_parts(dest)
    state = _State.load(dest / STATE, store.uri)
    home = _Home(store, dest, state, _Wish(tuple(include), tuple(exclude)))
    files, archives = _what_there_is(home)
    tasks = [task for file in files if (task := _task(file, state, dest)) is not None]
    there = len(files) - len(tasks) + sum(home.members_there(archive) for archive in archives)
    lacking = [archive for archive in archives if home.lacks(archive)]
    total = sum(task.size for task in tasks) + sum(archive.entry.size for archive in lacking)
    require_room(dest, total, what=f"bringing home {store.uri}")

    def tell(done: int) -> None:
        if progress:
            progress(done, total)

    try:
        count, size = _run_tasks(store, dest, tasks, state, tell)
        unpacked = _bring_archives(home, lacking, lambda done: tell(size + done))
    finally:
        if tasks or lacking:
            state.save(dest / STATE, store.uri)
    return SyncReport(count + unpacked, size + sum(archive.entry.size for archive in lacking), there, dest)


def _refuse_itself(store: Store, dest: Path) -> None:
    home = store.local_path()
    if home is not None and os.path.realpath(home) == os.path.realpath(dest):
        raise SpecError(f"{dest} is where the run itself stands: choose another folder to bring it to")


# -- what to bring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wish:
    """What the caller wants of the run, as sync_run has it."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def has(self, path: str) -> bool:
        return (not self.include or _matches(path, self.include)) and not _matches(path, self.exclude)

    def may_have(self, folder: str) -> bool:
        """Whether it may have something below `folder`, whose files are not known."""
        if _matches(f"{folder}/{_ANY_NAME}", self.exclude):
            return False
        return not self.include or any(_reaches(pattern, f"{folder}/") for pattern in self.include)


_ANY_NAME = "\uffff" * 8
"""Stands for names that only a pattern for all names matches."""


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern.rstrip("/") + "/") for pattern in patterns)


def _reaches(pattern: str, folder: str) -> bool:
    """Whether the pattern may match something below `folder/`."""
    plain, *rest = re.split(r"[*?[]", pattern, maxsplit=1)
    start = plain if rest else f"{plain.rstrip('/')}/"
    return folder.startswith(start) or start.startswith(folder)


@dataclass(frozen=True)
class _Archive:
    """A platform's. into: the folder that it stands for. kept: paths at which something better stands in the store.

    whole: it may hold the rest of the run's folder, too.
    """

    entry: Entry
    into: str
    kept: Set[str] = frozenset()
    whole: bool = False

    @property
    def version(self) -> str:
        return f"{self.entry.path} {_version(self.entry)}"

    def may_have(self, wish: _Wish) -> bool:
        """Whether something that is wanted may be in it, before it is opened."""
        if self.whole:
            return any(map(wish.may_have, ("output", "nodes"))) or any(map(wish.has, _FILES))
        return wish.may_have(self.into)


@dataclass(frozen=True)
class _Home:
    """One sync: from where, to where, what is there already, and what is wanted."""

    store: Store
    dest: Path
    state: _State
    wish: _Wish

    def lacks(self, archive: _Archive) -> bool:
        """Whether it has to be fetched: it is not known, or something in it is not here."""
        if archive.version not in self.state.archives:
            return archive.may_have(self.wish)
        return self.members_there(archive) < len(self._members(archive))

    def members_there(self, archive: _Archive) -> int:
        return sum(self.has(archive, path, size) for path, size in self._members(archive).items())

    def _members(self, archive: _Archive) -> dict[str, int]:
        known = self.state.archives.get(archive.version, {})
        return {path: size for path, size in known.items() if self.wants(archive, path)}

    def wants(self, archive: _Archive, path: str) -> bool:
        return path not in archive.kept and self.wish.has(path)

    def has(self, archive: _Archive, path: str, size: int) -> bool:
        made = self.state.files.get(path) == _Have(archive.version, size)
        return made and _local_size(self.dest / path) == size


def _what_there_is(home: _Home) -> tuple[list[_File], list[_Archive]]:
    """Files and archives, the files as far as they are wanted."""
    store = home.store
    single = [entry for path in _FILES if (entry := store.head(path)) is not None]
    listed = (entry for folder in FOLDERS for entry in store.list(folder))
    objects = {entry.path: entry for entry in (*single, *listed) if not _in_passing(entry.path)}
    in_mirror = [objects.pop(path) for path in list(objects) if path.startswith(f"{MIRROR}/")]
    own = _files_of(objects, _segments(store.list(SEGMENTS)))
    views = list(_newest_views(entry for entry in store.list(ARTIFACTS) if not _in_passing(entry.path)))
    others = _newer(_mirrored(in_mirror), {v.path: _File(v.path, v.entry, {}) for v in views if v.path})
    archives = [_archive(view, own, others) for view in views if not view.path]
    brought = {path for a in archives for path in home.state.archives.get(a.version, {}) if path not in a.kept}
    found = {**{path: file for path, file in others.items() if path not in brought}, **own}
    files = [file for path, file in found.items() if home.wish.has(path)]
    _refuse_clashes(store.uri, (file.path for file in files))
    return files, archives


def _in_passing(path: str) -> bool:
    """Of what is being written, as a platform syncs it, too (`checkpoints/.7.part/`); and a platform's markers."""
    return any(is_part_file(name) or is_marker(name) for name in path.split("/"))


def _archive(view: _View, own: Mapping[str, _File], others: Mapping[str, _File]) -> _Archive:
    newer = {path for path, file in others.items() if file.modified > view.entry.modified}
    return _Archive(view.entry, view.into, own.keys() | newer, whole=view.into == _DATA and STARTED not in own)


def _files_of(objects: Mapping[str, Entry], segments: Mapping[str, Mapping[int, Entry]]) -> dict[str, _File]:
    found = (_file(path, objects.get(path), segments.get(path, {})) for path in {**objects, **segments})
    return {file.path: file for file in found if _in_layout(file.path) and (file.whole or file.parts)}


def _mirrored(entries: Iterable[Entry]) -> dict[str, _File]:
    """By their paths in the run's folder; where they stand is in the entries."""
    there = {entry.path.removeprefix(f"{MIRROR}/"): entry for entry in entries}
    segments = {path: there.pop(path) for path in list(there) if path.startswith(f"{SEGMENTS}/")}
    return _files_of(there, _segments(segments.values(), f"{MIRROR}/{SEGMENTS}"))


def _newer(some: Mapping[str, _File], others: Mapping[str, _File]) -> dict[str, _File]:
    both = [*some.values(), *others.values()]
    return {file.path: file for file in sorted(both, key=lambda file: file.modified)}


def _in_layout(path: str) -> bool:
    return path in _FILES or path.split("/", 1)[0] in FOLDERS


@dataclass(frozen=True)
class _View:
    """What a platform left. into: folder of the run. path: in the run's folder; empty for an archive."""

    job: str
    entry: Entry
    into: str
    path: str


def _newest_views(entries: Iterable[Entry]) -> Iterator[_View]:
    """Of the newest job that left something for it, for each folder of the run."""
    found: dict[str, list[_View]] = defaultdict(list)
    for entry in entries:
        if match := _ARTIFACT.fullmatch(entry.path):
            into = "model" if "model" in (match[2], match[3]) else _DATA
            found[into].append(_View(match[1], entry, into, _placed(into, match[4]) if match[4] else ""))
    for views in found.values():
        newest = max((view.job for view in views), key=_in_order)
        yield from (view for view in views if view.job == newest)


def _in_order(job: str) -> list[tuple[int, str]]:
    """RUN, RUN-2, RUN-10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", job)]


def _placed(into: str, path: str) -> str:
    """Where a member of an archive belongs in the run's folder."""
    inner = path.removeprefix(f"{PACKED}/")
    return inner if into == _DATA and inner != path and _in_layout(inner) else f"{into}/{path}"


def newest_model(store: Store) -> str | None:
    """The folder of the store in which a platform left the run's model, as files or as MODEL_ARCHIVE."""
    view = next((view for view in _newest_views(store.list(ARTIFACTS)) if view.into == "model"), None)
    if view is None:
        return None
    folder = f"{ARTIFACTS}/{view.job}/output"
    return f"{folder}/model" if view.path else folder


def _segments(entries: Iterable[Entry], prefix: str = SEGMENTS) -> dict[str, dict[int, Entry]]:
    """By the path that they make and by their start. prefix: the folder that they stand in."""
    found: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in entries:
        folder, _, name = entry.path.removeprefix(f"{prefix}/").rpartition("/")
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
    store: Store, dest: Path, tasks: Sequence[_Task], state: _State, tell: Callable[[int], None]
) -> tuple[int, int]:
    """How many files came, and their bytes; the first error ends it, with nothing left running."""
    count, done, saved = 0, 0, time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for future in as_completed([pool.submit(_bring, store, dest, task, state) for task in tasks]):
                size = future.result()
                if size is not None:
                    count, done = count + 1, done + size
                tell(done)
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
            entry = store.download(task.whole.path, to)
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


def _bring_archives(home: _Home, archives: Sequence[_Archive], tell: Callable[[int], None]) -> int:
    """How many files came. The first error is raised when all archives had their turn."""
    errors, count, done = list[CvlaunchError](), 0, 0
    for archive in archives:
        try:
            count += _bring_archive(home, archive)
        except (IntegrityError, CapacityError) as error:
            errors.append(error)
        done += archive.entry.size
        tell(done)
    if errors:
        raise errors[0]
    return count


def _bring_archive(home: _Home, archive: _Archive) -> int:
    """How many files came; 0 if the archive is gone meanwhile."""
    part = home.dest / f".{archive.into.replace('/', '.')}.tar.{os.getpid()}-0.part"
    try:
        with suppress(FileNotFoundError):
            archive = replace(archive, entry=home.store.download(archive.entry.path, part))
        if not part.is_file():
            return 0
        with _opened(part, f"{home.store.uri}/{archive.entry.path}", home.dest) as (tar, files):
            return _unpack_what_lacks(home, archive, tar, {_placed(archive.into, path): files[path] for path in files})
    finally:
        part.unlink(missing_ok=True)


def _unpack_what_lacks(home: _Home, archive: _Archive, tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> int:
    state, saved, count = home.state, time.monotonic(), 0
    together = filter(home.wish.has, (*archive.kept, *files))
    _refuse_clashes(f"{home.store.uri}, with {archive.entry.path},", together)
    state.forget_archives(archive.entry.path)
    state.archives[archive.version] = {path: source.size for path, source in files.items()}
    wanted = {path: source for path, source in files.items() if home.wants(archive, path)}
    lacking = {path: source for path, source in wanted.items() if not home.has(archive, path, source.size)}
    for path in _unpack(tar, lacking, home.dest):
        state.files[path] = _Have(archive.version, files[path].size)
        count += 1
        if time.monotonic() - saved > _SAVE_EVERY_S:
            state.save(home.dest / STATE, home.store.uri)
            saved = time.monotonic()
    return count


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
    with _opened(archive, str(archive), dest) as (tar, files):
        return sum(1 for _ in _unpack(tar, files, dest))


@contextmanager
def _opened(archive: Path, name: str, dest: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]]:
    """The archive and, by path, the members that hold the bytes of its files. name: for messages.

    CapacityError if `dest` has no room for them.
    """
    try:
        with tarfile.open(archive) as tar:
            files = _checked_members(tar, name, packed=archive.stat().st_size, dest=dest)
            require_room(dest, sum(source.size for source in files.values()), what=f"unpacking {name}")
            yield tar, files
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise IntegrityError(f"{name} is not a tar file, or damaged ({error}): fetch it again") from error


def _unpack(tar: tarfile.TarFile, files: Mapping[str, tarfile.TarInfo], dest: Path) -> Iterator[str]:
    """The paths, each when it is there; in the archive's order, because going back means to decompress anew."""
    for path, source in sorted(files.items(), key=lambda file: file[1].offset):
        _extract(tar, source, path_inside(dest, path))
        yield path


def _checked_members(tar: tarfile.TarFile, archive: str, *, packed: int, dest: Path) -> dict[str, tarfile.TarInfo]:
    """Path → the member that holds its bytes. packed: bytes of the archive."""
    members: dict[str, tarfile.TarInfo] = {}
    declared = 0
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
        if member.issparse() and member.size > _MOST_PACKED * packed:
            raise IntegrityError(
                f"{archive}: {path!r} says that it has {format_size(member.size)}: nothing was unpacked"
            )
        declared += member.size
        require_room(dest, declared, what=f"unpacking {archive}")  # before all of it is decompressed to find the next
        members[path] = member
    files = {path: _source(path, members, archive) for path, member in members.items() if not member.isdir()}
    _refuse_clashes(archive, files)
    return files


def _source(path: str, members: Mapping[str, tarfile.TarInfo], archive: str) -> tarfile.TarInfo:
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
