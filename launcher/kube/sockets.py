"""What goes over websockets: a command in a pod, and a connection to one of its ports.

A frame is the number of a channel, one byte, and data of that channel. Protocols of kubernetes/apimachinery
pkg/util/remotecommand: v4.channel.k8s.io everywhere; v5 (servers from 1.30 on) can end a channel, so that a command
which reads to the end of its input gets to see one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.errors import SpecError, UnreachableError
from launcher.kube.client import Cluster

if TYPE_CHECKING:
    import websocket

__all__ = ["exec_in", "forward"]

_V5, _V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
_STDIN, _STDOUT, _STDERR, _STATUS, _SIZE, _END = 0, 1, 2, 3, 4, 255
_DATA, _ERROR = 0, 1
_BLOCK = 32 * 1024
_PING_S = 30.0
"""More often than anything between us and the pod gives up an idle connection."""


# -- a command --------------------------------------------------------------------------------------------------------


def exec_in(
    cluster: Cluster,
    pod: str,
    container: str,
    command: Sequence[str],
    *,
    tty: bool,
    stdin: int | None = 0,
    stdout: int = 1,
    stderr: int = 2,
) -> int:
    """Runs a command in a container of a running pod; its exit code, as a shell's for one that can't be run.

    stdin: None or /dev/null for none. tty: `stdin` and `stdout` are a terminal, which is raw meanwhile.
    """
    stdin = None if stdin is not None and _is_null(stdin) else stdin
    query = [
        ("container", container),
        *(("command", word) for word in command),
        ("stdin", _flag(stdin is not None)),
        ("stdout", "true"),
        ("stderr", _flag(not tty)),
        ("tty", _flag(tty)),
    ]
    channel = cluster.socket(cluster.path("pods", pod, "exec"), query=query, protocol=f"{_V5},{_V4}")
    keys = _Keys(channel, stdin, stdout if tty else None)
    try:
        with keys, _raw(stdin if tty else None):
            status = _copy(channel, {_STDOUT: stdout, _STDERR: stderr})
    finally:
        _close(channel)
    if status is None:
        raise UnreachableError(f"pod {pod}: the connection to the command was lost: is it still running there?")
    return _exit_code(status, stderr, pod=pod)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _is_null(fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(os.devnull))  # noqa: PTH116
    except OSError:  # closed
        return True


def _copy(channel: websocket.WebSocket, to: Mapping[int, int]) -> dict[str, Any] | None:
    """Writes what comes; the Status that ends it."""
    status = None
    for number, data in _frames(channel):
        if number in to:
            _write(to[number], data)
        elif number == _STATUS and data:
            status = json.loads(data)
    return status


def _frames(channel: websocket.WebSocket) -> Iterator[tuple[int, bytes]]:
    """(channel, data), until the other side is gone."""
    import websocket

    try:
        while True:
            opcode, data = channel.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return
            if data:
                yield data[0], bytes(data[1:])
    except (websocket.WebSocketException, OSError):
        return


def _close(channel: websocket.WebSocket) -> None:
    if channel.sock:
        channel.sock.close()


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _exit_code(status: Mapping[str, Any], stderr: int, *, pod: str) -> int:
    if status.get("status") == "Success":
        return 0
    causes = (status.get("details") or {}).get("causes") or ()
    for cause in causes:
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    message = str(status.get("message", "")).strip()
    for code, pattern in ((127, r"not found|no such file"), (126, r"permission denied|exec format error")):
        if re.search(pattern, message, re.IGNORECASE) and "container not found" not in message:
            _write(stderr, f"{message}\n".encode())
            return code
    raise SpecError(f"pod {pod}: the command can't be run: {message or 'no reason given'}")


class _Keys:
    """Sends what comes in, and the size of the terminal, in a thread of its own."""

    def __init__(self, channel: websocket.WebSocket, stdin: int | None, terminal: int | None) -> None:
        self._channel, self._stdin, self._terminal = channel, stdin, terminal
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._before: Any = None

    def __enter__(self) -> None:
        if self._watches_size:
            self._before = signal.signal(signal.SIGWINCH, lambda number, frame: self._say(b"s"))
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._watches_size:
            signal.signal(signal.SIGWINCH, self._before)
        self._say(b"e")
        self._thread.join()
        os.close(self._woken)
        os.close(self._wake)

    @property
    def _watches_size(self) -> bool:
        return self._terminal is not None and threading.current_thread() is threading.main_thread()

    def _say(self, word: bytes) -> None:
        os.write(self._wake, word)

    def _run(self) -> None:
        import websocket

        with contextlib.suppress(websocket.WebSocketException, OSError):  # the reader sees that it is gone, too
            self._send_size()
            while self._step():
                pass

    def _step(self) -> bool:
        """False: this was the last."""
        watched = [self._woken] if self._stdin is None else [self._woken, self._stdin]
        ready, _, _ = select.select(watched, [], [], _PING_S)
        if self._woken in ready:
            if b"e" in os.read(self._woken, 64):
                return False
            self._send_size()
        elif ready:
            self._send_input()
        else:
            self._channel.ping()
        return True

    def _send_input(self) -> None:
        data = os.read(self._stdin, _BLOCK) if self._stdin is not None else b""
        if data:
            self._channel.send_binary(bytes([_STDIN]) + data)
            return
        self._stdin = None
        if self._channel.getsubprotocol() == _V5:
            self._channel.send_binary(bytes([_END, _STDIN]))

    def _send_size(self) -> None:
        if self._terminal is not None:
            with contextlib.suppress(OSError):  # not a terminal
                size = os.get_terminal_size(self._terminal)
                words = json.dumps({"Width": size.columns, "Height": size.lines})
                self._channel.send_binary(bytes([_SIZE]) + words.encode())


@contextlib.contextmanager
def _raw(fd: int | None) -> Iterator[None]:
    """Every key goes to the command, Ctrl-C too."""
    if fd is None or sys.platform == "win32" or not os.isatty(fd):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# -- a port -----------------------------------------------------------------------------------------------------------


def forward(cluster: Cluster, pod: str, port: int) -> socket.socket:
    """A connection to a port of a pod, on its loopback too; it ends when either side closes it.

    A port where nobody listens is one that closes at once.
    """
    path = cluster.path("pods", pod, "portforward")
    channel = cluster.socket(path, query=[("ports", str(port))], protocol=_V4)
    ours, theirs = socket.socketpair()
    up = threading.Thread(target=_pump_up, args=(theirs, channel), daemon=True)
    threading.Thread(target=_pump_down, args=(channel, theirs, up), daemon=True).start()
    return ours


def _pump_up(local: socket.socket, channel: websocket.WebSocket) -> None:
    import websocket

    with contextlib.suppress(websocket.WebSocketException, OSError):
        while data := local.recv(_BLOCK):
            channel.send_binary(bytes([_DATA]) + data)
    with contextlib.suppress(websocket.WebSocketException, OSError):
        channel.send_close()
        if sock := channel.sock:
            sock.shutdown(socket.SHUT_RDWR)  # wakes the reader; what was sent still arrives


def _pump_down(channel: websocket.WebSocket, local: socket.socket, up: threading.Thread) -> None:
    """The first frame of each channel only repeats the port's number."""
    up.start()
    begun = set[int]()
    with contextlib.suppress(OSError):
        for number, data in _frames(channel):
            if number not in begun:
                begun.add(number)
            elif number == _ERROR:
                break
            else:
                local.sendall(data)
    with contextlib.suppress(OSError):
        local.shutdown(socket.SHUT_RDWR)
    up.join()
    local.close()
    _close(channel)
