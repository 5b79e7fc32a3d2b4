"""Taking tar files apart without trusting them.

`tarfile` has such a filter from Python 3.11.4 on; Debian 12, the trainer image's base, has 3.11.2.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from pathlib import Path

__all__ = ["check_member", "extract_tar"]


def check_member(member: tarfile.TarInfo) -> None:
    """tarfile.TarError for a path or a link that, as written, leads out of the archive, and for devices and pipes."""
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise tarfile.TarError(f"{member.name!r} is no file, folder or link")
    if _leads_out(member.name):
        raise tarfile.TarError(f"{member.name!r} leads out of the archive")
    start = os.path.dirname(member.name) if member.issym() else ""  # noqa: PTH120 a path in the archive
    if not (member.isreg() or member.isdir()) and _leads_out(member.linkname, start):
        raise tarfile.TarError(f"{member.name!r} links to {member.linkname!r}, which leads out of the archive")


def _leads_out(path: str, start: str = "") -> bool:
    written = os.path.normpath(os.path.join(start, path))  # noqa: PTH118 text only
    return path.startswith("/") or "\\" in path or written.split("/")[0] == ".."


def extract_tar(tar: tarfile.TarFile, folder: Path) -> None:
    """Files (0644 or 0755), folders and symbolic links. tarfile.TarError if anything leads out of `folder`.

    Links come last, so that nothing is written through one; where they lead is looked at when all are there.
    """
    members = tar.getmembers()
    for member in members:
        check_member(member)
        if member.islnk():
            raise tarfile.TarError(f"{member.name!r} is a hard link")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for member in members:
            if not member.issym():
                _write(tar, member, folder / member.name)
        for member in members:
            if member.issym():
                _link(member, folder / member.name)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise tarfile.TarError(f"{error.filename} is in it twice") from error
    for member in members:
        if not Path(os.path.realpath(folder / member.name)).is_relative_to(os.path.realpath(folder)):
            raise tarfile.TarError(f"{member.name!r} leads out of the archive")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, to: Path) -> None:
    if member.isdir():
        to.mkdir(parents=True, exist_ok=True)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # noqa: S101 for mypy: it is a regular file
    with source, to.open("xb") as file:
        shutil.copyfileobj(source, file)
    to.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)


def _link(member: tarfile.TarInfo, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(member.linkname)
