"""serve.py as a process of its own, as it runs in a pod, and clients of it over a plain socket."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.kube import serve
from launcher.kube.volume import FolderClient

__all__ = ["FileServer", "file_server", "whole_machine"]


class FileServer:
    """port: as announced. process: ends with the test, or by itself."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.port = int(process.stdout.readline().rpartition(":")[2])
        self.connections = 0

    def connect(self) -> socket.socket:
        self.connections += 1
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def client(self) -> FolderClient:
        return FolderClient(self.connect, sleep=lambda seconds: None)


@contextlib.contextmanager
def file_server(folder: Path, *before: str, idle_s: float = 600) -> Iterator[FileServer]:
    """before: a command that starts the interpreter, such as `setpriv`."""
    text = Path(serve.__file__).read_text()
    command = [*before, sys.executable, "-I", "-c", text, "0", str(folder), str(idle_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield FileServer(process)
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def whole_machine() -> Iterator[FolderClient]:
    """All folders of this machine."""
    with file_server(Path("/")) as server, contextlib.closing(server.client()) as client:
        yield client
