"""What a file system far away says, as what the caller can do."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.errors import AuthError, CapacityError, CvlaunchError, SpecError, UnreachableError

__all__ = ["file_error"]

_PERMISSION = (AuthError, "no permission on this folder: ask its owner, or choose another")
_REFUSED = (SpecError, "the system refuses it: choose another path")
_SILENT = (UnreachableError, "the file system does not answer: try again later")

_ERRORS: Mapping[str, tuple[type[CvlaunchError], str]] = {
    "EACCES": _PERMISSION,
    "EDQUOT": (CapacityError, "the disk quota is used up: make room, or choose another disk"),
    "EIO": _SILENT,
    "EISDIR": (SpecError, "this is a folder: choose another path"),
    "ELOOP": _REFUSED,
    "ENAMETOOLONG": _REFUSED,
    "ENOSPC": (CapacityError, "the disk is full: make room, or choose another disk"),
    "ENOTCONN": _SILENT,
    "ENOTDIR": (SpecError, "a file or folder is in the way: choose another path"),
    "EPERM": _PERMISSION,
    "EROFS": (AuthError, "this file system is read-only: choose another folder"),
    "ESTALE": _SILENT,
    "ETIMEDOUT": _SILENT,
}
"""Name of an errno → ours."""


def file_error(name: str, place: str) -> CvlaunchError:
    """name: of the errno, such as ENOSPC. place: what it was about."""
    kind, sentence = _ERRORS.get(name, (CvlaunchError, f"the file system says {name}"))
    return kind(f"{place}: {sentence}")
