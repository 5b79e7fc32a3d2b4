"""Folders of a claim, `pvc://CLAIM/path`, as a store: HTTP to serve.py in a short-lived pod that mounts the claim."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlencode

from launcher.contract import SEGMENTS
from launcher.errors import IntegrityError, SpecError, UnreachableError
from launcher.kube.client import Cluster
from launcher.kube.helper import Helper, HelperSpec
from launcher.kube.serve import END
from launcher.stores.base import Entry
from launcher.stores.file_errors import file_error
from launcher.stores.folders import PROBE, copy_into_place
from launcher.stores.paths import bad_path, check_path, from_store

__all__ = ["FolderClient", "VolumeStore", "open_volume", "split_uri"]

_T = TypeVar("_T")

_BLOCK = 1 << 20
_KEPT = 8
"""Connections that wait for the next request."""
_SILENT_S = 60.0
"""How long an answer, or room for more bytes, is waited for."""
_PAUSES_S = (0.0, 0.2, 1.0, 3.0)
"""Before a request is sent again, once for each; the count starts anew when bytes came."""
_DELETED_AT_ONCE = 1000


@dataclass(frozen=True)
class VolumeStore:
    """The folder `root` of a claim, which need not exist before something is written; empty for the claim as a whole.

    Symbolic links inside count as files; a path that leads out of the folder through one is refused.
    in_place: of a run whose runner writes there itself, so that no file stands in segments and a follower need not ask
    for any.
    """

    claim: str
    root: str
    client: FolderClient
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.root and bad_path(self.root):
            raise SpecError(f"{self.uri!r} is not a folder of a claim; one looks like pvc://claim/runs")

    @property
    def uri(self) -> str:
        return f"pvc://{self.claim}/{self.root}".rstrip("/")

    def head(self, path: str) -> Entry | None:
        try:
            return self._repeated(lambda: self._head(check_path(path)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        if self.in_place and prefix == SEGMENTS:
            return
        found = self._repeated(lambda: self._whole("GET", "/list", check_path(prefix) if prefix else ""))
        for line in found.splitlines():
            value = json.loads(line)
            if "error" in value:
                raise self._error(value["error"], prefix)
            yield Entry(from_store(value["path"], self.uri), value["size"], value["modified"], value["etag"])

    def read(self, path: str) -> bytes:
        return self.read_range(path, 0)

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        if self.in_place and path.startswith(f"{SEGMENTS}/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.uri}/{path}")
        if end is not None and end <= start:
            self._repeated(lambda: self._head(check_path(path)))
            return b""
        return self._repeated(lambda: self._whole("GET", "/file", check_path(path), _range(start, end)))

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        check_path(path)
        if not if_absent:
            self._repeated(lambda: self._put(path, data, {}))
            return
        try:
            self._put(path, data, {"If-None-Match": "*"}, fresh=True)
        except _LostError as error:
            raise UnreachableError(
                f"{self.uri}/{path}: the connection broke ({error}); it may be there or not: look, and try again"
            ) from error

    def download(self, path: str, to: Path) -> Entry:
        check_path(path)
        with copy_into_place(to) as file:
            copy = _Copy(file)
            return self._repeated(lambda: self._fetch(path, copy), progress=file.tell)

    def delete(self, paths: Iterable[str]) -> None:
        checked = [check_path(path) for path in paths]
        for start in range(0, len(checked), _DELETED_AT_ONCE):
            body = json.dumps(checked[start : start + _DELETED_AT_ONCE]).encode()
            self._repeated(lambda body=body: self._whole("POST", "/delete", "", body=body))  # type: ignore[misc]

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        self.write(PROBE, b"")
        self.delete([PROBE])

    # -- one request --------------------------------------------------------------------------------------------------

    def _repeated(self, call: Callable[[], _T], *, progress: Callable[[], int] = lambda: 0) -> _T:
        return self.client.repeated(call, self.uri, progress=progress)

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        what: str,
        path: str,
        headers: Mapping[str, str] = {},
        *,
        body: Iterable[bytes | memoryview] = (),
        size: int = 0,
        fresh: bool = False,
    ) -> Iterator[http.client.HTTPResponse]:
        target = f"{what}?{urlencode({'root': self.root, 'path': path})}"
        with self.client.exchange(method, target, {**headers, "Content-Length": str(size)}, body, fresh) as answer:
            if word := answer.headers.get("X-Cvlaunch-Error"):
                answer.read()
                raise self._error(word, path)
            yield answer

    def _whole(self, method: str, what: str, path: str, headers: Mapping[str, str] = {}, *, body: bytes = b"") -> bytes:
        with self._answer(method, what, path, headers, body=[body], size=len(body)) as answer, _connection():
            return answer.read()

    def _head(self, path: str) -> Entry:
        with self._answer("HEAD", "/file", path) as answer:
            answer.read()
            return _entry(path, answer)

    def _put(self, path: str, data: bytes | Path, headers: Mapping[str, str], *, fresh: bool = False) -> None:
        blocks: Iterator[bytes] | Iterator[memoryview]
        with contextlib.ExitStack() as stack:
            if isinstance(data, Path):
                file = stack.enter_context(data.open("rb"))
                size = os.fstat(file.fileno()).st_size
                blocks = self._file_blocks(file, size, path)
            else:
                size, blocks = len(data), _bytes_blocks(data)
            answer = self._answer("PUT", "/file", path, headers, body=blocks, size=size, fresh=fresh)
            with answer as done, _connection():
                done.read()

    def _file_blocks(self, file: BinaryIO, size: int, path: str) -> Iterator[bytes]:
        """Not what is appended meanwhile."""
        while size:
            block = file.read(min(size, _BLOCK))
            if not block:
                raise self._error("CUT_SHORT", path)
            size -= len(block)
            yield block

    def _fetch(self, path: str, copy: _Copy) -> Entry:
        """On from where the bytes end that there are, unless the file is another by now."""
        if copy.of:
            headers = {**_range(copy.file.tell(), None), "If-Match": f'"{copy.of.etag}"'}
            with contextlib.suppress(_ChangedError), self._answer("GET", "/file", path, headers) as answer:
                return copy.take(answer, copy.of)
        copy.begin()
        with self._answer("GET", "/file", path) as answer:
            return copy.take(answer, _entry(path, answer))

    def _error(self, word: str, path: str) -> Exception:
        """word: of serve.py."""
        place = f"{self.uri}/{path}".rstrip("/")
        match word:
            case "CHANGED":
                return _ChangedError(place)
            case "CUT_SHORT":
                return IntegrityError(f"{path!r} in {self.uri} was cut short while it was copied: copy it again")
            case "LINK_OUT":
                return SpecError(f"{path!r} leaves {self.uri} through a symbolic link: remove the link")
            case "EEXIST":
                return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place)
            case "ENOENT":
                return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
            case _:
                return file_error(word, place)


@dataclass
class _Copy:
    """A download under way. of: what the bytes in `file` belong to."""

    file: BinaryIO
    of: Entry | None = None

    def begin(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.of = None

    def take(self, answer: http.client.HTTPResponse, entry: Entry) -> Entry:
        self.of = entry
        while self.file.tell() < entry.size:
            with _connection():
                block = answer.read(_BLOCK)
                if not block:
                    raise ConnectionError("it ended too early")
            self.file.write(block)
        return entry


class _LostError(Exception):
    """The connection broke in the middle of a request."""


class _ChangedError(Exception):
    """The file is not the one any more of which we have the beginning."""


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """What a connection says when it breaks, and nothing else: local files have errors, too."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise _LostError(str(error) or type(error).__name__) from error


class FolderClient:
    """HTTP to one serve.py, over a few connections that are kept. Thread-safe.

    connect: opens a connection. An OSError of it is one more connection that broke; what is ours is not repeated.
    """

    def __init__(self, connect: Callable[[], socket.socket], *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._connect, self._sleep = connect, sleep
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """Lets connections go; the next request makes a new one."""
        with self._lock:
            _close_all(self._idle)

    def repeated(self, call: Callable[[], _T], what: str, *, progress: Callable[[], int] = lambda: 0) -> _T:
        """Again, when the connection broke. progress: bytes so far. UnreachableError in the end."""
        failures = 0
        while True:
            before = progress()
            try:
                return call()
            except _LostError as error:
                failures = 0 if progress() > before else failures
                if failures == len(_PAUSES_S):
                    words = f"{what}: the connection breaks again and again ({error}): try again"
                    raise UnreachableError(words) from error
                self.close()  # they went the same way
                self._sleep(_PAUSES_S[failures])
                failures += 1

    @contextlib.contextmanager
    def exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: Iterable[bytes | memoryview], fresh: bool
    ) -> Iterator[http.client.HTTPResponse]:
        """One request. fresh: over a connection that has not waited, as it must not be sent twice."""
        connection = self._open() if fresh else self._take()
        answer = None
        try:
            answer = _ask(connection, method, target, headers, body)
            yield answer
        finally:
            if answer is not None and answer.isclosed() and not answer.will_close:
                self._give(connection)
            else:
                connection.close()

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._open()

    def _give(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(connection)
                return
        connection.close()

    def _open(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("volume")
        connection.auto_open = 0
        with _connection():
            connection.sock = self._connect()
        connection.sock.settimeout(_SILENT_S)
        return connection


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: Iterable[bytes | memoryview],
) -> http.client.HTTPResponse:
    with _connection():
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
    _send(connection, body)
    with _connection():
        answer = connection.getresponse()
        if answer.headers.get(END) != "1":
            raise ConnectionError("it ended too early")
        return answer


def _send(connection: http.client.HTTPConnection, blocks: Iterable[bytes | memoryview]) -> None:
    """Stops at an answer that comes before the end: it says why the rest would be in vain."""
    with selectors.DefaultSelector() as answers:
        answers.register(connection.sock, selectors.EVENT_READ)
        for block in blocks:
            if answers.select(0):
                return
            with _connection():
                connection.send(block)


def _bytes_blocks(data: bytes) -> Iterator[memoryview]:
    return (memoryview(data)[start : start + _BLOCK] for start in range(0, len(data), _BLOCK))


def _range(start: int, end: int | None) -> dict[str, str]:
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


def _entry(path: str, answer: http.client.HTTPResponse) -> Entry:
    """The same that FolderStore has for this file."""
    headers = answer.headers
    return Entry(path, int(headers["X-Size"]), float(headers["X-Modified"]), headers["ETag"].strip('"'))


def split_uri(uri: str) -> tuple[str, str]:
    """Claim and path, which may be empty, of `pvc://CLAIM/path`."""
    match = re.fullmatch(r"pvc://([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)(?:/(.*?))?/?", uri)
    path = (match[3] or "") if match else ""
    if not match or (path and bad_path(path)):
        raise SpecError(f"{uri!r} is not a folder of a claim; one looks like pvc://claim/runs")
    return match[1], path


def open_volume(
    cluster: Cluster,
    spec: HelperSpec,
    path: str,
    *,
    in_place: bool = False,
    wait_s: float = 180.0,
    sleep: Callable[[float], None] = time.sleep,
) -> VolumeStore:
    """The folder `path` of a claim. The first request makes a pod that serves it, or finds the one that others made.

    wait_s: how long a pod may take to start, for every request that needs a new one.
    """
    helper = Helper(cluster, spec, wait_s=wait_s, sleep=sleep)
    return VolumeStore(spec.claim, path, FolderClient(helper.connect, sleep=sleep), in_place)
