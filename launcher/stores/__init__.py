"""Where bytes live: folders, `ssh://`, `s3://`, `gs://` and `memory://` behind one small protocol.

A store is the folder that its URI names; every path is relative to it, with `/` between the parts. Folders are
handled by the standard library alone, those of `ssh://HOST/absolute/path` by the user's ssh; the rest by obstore,
imported when such a store is opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from launcher.errors import SpecError, nearest
from launcher.stores.base import Entry, Progress, StorageOptions, Store
from launcher.stores.folders import FolderStore, copy_into_place, is_part_file, require_room
from launcher.stores.paths import (
    bad_path,
    check_path,
    file_uri,
    is_uri,
    join_uri,
    path_inside,
    path_of,
    scheme,
)
from launcher.stores.places import PlacesStore

__all__ = [
    "OF_TARGETS",
    "SCHEMES",
    "Entry",
    "FolderStore",
    "PlacesStore",
    "Progress",
    "StorageOptions",
    "Store",
    "bad_path",
    "check_path",
    "copy_into_place",
    "file_uri",
    "is_part_file",
    "is_uri",
    "join_uri",
    "open_store",
    "path_inside",
    "path_of",
    "require_room",
    "scheme",
]

SCHEMES = ("file", "gs", "memory", "s3", "ssh")
OF_TARGETS = {"pvc": "kubernetes or openshift"}
"""Kinds of stores that only a target can reach → its backend."""


def open_store(uri: str, options: StorageOptions | None = None, *, patience_s: float = 30.0) -> Store:
    """The store of the folder that `uri` names.

    patience_s: how long a request is repeated while the service is away or overloaded, before UnreachableError.
    """
    options = options or StorageOptions()
    kind = scheme(uri)
    if kind == "file" and (typo := re.match(r"([a-z][a-z0-9]+):/?(?=[^/])", uri)) and not uri.startswith("file:"):
        raise SpecError(f"{uri!r} is neither a folder nor a URI; a URI looks like {typo[1]}://bucket/folder")
    if kind == "file":
        return FolderStore(Path(os.path.abspath(path_of(uri))))  # noqa: PTH100
    if kind == "ssh":
        return _behind_ssh(uri)
    if kind in OF_TARGETS:
        raise SpecError(f"{uri!r} is reached through a target of backend {OF_TARGETS[kind]}: say which, with --target")
    if kind not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SpecError(f"{kind}:// in {uri!r} is not a kind of store; known: {known}{nearest(kind, SCHEMES)}")
    bucket, prefix = _bucket_and_prefix(uri)
    from launcher.stores.objects import CLIENTS, ObjectStore

    return ObjectStore(f"{kind}://{bucket}", prefix, CLIENTS[kind](bucket, options, patience_s))


def _behind_ssh(uri: str) -> Store:
    from launcher.remote import Host
    from launcher.stores.remote import RemoteStore

    host, _, path = uri.removeprefix("ssh://").partition("/")
    if not (host and path):
        raise SpecError(f"{uri!r} has no host or no path; it looks like ssh://login1/scratch/me/runs")
    return RemoteStore(Host(host), os.path.normpath(f"/{path}"))


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.split("://", 1)[1].partition("/")
    prefix = prefix.rstrip("/")
    reason = "has no bucket" if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) else None
    reason = reason or (bad_path(prefix) if prefix else None)
    if reason:
        raise SpecError(f"{uri!r} {reason}; it looks like {scheme(uri)}://bucket/folder")
    return bucket, prefix
