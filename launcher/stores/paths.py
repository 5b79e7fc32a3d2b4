"""Paths in a store, and URIs of stores: pure, but for `path_inside`, which follows links."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

from launcher.errors import IntegrityError, SpecError

__all__ = [
    "bad_path",
    "check_path",
    "file_uri",
    "from_store",
    "is_below",
    "is_uri",
    "join_uri",
    "path_inside",
    "path_of",
    "scheme",
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")


def bad_path(path: str) -> str | None:
    """Why `path` can't name a file below a folder on every machine, or None if it can."""
    if not path:
        return "is empty"
    if path.startswith("/") or _DRIVE.match(path):
        return "is absolute"
    if "\\" in path:
        return "has a backslash"
    if _CONTROL.search(path):
        return "has a control character or is not UTF-8"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "has an empty part, '.' or '..'"
    return None


def check_path(path: str) -> str:
    """`path` itself. SpecError if it isn't a plain relative path."""
    if reason := bad_path(path):
        raise SpecError(f"{path!r} {reason}; a path in a store looks like output/metrics.jsonl")
    return path


def path_inside(root: Path, path: str) -> Path:
    """Where `path` stands below `root`, to be written: SpecError if a symbolic link on the way leads out of `root`."""
    full = root / check_path(path)
    if not is_below(full.parent, root):
        raise SpecError(f"{path!r} leaves {root} through a symbolic link: remove the link")
    return full


def is_below(path: Path, root: Path) -> bool:
    """Whether `path`, with its links followed, stands in `root`."""
    # realpath, as Path.resolve raises on a loop of links
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def is_uri(text: str) -> bool:
    """`s3://b/x` is one, `C:\\x` and `./x` are not."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def scheme(uri: str) -> str:
    """`s3` of `s3://b/x`; `file` of a plain path."""
    return uri.split("://", 1)[0].lower() if is_uri(uri) else "file"


def file_uri(path: Path) -> str:
    """`file:///data/a%20b` of any path; relative ones start at the current folder."""
    return Path(os.path.abspath(path)).as_uri()  # noqa: PTH100 - Path.absolute keeps `..`, resolve follows links


def path_of(uri: str) -> Path:
    """The path of a `file://` URI or of a plain path (`~` is the home folder)."""
    if not is_uri(uri):
        return Path(uri).expanduser()
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise SpecError(f"{uri!r} is not a folder of this machine; one looks like file:///data/shapes")
    from urllib.request import url2pathname  # brings half of the network library along

    return Path(url2pathname(parts.path))


def join_uri(base: str, *parts: str) -> str:
    """`base/part/part`; the parts are checked, and quoted where the scheme asks for it (`file://`)."""
    joined = "/".join(check_path(part.strip("/")) for part in parts if part.strip("/"))
    if not joined:
        return base
    quoted = urllib.parse.quote(joined) if base.startswith("file://") else joined
    return f"{base.rstrip('/')}/{quoted}"


def from_store(path: str, uri: str) -> str:
    """`path`, as a store told it. IntegrityError if it can't be brought to a folder."""
    if reason := bad_path(path):
        raise IntegrityError(
            f"{uri} holds {path!r}, which {reason}: it can't be brought to a folder; rename or remove it"
        )
    return path
