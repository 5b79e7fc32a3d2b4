"""Serves the files of one folder by HTTP/1.1 on the loopback, for whoever forwards a port to this container.

    python serve.py PORT FOLDER [IDLE_S]

Standard library only, and on its own: the text of this file is sent into containers, whatever version of cvlaunch they
have; Python 3.8 runs it. It ends by itself after IDLE_S seconds without a request (120).

    GET  /ping                          who is here
    HEAD /file?root=ROOT&path=PATH      size, time, ETag
    GET  /file?root=ROOT&path=PATH      bytes; `Range: bytes=4-` or `bytes=4-9`, `If-Match: ETAG`
    PUT  /file?root=ROOT&path=PATH      all or nothing; `If-None-Match: *` for a file that must not be there yet
    GET  /list?root=ROOT&path=PREFIX    a JSON object a line, sorted by path; an error on the way is the last of them
    POST /delete?root=ROOT              a JSON list of paths; what is missing is fine; empty folders go, too

ROOT is a folder in FOLDER, PATH a file in ROOT; no link leads out of either. Files, times and ETags are those of
launcher.stores.FolderStore. What went wrong stands in the header `X-Cvlaunch-Error`: the name of an errno, or
BAD_PATH, LINK_OUT, CHANGED, CUT_SHORT.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import signal
import socketserver
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

__all__ = ["END", "HELLO", "FolderServer", "main"]

HELLO = b"cvlaunch volume\n"
END = "X-Cvlaunch-End"
"""The last header of every answer: a connection that breaks before would seem to have ended well."""
_CHUNK = 1 << 20
_DRAIN_S = 30.0
_SILENT_S = 600.0
"""A connection on which nothing came for so long is closed."""
_STATUS = {"ENOENT": 404, "EEXIST": 412, "CHANGED": 412, "BAD_PATH": 400, "LINK_OUT": 400, "CUT_SHORT": 400}
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class _RefusedError(Exception):
    """Its argument is the word of `X-Cvlaunch-Error`."""


class FolderServer(socketserver.ThreadingTCPServer):
    """A thread for each connection. `serve_forever` ends with SystemExit when nobody asked for anything for idle_s."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, folder: Path, *, idle_s: float = 120.0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._busy = 0
        self._last = time.monotonic()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._last = time.monotonic()

    def service_actions(self) -> None:
        with self._lock:
            if not self._busy and time.monotonic() - self._last > self._idle_s:
                raise SystemExit(0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _SILENT_S
    server: FolderServer

    def do_GET(self) -> None:
        self._act({"/ping": self._ping, "/file": self._read, "/list": self._list})

    def do_HEAD(self) -> None:
        self._act({"/file": self._head})

    def do_PUT(self) -> None:
        self._act({"/file": self._write})

    def do_POST(self) -> None:
        self._act({"/delete": self._delete})

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def _act(self, acts: dict[str, Callable[[], None]]) -> None:
        url = urlsplit(self.path)
        self._query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self._left = int(self.headers.get("Content-Length") or 0)
        self._answered = False
        act = acts.get(url.path)
        with self.server.busy():
            try:
                if act is None:
                    raise _RefusedError("BAD_PATH")
                act()
            except _RefusedError as error:
                self._fail(str(error))
            except OSError as error:
                self._fail(errno.errorcode.get(error.errno or 0, "EIO"))
            self._drain()

    # -- what is asked for --

    def _ping(self) -> None:
        self._answer(200, {"Content-Length": len(HELLO)})
        self.wfile.write(HELLO)

    def _head(self) -> None:
        facts = _facts(self._there())
        if facts is None:
            raise _RefusedError("ENOENT")
        self._answer(200, {**_headers(facts), "Content-Length": facts.st_size})

    def _read(self) -> None:
        with open(self._there(), "rb", opener=_open_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise _RefusedError("ENOENT")
            if self.headers.get("If-Match", _etag(facts)) != _etag(facts):
                raise _RefusedError("CHANGED")
            start, end = self._range(facts.st_size)
            self._answer(206 if start < end else 416, {**_headers(facts), "Content-Length": end - start})
            if start < end and self.connection.sendfile(file, start, end - start) < end - start:
                self.close_connection = True  # it shrank meanwhile: the receiver sees that bytes are missing

    def _list(self) -> None:
        prefix = self._query.get("path", "")
        root, top = self._root(), self._there()
        self._answer(200, {"Transfer-Encoding": "chunked"})
        block = bytearray()
        for line in _lines(top, prefix + "/" if prefix else "", root):
            block += line
            if len(block) > 1 << 16:
                self._chunk(block)
                block.clear()
        self._chunk(block)
        self.wfile.write(b"0\r\n\r\n")

    def _write(self) -> None:
        to = self._there(replaced=True)
        _make_folder(to.parent)
        part = to.with_name(f".{to.name[:200]}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as file:
                self._receive(file)
            if self.headers.get("If-None-Match") == "*":
                _link_new(part, to)
            else:
                part.replace(to)
            self._answer(201, {**_headers(to.stat()), "Content-Length": 0})
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def _delete(self) -> None:
        for path in json.loads(self._body()):
            full = self._place(path, replaced=True)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                full.unlink()
            self._remove_empty(full.parent)
        self._answer(200, {"Content-Length": 0})

    def _remove_empty(self, folder: Path) -> None:
        """Up to ROOT, as an object store has no folders either."""
        root = self._root()
        with contextlib.suppress(OSError):  # the first that still holds something ends it
            while folder != self.server.folder and (folder == root or root in folder.parents):
                folder.rmdir()
                folder = folder.parent

    # -- where it is --

    def _root(self) -> Path:
        folder, root = self.server.folder, self._query.get("root", "")
        full = folder / _plain(root) if root else folder
        if not _below(full, folder):
            raise _RefusedError("LINK_OUT")
        return full

    def _there(self, replaced: bool = False) -> Path:
        return self._place(self._query.get("path", ""), replaced)

    def _place(self, path: str, replaced: bool) -> Path:
        """replaced: the file itself may be a link, as it is not followed."""
        root = self._root()
        full = root / _plain(path) if path else root
        if not _below(full.parent if replaced else full, root):
            raise _RefusedError("LINK_OUT")
        return full

    def _range(self, size: int) -> tuple[int, int]:
        """Start and end, without the end; equal where there is nothing."""
        match = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "bytes=0-"))
        if not match:
            raise _RefusedError("BAD_PATH")
        end = min(size, int(match.group(2)) + 1) if match.group(2) else size
        return min(int(match.group(1)), end), end

    # -- bytes in, bytes out --

    def _receive(self, file: BinaryIO) -> None:
        while self._left:
            block = self._some()
            if not block:
                raise _RefusedError("CUT_SHORT")
            file.write(block)

    def _body(self) -> bytes:
        return b"".join(iter(self._some, b""))

    def _some(self) -> bytes:
        block = self.rfile.read1(min(self._left, _CHUNK)) if self._left else b""
        self._left -= len(block)
        return block

    def _drain(self) -> None:
        """What still comes is read for a while: an answer is lost if the connection is closed before."""
        if not self._left:
            return
        self.close_connection = True
        end = time.monotonic() + _DRAIN_S
        self.connection.settimeout(_DRAIN_S)
        with contextlib.suppress(OSError):
            while time.monotonic() < end and self._some():
                pass

    def _answer(self, status: int, headers: dict[str, Any]) -> None:
        self._answered = True
        self.send_response_only(status)
        for name, value in {**headers, END: 1}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _chunk(self, block: bytearray) -> None:
        if block:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), bytes(block)))

    def _fail(self, word: str) -> None:
        if self._answered:
            self.close_connection = True
            return
        headers: dict[str, Any] = {"X-Cvlaunch-Error": word, "Content-Length": 0}
        if self._left:
            headers["Connection"] = "close"
        with contextlib.suppress(OSError):
            self._answer(_STATUS.get(word, 409), headers)


def _plain(path: str) -> str:
    """`path` itself, if it is relative and can't leave the folder that it is in."""
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise _RefusedError("BAD_PATH")
    return path


def _below(path: Path, root: Path) -> bool:
    real, top = os.path.realpath(str(path)), os.path.realpath(str(root))
    return os.path.commonpath((real, top)) == top


def _open_at_once(path: str, flags: int) -> int:
    """A pipe does not wait for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # which is what a name that must be new would say
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _link_new(part: Path, to: Path) -> None:
    """A hard link fails if the name is there, in one step; where links are unknown, O_EXCL does."""
    try:
        os.link(part, to)
    except FileExistsError:
        raise
    except OSError:
        with part.open("rb") as source, to.open("xb") as file:
            for block in iter(lambda: source.read(_CHUNK), b""):
                file.write(block)


def _facts(full: Path) -> Any:
    """None for what is missing, no regular file, or a loop of links."""
    try:
        facts = full.stat()
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    return facts if stat.S_ISREG(facts.st_mode) else None


def _etag(facts: os.stat_result) -> str:
    return f'"{facts.st_mtime_ns:x}-{facts.st_size:x}-{facts.st_ino:x}"'


def _headers(facts: os.stat_result) -> dict[str, Any]:
    """X-Modified: Unix seconds, to the last digit."""
    return {"ETag": _etag(facts), "X-Modified": repr(facts.st_mtime), "X-Size": facts.st_size}


def _lines(top: Path, prefix: str, root: Path) -> Iterator[bytes]:
    try:
        yield from _walk(str(top), prefix, root)
    except OSError as error:
        yield _line({"error": errno.errorcode.get(error.errno or 0, "EIO")})


def _walk(folder: str, prefix: str, root: Path) -> Iterator[bytes]:
    for item in _scan(folder):
        path = prefix + item.name
        if item.is_dir(follow_symlinks=False):
            yield from _walk(item.path, path + "/", root)
            continue
        outside = item.is_symlink() and not _below(Path(item.path), root)
        facts = None if outside or _is_part(item.name) else _facts(Path(item.path))
        if facts:
            etag = _etag(facts).strip('"')
            yield _line({"path": path, "size": facts.st_size, "modified": facts.st_mtime, "etag": etag})


def _scan(folder: str) -> Any:
    """In the order of their paths: a folder sorts as `name/`. Empty if the folder isn't there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return sorted(found, key=lambda item: item.name + "/" * item.is_dir(follow_symlinks=False))
    return []


def _is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def main(port: str, folder: str, idle_s: str = "120") -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as process 1 it would not be heard otherwise
    os.umask(0o002)  # a run writes into folders that are made here, by the volume's group if it has another user
    with FolderServer(int(port), Path(folder), idle_s=float(idle_s)) as server:
        sys.stdout.write(f"serving {folder} on 127.0.0.1:{server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=min(0.5, float(idle_s) / 4))


if __name__ == "__main__":
    main(*sys.argv[1:])
