"""Debian's docker-registry on 127.0.0.1, plain HTTP: open, with a password, or read-only."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.services.ports import free_port

__all__ = ["Registry", "registry_server"]

_LISTENS = re.compile(r"listening on (127\.0\.0\.1:\d+)\D")


@dataclass(frozen=True)
class Registry:
    """address: host:port. configuration: a registries.conf that lets podman and buildah talk to it without TLS."""

    address: str
    folder: Path
    configuration: Path

    @property
    def environment(self) -> dict[str, str]:
        """What an engine's environment needs."""
        return {"CONTAINERS_REGISTRIES_CONF": str(self.configuration)}

    @property
    def size(self) -> int:
        """Bytes in all of its blobs."""
        return sum(path.stat().st_size for path in self.folder.rglob("blobs/**/data"))


@contextlib.contextmanager
def registry_server(
    folder: Path, *, login: tuple[str, str] | None = None, read_only: bool = False, keep_address: bool = False
) -> Iterator[Registry]:
    """A process of its own that keeps its blobs below `folder`, which may be one that another server has filled.

    keep_address: listen where that one did, if nobody else does now. Podman remembers by address what a registry has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, settings = folder / "registry.log", folder / "registry.yml"
    settings.write_text(_settings(folder, login, read_only, _port_of(settings) if keep_address else 0))
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["docker-registry", "serve", settings], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        address = _address(process, log)
        configuration = folder / "registries.conf"
        configuration.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
        yield Registry(address, folder, configuration)
    finally:
        process.terminate()
        process.wait(60)


def _port_of(settings: Path) -> int:
    """The one that an earlier server wrote there, if it is free; else another that is."""
    with contextlib.suppress(OSError, ValueError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = int(json.loads(settings.read_text())["http"]["addr"].rpartition(":")[2])
        probe.bind(("127.0.0.1", port))
        return port or free_port()
    return free_port()


def _settings(folder: Path, login: tuple[str, str] | None, read_only: bool, port: int) -> str:
    """JSON is YAML. Port 0 is any that is free."""
    storage = {
        "filesystem": {"rootdirectory": str(folder / "storage")},
        "delete": {"enabled": True},
        "maintenance": {"uploadpurging": {"enabled": False}, "readonly": {"enabled": read_only}},
    }
    settings: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": storage,
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if login:
        passwords = folder / "htpasswd"
        passwords.write_text(f"{login[0]}:{_bcrypt(login[1])}\n")
        settings["auth"] = {"htpasswd": {"realm": "cvlaunch tests", "path": str(passwords)}}
    return json.dumps(settings)


def _bcrypt(password: str) -> str:
    """The only form that the registry takes; Python has none, Debian's libcrypt has."""
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    salt = b"$2b$05$" + os.urandom(11).hex().encode()
    hashed: bytes = library.crypt(password.encode(), salt)
    return hashed.decode()


def _address(process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := _LISTENS.search(log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"docker-registry did not start: {log.read_text()}")
