"""Commands in pods and ports of pods: against both versions of the protocol at the wire, and in a real container."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import WSMsgType, web

from launcher.errors import AuthError, SpecError, UnreachableError
from launcher.kube.client import Access, Cluster
from launcher.kube.sockets import exec_in, forward
from tests.services.kube import KubeCluster

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"


@dataclass
class Kubelet:
    """Runs commands here; on a terminal it only repeats what it gets, in capitals, until a `q`.

    status: given instead of running a command. forwarded: bytes for a port, as its channel gets them.
    """

    protocols: Sequence[str] = (V5, V4)
    status: dict[str, Any] | None = None
    silent: bool = False
    queries: list[list[tuple[str, str]]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    port: int = 0

    async def exec(self, request: web.Request) -> web.WebSocketResponse:
        if request.headers.get("Authorization") != "Bearer good":
            raise web.HTTPUnauthorized
        self.queries.append(list(request.query.items()))
        channel = web.WebSocketResponse(protocols=self.protocols)
        await channel.prepare(request)
        if self.silent:
            await channel.close()
            return channel
        if self.status is None:
            run = self._repeat if request.query["tty"] == "true" else self._run
            self_status = await run(channel, request.query.getall("command"))
        else:
            self_status = self.status
        await channel.send_bytes(b"\x03" + json.dumps(self_status).encode())
        await channel.close()
        return channel

    async def _run(self, channel: web.WebSocketResponse, command: Sequence[str]) -> dict[str, Any]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        feeding = asyncio.ensure_future(self._feed(channel, process))
        assert process.stdout
        assert process.stderr
        await asyncio.gather(_drain(channel, 1, process.stdout), _drain(channel, 2, process.stderr))
        code = await process.wait()
        feeding.cancel()
        cause = {"reason": "ExitCode", "message": str(code)}
        failed = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [cause]}}
        return failed if code else {"status": "Success"}

    async def _feed(self, channel: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
        assert process.stdin
        async for message in channel:
            if message.data[0] == 0:
                process.stdin.write(message.data[1:])
            elif message.data == b"\xff\x00":
                assert channel.ws_protocol == V5
                process.stdin.close()

    async def _repeat(self, channel: web.WebSocketResponse, _: Sequence[str]) -> dict[str, Any]:
        async for message in channel:
            if message.data[0] == 4:
                size = json.loads(message.data[1:])
                self.sizes.append((size["Width"], size["Height"]))
                await channel.send_bytes(b"\x01size\r\n")
            elif b"q" in message.data[1:]:
                break
            else:
                await channel.send_bytes(b"\x01" + message.data[1:].upper())
        return {"status": "Success"}

    async def forward(self, request: web.Request) -> web.WebSocketResponse:
        channel = web.WebSocketResponse(protocols=[V4])
        await channel.prepare(request)
        port = int(request.query["ports"])
        for number in (b"\x00", b"\x01"):
            await channel.send_bytes(number + struct.pack("<H", port))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await channel.send_bytes(b"\x01connection refused")
            await channel.close()
            return channel
        drain = asyncio.ensure_future(_drain(channel, 0, reader))
        drain.add_done_callback(lambda _: asyncio.ensure_future(channel.close()))
        async for message in channel:
            if message.type == WSMsgType.BINARY:
                writer.write(message.data[1:])
        writer.close()
        await drain
        return channel


async def _drain(channel: web.WebSocketResponse, number: int, stream: asyncio.StreamReader) -> None:
    while data := await stream.read(65536):
        if not channel.closed:
            await channel.send_bytes(bytes([number]) + data)


def serve(kubelet: Kubelet) -> Callable[[], None]:
    """In a thread; what ends it."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def run() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods/p/exec", kubelet.exec)
        app.router.add_get("/api/v1/namespaces/ns/pods/p/portforward", kubelet.forward)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=10)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        kubelet.port = runner.addresses[0][1]
        ready.set()
        return runner

    def main() -> None:
        runner = loop.run_until_complete(run())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(60)

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    return end


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    kubelet = Kubelet()
    end = serve(kubelet)
    yield kubelet
    end()


@pytest.fixture
def reach(kubelet: Kubelet, tmp_path: Path) -> Callable[..., Cluster]:
    def reach(token: str = "good") -> Cluster:
        path = tmp_path / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "current-context": "k",
                    "contexts": [{"name": "k", "context": {"cluster": "c", "user": "u", "namespace": "ns"}}],
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{kubelet.port}"}}],
                    "users": [{"name": "u", "user": {"token": token}}],
                }
            )
        )
        return Cluster(Access(kubeconfig=str(path)))

    return reach


@dataclass
class Files:
    """The three descriptors of a command, as files."""

    folder: Path

    def run(self, cluster: Cluster, command: Sequence[str], *, given: bytes | None = b"", pod: str = "p") -> int:
        source = self.folder / "in"
        source.write_bytes(given or b"")
        with source.open("rb") as stdin, self.path("out").open("wb") as out, self.path("err").open("wb") as err:
            fd = None if given is None else stdin.fileno()
            return exec_in(
                cluster, pod, "train", command, tty=False, stdin=fd, stdout=out.fileno(), stderr=err.fileno()
            )

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def out(self) -> bytes:
        return self.path("out").read_bytes()

    @property
    def err(self) -> bytes:
        return self.path("err").read_bytes()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("protocols", [(V5, V4), (V4,)], ids=["v5", "v4"])
def test_output_errors_and_exit_code(
    kubelet: Kubelet, reach: Callable[..., Cluster], files: Files, protocols: Sequence[str]
) -> None:
    kubelet.protocols = protocols
    assert files.run(reach(), ["sh", "-c", "echo out; echo 'two  words' >&2; exit 7"]) == 7
    assert (files.out, files.err) == (b"out\n", b"two  words\n")
    assert files.run(reach(), ["true"], given=None) == 0
    command = [value for key, value in kubelet.queries[0] if key == "command"]
    assert command == ["sh", "-c", "echo out; echo 'two  words' >&2; exit 7"]
    assert [dict(query)["stdin"] for query in kubelet.queries] == ["true", "false"]
    assert dict(kubelet.queries[0])["container"] == "train"


def test_a_command_that_reads_to_the_end(reach: Callable[..., Cluster], files: Files) -> None:
    given = os.urandom(300_000)
    assert files.run(reach(), ["cat"], given=given) == 0
    assert files.out == given


def test_dev_null_is_no_input(kubelet: Kubelet, reach: Callable[..., Cluster], files: Files) -> None:
    """So that also where input can't be ended nothing waits for it."""
    with Path(os.devnull).open() as null, files.path("out").open("wb") as out:
        assert exec_in(reach(), "p", "train", ["true"], tty=False, stdin=null.fileno(), stdout=out.fileno()) == 0
    assert dict(kubelet.queries[0])["stdin"] == "false"


NOT_FOUND = 'error executing command in container: exec: "nope": executable file not found in $PATH: unknown'
DENIED = 'error executing command in container: exec: "/etc/passwd": permission denied: unknown'


@pytest.mark.parametrize(("message", "code"), [(NOT_FOUND, 127), (DENIED, 126)])
def test_a_command_that_is_not_there(
    kubelet: Kubelet, reach: Callable[..., Cluster], files: Files, message: str, code: int
) -> None:
    kubelet.status = {"status": "Failure", "reason": "InternalError", "message": message}
    assert files.run(reach(), ["nope"]) == code
    assert files.err.decode() == f"{message}\n"


def test_a_container_that_is_gone(kubelet: Kubelet, reach: Callable[..., Cluster], files: Files) -> None:
    kubelet.status = {"status": "Failure", "message": 'container not found ("train")'}
    with pytest.raises(SpecError, match="pod p: the command can't be run: container not found"):
        files.run(reach(), ["true"])


def test_a_connection_that_is_lost(kubelet: Kubelet, reach: Callable[..., Cluster], files: Files) -> None:
    kubelet.silent = True
    with pytest.raises(UnreachableError, match="pod p: the connection"):
        files.run(reach(), ["true"])


def test_no_entry(reach: Callable[..., Cluster], files: Files) -> None:
    with pytest.raises(AuthError, match="log in again"):
        files.run(reach("bad"), ["true"])
    with pytest.raises(SpecError, match="404"):
        files.run(reach(), ["true"], pod="other")


def test_a_terminal(kubelet: Kubelet, reach: Callable[..., Cluster]) -> None:
    """Keys go as they are, Ctrl-C too; its size follows; afterwards all is as it was."""
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    handler = signal.getsignal(signal.SIGWINCH)
    resize(ours, 120, 40)
    seen: list[bytes] = []

    def user() -> None:
        for key, answer in ((b"", b"size"), (b"a\x03b", b"A\x03B")):
            os.write(ours, key)
            while not seen or answer not in b"".join(seen):
                seen.append(os.read(ours, 1024))
        resize(ours, 100, 30)
        os.kill(os.getpid(), signal.SIGWINCH)
        while (100, 30) not in kubelet.sizes:
            time.sleep(0.005)
        os.write(ours, b"q")

    thread = threading.Thread(target=user)
    thread.start()
    try:
        assert exec_in(reach(), "p", "train", ["bash"], tty=True, stdin=theirs, stdout=theirs) == 0
    finally:
        thread.join()
    assert kubelet.sizes[0] == (120, 40)
    assert termios.tcgetattr(theirs) == before
    assert signal.getsignal(signal.SIGWINCH) is handler
    os.close(ours)
    os.close(theirs)


def resize(fd: int, columns: int, lines: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


# -- ports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that sends everything back, and ends when it has got `end`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    while (data := connection.recv(65536)) and data != b"end":
                        connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    with connection.makefile("rb") as file:
        return file.read(size)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_pump" in thread.name}


@pytest.fixture
def gone() -> Callable[[], bool]:
    """Whether none is left of those that the test has started; waits for it."""
    before = threads()

    def gone() -> bool:
        end = time.monotonic() + 60
        while threads() - before and time.monotonic() < end:
            time.sleep(0.005)
        return not threads() - before

    return gone


def test_a_port(reach: Callable[..., Cluster], echo: int, gone: Callable[[], bool]) -> None:
    data = os.urandom(1 << 20)
    with forward(reach(), "p", echo) as connection:
        threading.Thread(target=connection.sendall, args=(data,)).start()
        assert read_exactly(connection, len(data)) == data
    assert gone()
    with forward(reach(), "p", echo) as connection:  # and the other side may end it
        connection.sendall(b"end")
        assert connection.recv(10) == b""
    assert gone()


def test_a_port_where_nobody_listens(reach: Callable[..., Cluster], gone: Callable[[], bool]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with forward(reach(), "p", free.getsockname()[1]) as connection:
            assert connection.recv(10) == b""
    assert gone()


# -- a real container -----------------------------------------------------------------------------------------------

SERVE = """
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.needs("podman", "debootstrap")
def test_in_a_pod(kube: KubeCluster, trainer_image: str, files: Files) -> None:
    namespace = kube.namespace()
    kube.serve_image("registry.example.com/trainer:1", image=trainer_image)
    container = {
        "name": "train",
        "image": "registry.example.com/trainer:1",
        "command": ["python3", "-c", SERVE],
        "workingDir": "/etc",
    }
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 0}}
    kube.create("Pod", namespace, pod)
    kube.wait_for("Pod", namespace, "p", lambda found: found["status"].get("phase") == "Running")
    cluster = Cluster(Access(namespace=namespace))
    assert files.run(cluster, ["sh", "-c", "cat; echo oops >&2; exit 3"], given=b"hello") == 3
    assert (files.out, files.err) == (b"hello", b"oops\n")
    (port,) = kube.wait(lambda: list(cluster.lines(cluster.path("pods", "p", "log"))))
    connection = http.client.HTTPConnection("pod")
    connection.sock = forward(cluster, "p", int(port))
    connection.request("GET", "/hostname")
    assert connection.getresponse().read()
    connection.close()
    cluster.close()
