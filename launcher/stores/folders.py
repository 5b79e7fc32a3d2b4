"""Folders of this machine, by the standard library alone; part files and full disks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.errors import AuthError, CapacityError, IntegrityError, SpecError
from launcher.quantities import format_size
from launcher.stores.base import Entry
from launcher.stores.paths import check_path, file_uri, from_store, is_below, path_inside

__all__ = ["PROBE", "FolderStore", "copy_into_place", "is_part_file", "require_room"]

PROBE = ".cvlaunch-probe"
"""The object that `check_writable` writes."""
_CHUNK = 8 << 20


@dataclass(frozen=True)
class FolderStore:
    """A folder of this machine, which need not exist before something is written.

    Symbolic links to files inside the folder count as files; what a link finds outside is not part of the store.
    """

    root: Path

    @property
    def uri(self) -> str:
        return file_uri(self.root)

    def head(self, path: str) -> Entry | None:
        with _folder_errors(self.root):
            return _file_entry(self._there(path), path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        top = self._there(prefix) if prefix else self.root
        with _folder_errors(self.root):
            yield from self._walk(top, f"{prefix}/" if prefix else "")

    def _walk(self, folder: Path, prefix: str) -> Iterator[Entry]:
        for item in _scan(folder):
            path = prefix + item.name
            if item.is_dir(follow_symlinks=False):
                yield from self._walk(Path(item.path), path + "/")
            elif entry := self._listed(item, path):
                yield entry

    def _listed(self, item: os.DirEntry[str], path: str) -> Entry | None:
        if is_part_file(item.name) or (item.is_symlink() and not is_below(Path(item.path), self.root)):
            return None
        entry = _file_entry(Path(item.path), path)
        if entry:
            from_store(path, self.uri)
        return entry

    def read(self, path: str) -> bytes:
        with _folder_errors(self.root):
            return self._there(path).read_bytes()

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        with _folder_errors(self.root), self._there(path).open("rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(max(0, end - start))

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        to = path_inside(self.root, path)
        with _folder_errors(self.root):
            to.parent.mkdir(parents=True, exist_ok=True)
            with _part_file(to) as part:
                with part.open("xb") as file:
                    _copy(data, file)
                if if_absent:
                    _link_new(part, to)
                else:
                    part.replace(to)

    def download(self, path: str, to: Path) -> Entry:
        with _folder_errors(self.root), self._there(path).open("rb") as source:
            facts = os.fstat(source.fileno())
            with copy_into_place(to, facts.st_size) as file:
                copied = _copy_bytes(source, file, facts.st_size)  # not what is appended meanwhile
            if copied != facts.st_size:
                raise IntegrityError(f"{path!r} in {self.uri} was cut short while it was copied: fetch it again")
            return _entry(path, facts)

    def delete(self, paths: Iterable[str]) -> None:
        with _folder_errors(self.root):
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path_inside(self.root, path).unlink()

    def local_path(self, path: str = "") -> Path | None:
        return self._there(path) if path else self.root

    def check_writable(self) -> None:
        self.write(PROBE, b"")
        self.delete([PROBE])

    def _there(self, path: str) -> Path:
        full = self.root / check_path(path)
        if not is_below(full, self.root):
            raise SpecError(f"{path!r} leaves {self.root} through a symbolic link: remove the link")
        return full


def is_part_file(name: str) -> bool:
    """Whether a file's name says that it is still being written: `.metrics.jsonl.4711-1a2b.part`."""
    return name.startswith(".") and name.endswith(".part")


def require_room(folder: Path, size: int, *, what: str) -> None:
    """CapacityError if the disk of `folder`, which need not exist yet, has less than `size` bytes free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise CapacityError(
            f"{what} needs {format_size(size)} and {there} has {format_size(free)} free: "
            "make room, or choose another disk"
        )


@contextmanager
def copy_into_place(to: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `to` by rename if all goes well and vanishes if not.

    size: bytes expected, for the message when the disk is full (CapacityError).
    """
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with _part_file(to) as part:
            with part.open("xb") as file:
                yield file
            part.replace(to)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(to, size, error) from error
        raise


@contextmanager
def _part_file(to: Path) -> Iterator[Path]:
    part = to.with_name(f".{to.name[:200]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _disk_full(to: Path, size: int | None, error: OSError) -> CapacityError:
    needs = f" and {to.name} needs {format_size(size)}" if size is not None else ""
    limit = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    return CapacityError(f"{to.parent}: {limit}{needs}: make room, or choose another disk")


def _link_new(part: Path, to: Path) -> None:
    """A hard link fails if the name is there, in one step; where links are unknown, O_EXCL does."""
    try:
        os.link(part, to)
    except FileExistsError:
        raise
    except OSError:
        with to.open("xb") as file:
            _copy(part, file)


def _copy(data: bytes | Path, file: BinaryIO) -> None:
    if isinstance(data, Path):
        with data.open("rb") as source:
            shutil.copyfileobj(source, file, _CHUNK)
    else:
        file.write(data)


def _copy_bytes(source: BinaryIO, file: BinaryIO, size: int) -> int:
    done = 0
    while done < size and (block := source.read(min(_CHUNK, size - done))):
        done += file.write(block)
    return done


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """In the order of their paths: a folder sorts as `name/`. Empty if the folder isn't there."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return sorted(found, key=lambda item: item.name + "/" * item.is_dir(follow_symlinks=False))
    return []


def _file_entry(full: Path, path: str) -> Entry | None:
    """None for what is missing, no regular file, or a loop of links."""
    try:
        facts = full.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return _entry(path, facts) if stat.S_ISREG(facts.st_mode) else None


def _entry(path: str, facts: os.stat_result) -> Entry:
    return Entry(path, facts.st_size, facts.st_mtime, f"{facts.st_mtime_ns:x}-{facts.st_size:x}-{facts.st_ino:x}")


@contextmanager
def _folder_errors(root: Path) -> Iterator[None]:
    """The errors of a file system as ours; FileNotFoundError and FileExistsError stay."""
    try:
        yield
    except OSError as error:
        place = error.filename or root
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AuthError(f"{place}: no permission on this folder: ask its owner, or choose another") from error
        if error.errno == errno.EROFS:
            raise AuthError(f"{place}: this file system is read-only: choose another folder") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"{root}: the disk is full: make room, or choose another disk") from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise SpecError(f"{place}: {error.strerror}: choose another path") from error
        raise
