"""Manifests: what a data channel holds, in one object at its root (`.cvlaunch-manifest.json`).

A fingerprint is the SHA-256 of one line a file, sorted by path (code points), each line the UTF-8 text
`["<path>",<size>,"<sha256>"]` + `\\n`: canonical JSON, so that no name can be taken for another.

What belongs to a channel: every regular file that isn't hidden. Left out are names that start with a dot (and all
below such a folder), so the manifest itself and part files as well. Symbolic links are followed, to files and folders,
also out of the channel (pools of images are common on clusters), and count as what they point to; a link to a folder
that it stands in is left out, and one that points nowhere is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.contract import MANIFEST, Channel, sha256_file
from launcher.errors import IntegrityError, SpecError
from launcher.stores import Progress, Store, bad_path

__all__ = ["FileFact", "Manifest", "check_staged", "push", "read", "scan", "write"]

VERSION = 1
JOURNAL = ".cvlaunch-manifest.partial.json"
"""What an unfinished push has uploaded; while it stands, the channel has no manifest."""

_JOURNAL_EVERY = 64 << 20  # bytes between two journals: what a killed push may have to send again
_THREADS = min(16, 2 * (os.cpu_count() or 1))
_SHOWN = 10

_line = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""As contract.canonical_json, with one encoder for a million lines."""


@dataclass(frozen=True, order=True, slots=True)
class FileFact:
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Files sorted by path, each path once."""

    files: tuple[FileFact, ...]

    @classmethod
    def of(cls, files: Iterable[FileFact]) -> Manifest:
        """Sorts. SpecError for a path that can't be brought to every machine."""
        ordered = tuple(sorted(files))
        for file in ordered:
            if reason := bad_path(file.path):
                raise SpecError(f"{file.path!r} {reason}: rename the file")
        return cls(ordered)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(_line([file.path, file.size, file.sha256]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def count(self) -> int:
        return len(self.files)

    def to_bytes(self) -> bytes:
        rows = ",\n".join(_line([file.path, file.size, file.sha256]) for file in self.files)
        return f'{{"version":{VERSION},"fingerprint":"{self.fingerprint}","files":[\n{rows}\n]}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, place: str = MANIFEST) -> Manifest:
        """IntegrityError if it is damaged, of a newer version, or names paths outside its folder."""
        try:
            raw = json.loads(data)
            manifest = cls(tuple(_fact(row) for row in raw["files"]))
            version, fingerprint = raw["version"], raw["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{place} is not a manifest ({error}): push the data again") from error
        if version != VERSION:
            raise IntegrityError(f"{place} has version {version!r}, this cvlaunch reads {VERSION}: upgrade it")
        paths = [file.path for file in manifest.files]
        if paths != sorted(set(paths)) or fingerprint != manifest.fingerprint:
            raise IntegrityError(f"{place} was changed after it was written: push the data again")
        return manifest


def _fact(row: Any) -> FileFact:
    path, size, sha256 = row
    if not isinstance(path, str) or (reason := bad_path(path)):
        raise ValueError(f"the path {path!r} {reason if isinstance(path, str) else 'is no text'}")
    if type(size) is not int or size < 0:
        raise ValueError(f"{path!r} has the size {size!r}")
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"{path!r} has no SHA-256")
    return FileFact(path, size, sha256)


def scan(folder: Path, *, progress: Progress | None = None) -> Manifest:
    """Reads and hashes the whole folder, in threads. SpecError for what can't be read or named elsewhere."""
    found = dict(_walk(folder))
    sizes = {path: _size(full) for path, full in found.items()}
    tell = _Tally(sum(sizes.values()), progress)
    hashes: dict[str, str] = {}

    def one(path: str) -> Callable[[], None]:
        def work() -> None:
            hashes[path] = _hash(found[path])

        return work

    _in_threads(((one(path), sizes[path]) for path in found), tell)
    return Manifest.of(FileFact(path, sizes[path], hashes[path]) for path in found)


def read(store: Store) -> Manifest | None:
    """The manifest at the store's root, by reading that one object; None if the data has none."""
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError:
        return None
    return Manifest.from_bytes(data, place=f"{store.uri}/{MANIFEST}")


def write(store: Store, manifest: Manifest) -> None:
    store.write(MANIFEST, manifest.to_bytes())


def push(
    folder: Path,
    store: Store | Callable[[Manifest], Store],
    *,
    progress: Progress | None = None,
    prune: bool = False,
) -> Manifest:
    """Makes `store` hold what `folder` holds: sends what differs, the manifest last. May be repeated and interrupted.

    store: may be a function of what there is, so that other data get another place.
    While data is being sent the channel has no manifest, so that no job can be submitted with half of it.
    prune: delete what the store has and the folder hasn't; without it such files are a SpecError.
    """
    stamps = {path: _stamp(full) for path, full in _walk(folder)}
    local = scan(folder)
    store = store(local) if callable(store) else store
    if store.local_path() == Path(os.path.abspath(folder)):  # noqa: PTH100
        write(store, local)
        return local
    before = read(store)
    there = {entry.path: entry.size for entry in store.list()}
    extra = _extras(local, there, store, prune=prune)
    done = {file.path: file for file in (before or _journal(store) or Manifest(())).files}
    ready = {file for file in local.files if done.get(file.path) == file and there.get(file.path) == file.size}
    if before == local and len(ready) == local.count and not extra:
        return local
    _keep(store, ready)
    store.delete([MANIFEST, *extra])
    _send(folder, store, [file for file in local.files if file not in ready], ready, stamps, progress)
    write(store, local)
    store.delete([JOURNAL])
    return local


def check_staged(folder: Path, expected: Manifest | Channel) -> list[str]:
    """How a staged folder differs from what was promised, by names and sizes; empty if it doesn't, at most ten lines.

    A Channel is compared with the manifest that came along with the data, else by count and bytes.
    """
    sizes = {path: _size(full) for path, full in _walk(folder)}
    if isinstance(expected, Manifest):
        return _shorten(_differences(sizes, expected))
    own = folder / MANIFEST
    if own.is_file():
        manifest = Manifest.from_bytes(own.read_bytes(), place=str(own))
        if expected.fingerprint not in (None, manifest.fingerprint):
            return [
                f"fingerprint: the data has {manifest.fingerprint}, the job was submitted with {expected.fingerprint}"
            ]
        return _shorten(_differences(sizes, manifest))
    return [
        f"{what}: {have} are there, the job was submitted with {want}"
        for what, have, want in (("files", len(sizes), expected.files), ("bytes", sum(sizes.values()), expected.size))
        if want is not None and have != want
    ]


def _differences(sizes: Mapping[str, int], manifest: Manifest) -> Iterator[str]:
    wanted = {file.path: file.size for file in manifest.files}
    for path in sorted(wanted.keys() | sizes.keys()):
        if path not in sizes:
            yield f"{path}: missing"
        elif path not in wanted:
            yield f"{path}: not in the manifest"
        elif sizes[path] != wanted[path]:
            yield f"{path}: {sizes[path]} bytes, the manifest says {wanted[path]}"


def _shorten(lines: Iterator[str]) -> list[str]:
    return [line for line, _ in zip(lines, range(_SHOWN), strict=False)]


# -- reading a folder -------------------------------------------------------------------------------------------------


def _walk(folder: Path, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, Path]]:
    """(path, where it stands) of all that belongs to the channel."""
    here = (*above, os.path.realpath(folder))
    try:
        with os.scandir(folder) as found:
            items = sorted((item.name, item.is_dir()) for item in found if not item.name.startswith("."))
    except OSError as error:
        raise SpecError(f"{folder} can't be read: {error.strerror}") from error
    for name, is_folder in items:
        full = folder / name
        if not is_folder:
            yield prefix + name, full
        elif os.path.realpath(full) not in here:
            yield from _walk(full, f"{prefix}{name}/", here)


def _size(full: Path) -> int:
    return _stamp(full)[0]


def _stamp(full: Path) -> tuple[int, int]:
    """(bytes, modified in ns)"""
    try:
        facts = full.stat()
    except OSError as error:
        what = "is a link that points nowhere" if full.is_symlink() else f"can't be read: {error.strerror}"
        raise SpecError(f"{full} {what}: repair or remove it") from error
    if not stat.S_ISREG(facts.st_mode):
        raise SpecError(f"{full} is neither file nor folder: remove it")
    return facts.st_size, facts.st_mtime_ns


def _hash(full: Path) -> str:
    try:
        return sha256_file(full)
    except OSError as error:
        raise SpecError(f"{full} can't be read: {error.strerror}") from error


# -- sending ----------------------------------------------------------------------------------------------------------


def _extras(local: Manifest, there: Mapping[str, int], store: Store, *, prune: bool) -> list[str]:
    known = {file.path for file in local.files}
    extra = [path for path in sorted(there) if path not in known and not _hidden(path)]
    if extra and not prune:
        names = ", ".join(extra[:3]) + (", …" if len(extra) > 3 else "")
        raise SpecError(
            f"{store.uri} holds {len(extra)} files that the folder does not have ({names}): "
            "choose an empty place, or push with --prune to delete them"
        )
    return extra


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _journal(store: Store) -> Manifest | None:
    try:
        return Manifest.from_bytes(store.read(JOURNAL))
    except (FileNotFoundError, IntegrityError):
        return None


def _send(
    folder: Path,
    store: Store,
    files: list[FileFact],
    ready: Iterable[FileFact],
    stamps: Mapping[str, tuple[int, int]],
    progress: Progress | None,
) -> None:
    """Uploads `files`, keeping the journal (which starts as `ready`) so that a second push continues here."""
    sent = list(ready)
    tell = _Tally(sum(file.size for file in files), progress, every=lambda: _keep(store, sent))

    def one(file: FileFact) -> Callable[[], None]:
        def work() -> None:
            full = folder / file.path
            store.write(file.path, full)
            if _stamp(full) != stamps.get(file.path):
                raise SpecError(f"{full} changed while it was sent: push again when nobody writes to it")
            sent.append(file)

        return work

    try:
        _in_threads(((one(file), file.size) for file in files), tell)
    except BaseException:
        _keep(store, sent)
        raise


def _keep(store: Store, sent: Iterable[FileFact]) -> None:
    store.write(JOURNAL, Manifest.of(list(sent)).to_bytes())


class _Tally:
    """Counts bytes for the progress bar, and calls `every` after each further 64 MiB."""

    def __init__(self, total: int, progress: Progress | None, *, every: Callable[[], None] | None = None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._every, self._next = every, _JOURNAL_EVERY

    def add(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress(self._done, self._total)
        if self._every and self._done >= self._next:
            self._next = self._done + _JOURNAL_EVERY
            self._every()


def _in_threads(tasks: Iterable[tuple[Callable[[], None], int]], tell: _Tally) -> None:
    """Runs (work, bytes) pairs; the first error ends it, with nothing left running."""
    with ThreadPoolExecutor(_THREADS) as pool:
        running: dict[Future[None], int] = {}
        try:
            for work, size in tasks:
                running[pool.submit(work)] = size
                if len(running) >= 4 * _THREADS:
                    _collect(running, tell)
            while running:
                _collect(running, tell)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _collect(running: dict[Future[None], int], tell: _Tally) -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
        tell.add(running.pop(future))
