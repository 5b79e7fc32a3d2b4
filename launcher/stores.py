"""Where bytes live: folders, `s3://`, `gs://` and `memory://` behind one small protocol.

A store is the folder that its URI names; every path is relative to it, with `/` between the parts. Folders are
handled by the standard library alone; the rest by obstore, imported at the first use (its threads don't survive a
fork: fork first).

What stores differ in, found by trying (moto 5.2, rclone 1.75):

* `if_absent` is If-None-Match on S3 and GCS. rclone's server ignores that header, so a HEAD goes first: against such
  a server two writers in the same instant can both believe they were first.
* rclone answers a range request with the whole object; the range is then cut out here.
* A HEAD has no body, so that a missing bucket looks like a missing object there. Other calls tell them apart.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from launcher.errors import (
    AuthError,
    CapacityError,
    CvlaunchError,
    IntegrityError,
    SpecError,
    UnreachableError,
    UnsupportedError,
    nearest,
)
from launcher.quantities import format_size

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, MemoryStore, RetryConfig, S3Config
    from obstore.store import ObjectStore as Client

__all__ = [
    "SCHEMES",
    "Entry",
    "FolderStore",
    "Operation",
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
    "object_errors",
    "open_store",
    "path_inside",
    "path_of",
    "require_room",
    "scheme",
]

SCHEMES = ("file", "gs", "memory", "s3")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_PROBE = ".cvlaunch-probe"
_CHUNK = 8 << 20
_MAX_PARTS = 9_000  # S3 takes 10,000 parts of one object


class Operation(StrEnum):
    READ = "read"
    LIST = "list"
    WRITE = "write"
    DELETE = "delete"


_PERMISSIONS = {
    ("s3", Operation.READ): "s3:GetObject (and s3:ListBucket, to learn that an object is not there)",
    ("s3", Operation.LIST): "s3:ListBucket",
    ("s3", Operation.WRITE): "s3:PutObject",
    ("s3", Operation.DELETE): "s3:DeleteObject",
    ("gs", Operation.READ): "storage.objects.get",
    ("gs", Operation.LIST): "storage.objects.list",
    ("gs", Operation.WRITE): "storage.objects.create (and storage.objects.delete, to replace)",
    ("gs", Operation.DELETE): "storage.objects.delete",
}


@dataclass(frozen=True)
class StorageOptions:
    """How to reach a store. No secrets: it travels in job.json.

    endpoint: URL of an S3 or GCS service that isn't the cloud's own; `http://` is allowed.
    ca_bundle: path of a PEM file, or PEM text. profile: of ~/.aws, on this machine only.
    anonymous: don't sign requests (public buckets).
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    ca_bundle: str | None = None
    project: str | None = None
    anonymous: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> StorageOptions:
        """SpecError for a key that isn't known."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                expected = ", ".join(known)
                raise SpecError(f"{key!r} is not a storage option; known: {expected}{nearest(key, known)}")
        texts = {key: value for key, value in values.items() if key != "anonymous"}
        return cls(**texts, anonymous=values.get("anonymous", "false").lower() == "true")

    def to_mapping(self) -> dict[str, str]:
        """What another machine can use: no profile, and only what is set."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value and key != "profile"}
        return {key: "true" if value is True else str(value) for key, value in values.items()}

    def portable(self) -> StorageOptions:
        """The same for another machine: no profile, and the CA bundle as text instead of a path of this machine."""
        return dataclasses.replace(self, profile=None, ca_bundle=_pem(self.ca_bundle))


@dataclass(frozen=True, slots=True)
class Entry:
    """One object or file. path: relative to the store. modified: Unix seconds. etag: changes when the content does."""

    path: str
    size: int
    modified: float
    etag: str | None


class Store(Protocol):
    """One folder of bytes. Paths in and out are relative, checked, and never leave the folder.

    Any method may raise AuthError, UnreachableError, CapacityError, or SpecError (the bucket isn't there).
    """

    @property
    def uri(self) -> str:
        """Without a `/` at the end."""
        ...

    def head(self, path: str) -> Entry | None: ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All that stands below the folder `prefix`, sorted by path. Part files are left out."""
        ...

    def read(self, path: str) -> bytes:
        """FileNotFoundError if it isn't there."""
        ...

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        """Bytes from `start` up to, without, `end`; empty at and after the end. FileNotFoundError if not there."""
        ...

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        """All or nothing, from bytes or a local file. if_absent: FileExistsError if there is one already."""
        ...

    def download(self, path: str, to: Path) -> Entry:
        """By part file and rename; what was fetched. FileNotFoundError if it isn't there."""
        ...

    def delete(self, paths: Iterable[str]) -> None:
        """What is missing is fine."""
        ...

    def local_path(self, path: str = "") -> Path | None:
        """Where it stands on this machine; None for a store that isn't a folder."""
        ...

    def check_writable(self) -> None:
        """AuthError or SpecError that says which permission is missing."""
        ...


# -- paths and URIs ---------------------------------------------------------------------------------------------------


def bad_path(path: str) -> str | None:
    """Why `path` can't name a file below a folder on every machine, or None if it can."""
    if not path:
        return "is empty"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    if "\\" in path:
        return "has a backslash"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in path):
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
    if not _is_below(full.parent, root):
        raise SpecError(f"{path!r} leaves {root} through a symbolic link: remove the link")
    return full


def _is_below(path: Path, root: Path) -> bool:
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
    return Path(urllib.request.url2pathname(parts.path))


def join_uri(base: str, *parts: str) -> str:
    """`base/part/part`; the parts are checked, and quoted where the scheme asks for it (`file://`)."""
    joined = "/".join(check_path(part.strip("/")) for part in parts if part.strip("/"))
    if not joined:
        return base
    quoted = urllib.parse.quote(joined) if base.startswith("file://") else joined
    return f"{base.rstrip('/')}/{quoted}"


def open_store(uri: str, options: StorageOptions | None = None, *, patience_s: float = 30.0) -> Store:
    """The store of the folder that `uri` names.

    patience_s: how long a request is repeated while the service is away or overloaded, before UnreachableError.
    """
    options = options or StorageOptions()
    kind = scheme(uri)
    if kind == "file":
        return FolderStore(Path(os.path.abspath(path_of(uri))))  # noqa: PTH100
    if kind not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SpecError(f"{kind}:// in {uri!r} is not a kind of store; known: {known}{nearest(kind, SCHEMES)}")
    bucket, prefix = _bucket_and_prefix(uri)
    client = {"s3": _s3_client, "gs": _gcs_client, "memory": _memory_client}[kind](bucket, options, patience_s)
    return _ObjectStore(f"{kind}://{bucket}", prefix, client)


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.split("://", 1)[1].partition("/")
    prefix = prefix.rstrip("/")
    reason = "has no bucket" if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) else None
    reason = reason or (bad_path(prefix) if prefix else None)
    if reason:
        raise SpecError(f"{uri!r} {reason}; it looks like {scheme(uri)}://bucket/folder")
    return bucket, prefix


# -- folders ----------------------------------------------------------------------------------------------------------


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
        with _folder_errors(self.root), suppress(FileNotFoundError, NotADirectoryError):
            return _file_entry(self._there(path), path)
        return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        top = self._there(prefix) if prefix else self.root
        with _folder_errors(self.root):
            yield from self._walk(top, f"{prefix}/" if prefix else "")

    def _walk(self, folder: Path, prefix: str) -> Iterator[Entry]:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
            # a folder sorts as `name/`, so that the paths come out in order
            for item in sorted(found, key=lambda i: i.name + "/" * i.is_dir(follow_symlinks=False)):
                path = prefix + item.name
                if item.is_dir(follow_symlinks=False):
                    yield from self._walk(Path(item.path), path + "/")
                elif not is_part_file(item.name):
                    yield from self._listed(item, path)

    def _listed(self, item: os.DirEntry[str], path: str) -> Iterator[Entry]:
        if item.is_symlink() and not _is_below(Path(item.path), self.root):
            return
        with suppress(FileNotFoundError):
            if entry := _file_entry(Path(item.path), _from_store(path, self.uri)):
                yield entry

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
        self.write(_PROBE, b"")
        self.delete([_PROBE])

    def _there(self, path: str) -> Path:
        full = self.root / check_path(path)
        if not _is_below(full, self.root):
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


def _file_entry(full: Path, path: str) -> Entry | None:
    import stat

    facts = full.stat()
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


# -- object stores ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ObjectStore:
    """What obstore reaches. `base` is `s3://bucket`, `prefix` the folder in it."""

    base: str
    prefix: str
    client: Client

    @property
    def uri(self) -> str:
        return f"{self.base}/{self.prefix}" if self.prefix else self.base

    def head(self, path: str) -> Entry | None:
        try:
            with self._errors(Operation.READ, path):
                meta = self.client.head(self._key(path))
        except FileNotFoundError:
            return None
        return Entry(path, meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix) if prefix else self.prefix
        skip = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(Operation.LIST):
            found = [
                Entry(meta["path"][skip:], meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))
                for block in self.client.list(folder or None)
                for meta in block
            ]
        for entry in _without_markers(sorted(found, key=lambda entry: entry.path)):
            _from_store(entry.path, self.uri)
            yield entry

    def read(self, path: str) -> bytes:
        with self._errors(Operation.READ, path):
            return bytes(self.client.get(self._key(path)).bytes())

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        if start == 0 and end is None:
            return self.read(path)
        try:
            with self._errors(Operation.READ, path):
                if end is None:
                    return bytes(self.client.get(self._key(path), options={"range": {"offset": start}}).bytes())
                return bytes(self.client.get_range(self._key(path), start=start, end=end))
        except _AfterEndError:
            return b""
        except _NoRangesError:
            return self.read(path)[start:end]

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        key = self._key(path)
        if if_absent and self.head(path) is not None:
            raise FileExistsError(errno.EEXIST, "there is one already", f"{self.uri}/{path}")
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        with self._errors(Operation.WRITE, path):
            if if_absent:
                self.client.put(key, data, mode="create", use_multipart=False)
            else:
                self.client.put(key, data, chunk_size=max(_CHUNK, size // _MAX_PARTS))

    def download(self, path: str, to: Path) -> Entry:
        import stamina

        # obstore continues a broken body by itself, but only within patience_s of the request
        for attempt in stamina.retry_context(on=_BrokenOffError, attempts=3, timeout=None, wait_initial=0.2):
            with attempt:
                entry = self._download(path, to)
        return entry

    def _download(self, path: str, to: Path) -> Entry:
        with self._errors(Operation.READ, path):
            found = self.client.get(self._key(path))
            meta = found.meta
        with copy_into_place(to, meta["size"]) as file:
            try:
                with self._errors(Operation.READ, path):
                    done = sum(file.write(block) for block in found.stream(_CHUNK))
            except UnreachableError as error:
                raise _BrokenOffError(str(error)) from error
            if done != meta["size"]:
                raise _BrokenOffError(f"{self.uri}/{path}: {done} of {meta['size']} bytes arrived: try again")
        return Entry(path, meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))

    def delete(self, paths: Iterable[str]) -> None:
        keys = [self._key(path) for path in paths]
        if not keys:
            return
        try:
            with self._errors(Operation.DELETE):
                self.client.delete(keys)
        except FileNotFoundError:  # GCS stops at the first that is missing
            for key in keys:
                with suppress(FileNotFoundError), self._errors(Operation.DELETE):
                    self.client.delete(key)

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        self.write(_PROBE, b"")
        with suppress(AuthError):  # many roles may write and not delete
            self.delete([_PROBE])

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}" if self.prefix else check_path(path)

    @contextmanager
    def _errors(self, operation: Operation, path: str = "") -> Iterator[None]:
        with object_errors(self.base, operation, path=f"{self.uri}/{path}" if path else self.uri):
            yield


class _BrokenOffError(UnreachableError):
    """A body that stopped before its end."""


class _AfterEndError(Exception):
    """A range that starts at or after the end."""


class _NoRangesError(Exception):
    """The server sent the whole object for a range."""


def _etag(text: str | None) -> str | None:
    """Without quotes: rclone's list has none, its head has."""
    return text.strip('"') if text else None


def _from_store(path: str, uri: str) -> str:
    if reason := bad_path(path):
        raise IntegrityError(
            f"{uri} holds {path!r}, which {reason}: it can't be brought to a folder; rename or remove it"
        )
    return path


def _without_markers(entries: list[Entry]) -> Iterator[Entry]:
    """Leaves out empty objects that only stand for a folder (`x/`, as consoles make them)."""
    folders = {path[:i] for path in (entry.path for entry in entries) for i, c in enumerate(path) if c == "/"}
    return (entry for entry in entries if entry.size or entry.path not in folders)


# -- clients of obstore -----------------------------------------------------------------------------------------------

_MEMORY: dict[str, MemoryStore] = {}
_MEMORY_LOCK = threading.Lock()


def _memory_client(name: str, _options: StorageOptions, _patience_s: float) -> Client:
    from obstore.store import MemoryStore

    with _MEMORY_LOCK:
        return _MEMORY.setdefault(name, MemoryStore())


def _s3_client(bucket: str, options: StorageOptions, patience_s: float) -> Client:
    from obstore.store import S3Store

    from launcher.credentials import aws

    endpoint = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: S3Config = {"virtual_hosted_style_request": False}
    if endpoint:  # the second, because it would win over the first if it came from the environment
        config["endpoint"] = config["aws_endpoint_url_s3"] = endpoint
    if options.region:
        config["region"] = options.region
    if options.anonymous:
        config["skip_signature"] = True
    provider = None if options.anonymous else aws.obstore_credentials(options.profile)
    with object_errors(f"s3://{bucket}", Operation.READ):
        return S3Store(
            bucket,
            config=config,
            client_options=_client_options(endpoint, options.ca_bundle or os.environ.get("AWS_CA_BUNDLE")),
            retry_config=_retries(patience_s),
            credential_provider=provider,
        )


def _gcs_client(bucket: str, options: StorageOptions, patience_s: float) -> Client:
    from obstore.store import GCSStore

    from launcher.credentials import google

    config: GCSConfig = {}
    if options.endpoint:
        config["base_url"] = options.endpoint
    if options.anonymous:
        config["skip_signature"] = True
    provider = None if options.anonymous else google.obstore_credentials()
    with object_errors(f"gs://{bucket}", Operation.READ):
        return GCSStore(
            bucket,
            config=config,
            client_options=_client_options(options.endpoint, options.ca_bundle),
            retry_config=_retries(patience_s),
            credential_provider=provider,
        )


def _client_options(endpoint: str | None, ca_bundle: str | None) -> ClientConfig:
    # obstore's own limit of 30 s counts for a whole transfer; a stalled one is found by the read timeout
    options: ClientConfig = {"timeout": "12h", "read_timeout": "120s", "connect_timeout": "5s"}
    if endpoint and endpoint.lower().startswith("http://"):
        options["allow_http"] = True
    if pem := _pem(ca_bundle):
        options["root_certificate"] = pem
    return options


def _retries(patience_s: float) -> RetryConfig:
    return {
        "max_retries": 20 if patience_s else 0,
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    }


def _pem(ca_bundle: str | None) -> str | None:
    """PEM text of a path or of itself."""
    if not ca_bundle or "-----BEGIN" in ca_bundle:
        return ca_bundle
    try:
        text = Path(ca_bundle).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SpecError(f"the CA bundle {ca_bundle} can't be read ({error.strerror}): correct `ca_bundle`") from error
    if "-----BEGIN CERTIFICATE" not in text:
        raise SpecError(f"{ca_bundle} holds no PEM certificate: correct `ca_bundle`")
    return text


# -- obstore's errors as ours -----------------------------------------------------------------------------------------

_REGION = "the bucket is in another region, or needs one to be named: set `region`"
_REFUSED = "the service refused the credentials: check that they belong to this endpoint and account"
_EXPIRED = "the credentials have expired: log in again"

_CODES: Mapping[str, tuple[type[CvlaunchError], str]] = {
    "NoSuchBucket": (SpecError, "there is no such bucket: correct its name, or make it"),
    "InvalidBucketName": (SpecError, "this is not a name that a bucket can have: correct it"),
    "PermanentRedirect": (SpecError, _REGION),
    "AuthorizationHeaderMalformed": (SpecError, _REGION),
    "IllegalLocationConstraintException": (SpecError, _REGION),
    "KeyTooLongError": (SpecError, "the path is too long for this service: shorten it"),
    "NotImplemented": (UnsupportedError, "the service can't do this: choose another one"),
    "ExpiredToken": (AuthError, _EXPIRED),
    "ExpiredTokenException": (AuthError, _EXPIRED),
    "TokenRefreshRequired": (AuthError, _EXPIRED),
    "InvalidAccessKeyId": (AuthError, _REFUSED),
    "InvalidToken": (AuthError, _REFUSED),
    "SignatureDoesNotMatch": (AuthError, _REFUSED),
    "RequestTimeTooSkewed": (AuthError, "the clock of this machine is wrong: set it"),
    "QuotaExceeded": (CapacityError, "the quota of the bucket is used up: make room, or ask for more"),
    "XMinioStorageFull": (CapacityError, "the service's disks are full: make room"),
}
"""`<Code>` in the body of a refusal. S3: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""

_TEXTS: tuple[tuple[str, type[CvlaunchError], str], ...] = (
    (r"redirect without LOCATION", SpecError, _REGION),
    (r"UnknownIssuer|invalid peer certificate|certificate verify failed", SpecError,
     "the service's certificate is not trusted here: set `ca_bundle` to its authority"),
    (r"URL scheme is not allowed|builder error|RelativeUrlWithoutBase", SpecError,
     "the endpoint is not a URL: correct it"),
    (r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal", AuthError,
     "no credentials found: log in, or set the variables that hold them"),
    (r"status code: 403|lacked the necessary privileges", AuthError,
     "this identity is not allowed to: it needs {permission}"),
    (r"status code: 401", AuthError, _REFUSED),
    (r"status code: 507", CapacityError, "the service has no room left"),
    (r"status code: 501", UnsupportedError, "the service can't do this: choose another one"),
    (r"status code: (5\d\d|429|408)", UnreachableError, "the service is overloaded or broken: try again"),
    (r"status code: 4\d\d", SpecError, "the service refused the request"),
    (r"error sending request|timed out|TimedOut|Connect", UnreachableError, "the service did not answer: try again"),
)  # fmt: skip
"""Looked for from top to bottom in the whole text of an error."""


@contextmanager
def object_errors(base: str, operation: Operation, *, path: str | None = None) -> Iterator[None]:
    """obstore's errors as ours, naming place and operation. base: `s3://bucket`; path: what was asked for.

    FileNotFoundError and FileExistsError stay, with a plain text.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise _translated(error, base, operation, path or base) from error


def _translated(error: Exception, base: str, operation: Operation, path: str) -> Exception:
    from obstore import exceptions as theirs

    text = str(error)
    code = match[1] if (match := re.search(r"<Code>(\w+)</Code>", text)) else ""
    if code in _CODES:
        kind, reason = _CODES[code]
        return kind(f"{base if kind is SpecError else path}: can't {operation}: {reason} ({code})")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", path)
    if isinstance(error, theirs.AlreadyExistsError | theirs.PreconditionError):
        return FileExistsError(errno.EEXIST, "there is one already", path)
    if isinstance(error, theirs.InvalidPathError):
        return IntegrityError(
            f"{path} holds a path that can't be brought to a folder ({_first(text)}): rename or remove it"
        )
    if isinstance(error, theirs.UnauthenticatedError) and (match := re.search(r"provider: \w+: (.*)", text)):
        return AuthError(f"{path}: can't {operation}: {match[1]}")
    if isinstance(error, theirs.NotSupportedError):
        return UnsupportedError(f"{path}: can't {operation}: {_first(text)}")
    if isinstance(error, theirs.UnknownConfigurationKeyError):
        return SpecError(f"{base}: {_first(text)}")
    return _by_text(text, base, operation, path)


def _by_text(text: str, base: str, operation: Operation, path: str) -> Exception:
    if re.search(r"status code: 416|StartTooLarge", text):
        return _AfterEndError(path)
    if "NotPartial" in text:
        return _NoRangesError(path)
    for pattern, kind, reason in _TEXTS:
        if re.search(pattern, text):
            permission = _PERMISSIONS.get((scheme(base), operation), f"the permission to {operation}")
            found = reason.format(permission=permission)
            return kind(f"{path}: can't {operation}: {found} ({_first(text)})")
    return UnreachableError(f"{path}: can't {operation}: {_first(text)}: try again")


def _first(text: str) -> str:
    """The first line of an error of obstore without its debug output, at most 300 characters."""
    return text.split("\n", 1)[0].strip()[:300]
