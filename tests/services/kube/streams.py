"""What of a pod is a stream: logs, exec, port-forward."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from tests.services.kube.answers import ApiError, bad_request
from tests.services.kube.containers import ContainerRun
from tests.services.kube.kubelet import Kubelet, PodWorker
from tests.services.kube.times import parse_time

__all__ = ["Cut", "exec_in", "forward_ports", "log_lines", "log_source", "parse_log_query"]

Json = dict[str, Any]

_POLL_S = 0.03
_EXEC = ("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
_FORWARD = ("v4.channel.k8s.io", "channel.k8s.io")
"""As the kubelet: port-forward over websockets never got a fifth version."""
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255


@dataclass
class Cut:
    """Ends a stream of logs after so many lines. clean: in good order."""

    lines: int
    times: int
    clean: bool


# -- logs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogQuery:
    container: str
    follow: bool
    timestamps: bool
    previous: bool
    since: float | None
    tail: int | None
    limit: int | None


def parse_log_query(query: Mapping[str, str], now: float) -> LogQuery:
    if "sinceSeconds" in query and "sinceTime" in query:
        raise ApiError(
            422, "Invalid", "PodLogOptions is invalid: at most one of `sinceTime` or `sinceSeconds` may be specified"
        )
    since = None
    try:
        if "sinceSeconds" in query:
            since = now - int(query["sinceSeconds"])
        elif "sinceTime" in query:
            since = float(int(parse_time(query["sinceTime"])))  # the API server hands it on in whole seconds
        tail = int(query["tailLines"]) if "tailLines" in query else None
        limit = int(query["limitBytes"]) if "limitBytes" in query else None
    except ValueError as error:
        raise bad_request(str(error)) from None
    follow, timestamps, previous = (query.get(name) in ("true", "1") for name in ("follow", "timestamps", "previous"))
    return LogQuery(query.get("container", ""), follow, timestamps, previous, since, tail, limit)


def log_source(kubelet: Kubelet, pod: Json, query: LogQuery) -> tuple[PodWorker, ContainerRun] | None:
    """None if the pod has no node yet, whose log is empty. ApiError 400."""
    name = pod["metadata"]["name"]
    containers = [c["name"] for c in pod["spec"]["containers"]]
    inits = [c["name"] for c in pod["spec"].get("initContainers", ())]
    chosen = query.container
    if not chosen and len(containers) > 1:
        choices = " ".join(containers)
        raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{choices}]")
    chosen = chosen or containers[0]
    if chosen not in [*containers, *inits]:
        raise bad_request(f"container {chosen} is not valid for pod {name}")
    if not pod["spec"].get("nodeName"):
        return None
    worker = kubelet.worker(pod)
    slot = worker.slot(chosen) if worker else None
    if worker is None or slot is None:
        raise ApiError(
            500, "InternalError", f'Get "https://{pod["spec"]["nodeName"]}:10250/containerLogs": no route to host'
        )
    run = slot.previous if query.previous else slot.run or slot.previous
    if query.previous and run is None and slot.again_at:
        run = slot.run
    if query.previous and run is None:
        raise bad_request(f'previous terminated container "{chosen}" in pod "{name}" not found')
    if run is None:
        reason = slot.waiting.get("reason", "ContainerCreating")
        if reason in ("ErrImagePull", "ImagePullBackOff"):
            reason = "trying and failing to pull image"
        raise bad_request(f'container "{chosen}" in pod "{name}" is waiting to start: {reason}')
    return worker, run


async def log_lines(run: ContainerRun, query: LogQuery) -> AsyncIterator[bytes]:
    """As the API server sends them: parts of one long line are one line again."""
    left = query.limit
    async for line in _wanted(run, query):
        if left is not None:
            line, left = line[:left], left - len(line)
        yield line
        if left is not None and left <= 0:
            return


async def _wanted(run: ContainerRun, query: LogQuery) -> AsyncIterator[bytes]:
    path = run.launch.log
    content, size = _read(path, 0)
    lines = content.splitlines(keepends=True)
    if query.tail is not None:
        lines = lines[-query.tail :] if query.tail else []
    whole = True
    while True:
        for line in lines:
            stamped, text, whole_after = _parsed(line)
            if query.since is None or parse_time(stamped) >= query.since:
                yield (f"{stamped} ".encode() if query.timestamps and whole else b"") + text
            whole = whole_after
        ended = not query.follow or run.terminated or run.watched < 0
        content, size = _read(path, size)
        lines = content.splitlines(keepends=True)
        if not lines:
            if ended:
                return
            await asyncio.sleep(_POLL_S)


def _read(path: Path, start: int) -> tuple[bytes, int]:
    """(whole lines from there on, where they end)"""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return b"", start
    content = content[: content.rfind(b"\n") + 1]
    return content, start + len(content)


def _parsed(line: bytes) -> tuple[str, bytes, bool]:
    """`2026-11-22T09:20:42.909841403+00:00 stdout F text` → (time in UTC, text with its end, whether it has one)"""
    moment, _, kind, text = line.split(b" ", 3)
    stamped = re.sub(r"\+00:00$", "Z", moment.decode())
    return (stamped, text, True) if kind == b"F" else (stamped, text.rstrip(b"\n"), False)


# -- exec -------------------------------------------------------------------------------------------------------------


async def exec_in(request: web.Request, run: ContainerRun) -> web.StreamResponse:
    query = request.query
    socket = web.WebSocketResponse(protocols=_EXEC, max_msg_size=64 << 20)
    await socket.prepare(request)
    flags = [name for name in ("stdin", "stdout", "stderr", "tty") if query.get(name) in ("true", "1")]
    lowest = _STDOUT if "stdout" in flags else _STDERR if "stderr" in flags else _ERROR
    await socket.send_bytes(bytes([lowest]))
    process = await asyncio.create_subprocess_exec(
        "podman", "exec", *(["--interactive"] if "stdin" in flags else []), *(["--tty"] if "tty" in flags else []),
        run.id, *query.getall("command"),
        stdin=asyncio.subprocess.PIPE if "stdin" in flags else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    feeding = asyncio.ensure_future(_feed(socket, process))
    try:
        reading = [_drain(socket, _STDOUT, process.stdout)]
        reading.append(_drain(socket, _STDERR if "tty" not in flags else _STDOUT, process.stderr))
        await asyncio.gather(*reading)
        code = await process.wait()
        if not socket.closed:
            await socket.send_bytes(bytes([_ERROR]) + json.dumps(_exec_status(code)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        await socket.close()
    return socket


async def _drain(socket: web.WebSocketResponse, channel: int, stream: asyncio.StreamReader | None) -> None:
    while stream and (chunk := await stream.read(32 * 1024)):
        if not socket.closed:
            await socket.send_bytes(bytes([channel]) + chunk)


async def _feed(socket: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
    """Ends the process when the client is gone."""
    async for message in socket:
        data = message.data.encode() if message.type == WSMsgType.TEXT else message.data
        if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT) or not data or process.stdin is None:
            continue
        if data[0] == _STDIN and not process.stdin.is_closing():
            process.stdin.write(data[1:])
            await process.stdin.drain()
        elif data[0] == _CLOSE and data[1:2] == bytes([_STDIN]) and socket.ws_protocol == _EXEC[0]:
            process.stdin.close()
    if process.returncode is None:
        process.kill()


def _exec_status(code: int) -> Json:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: command terminated with exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


# -- port-forward -----------------------------------------------------------------------------------------------------


async def forward_ports(request: web.Request, pod: Json) -> web.StreamResponse:
    """Channel 2n is the data of the n-th port, 2n+1 its error; each begins with the port's number. As all pods are on
    this machine's network, a port on the pod's loopback is one on ours."""
    ports = [int(word) for words in request.query.getall("ports") for word in words.split(",")]
    socket = web.WebSocketResponse(protocols=_FORWARD, max_msg_size=64 << 20)
    await socket.prepare(request)
    for number, port in enumerate(ports):
        for channel in (2 * number, 2 * number + 1):
            await socket.send_bytes(bytes([channel]) + struct.pack("<H", port))
    writers: dict[int, asyncio.StreamWriter] = {}
    readers = []
    for number, port in enumerate(ports):
        try:
            reader, writers[2 * number] = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            await socket.send_bytes(bytes([2 * number + 1]) + _refused(pod, port, error).encode())
            continue
        readers.append(asyncio.ensure_future(_drain(socket, 2 * number, reader)))
    writing = asyncio.ensure_future(_write(socket, writers))
    try:
        if readers:
            done = asyncio.gather(*readers, return_exceptions=True)
            await asyncio.wait([done, writing], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in [*readers, writing]:
            task.cancel()
        await asyncio.gather(*readers, writing, return_exceptions=True)
        for writer in writers.values():
            writer.close()
        await socket.close()
    return socket


async def _write(socket: web.WebSocketResponse, writers: dict[int, asyncio.StreamWriter]) -> None:
    async for message in socket:
        if message.type == WSMsgType.BINARY and message.data and message.data[0] in writers:
            writer = writers[message.data[0]]
            writer.write(message.data[1:])
            await writer.drain()


def _refused(pod: Json, port: int, error: OSError) -> str:
    words = f"failed to connect to localhost:{port} inside namespace, IPv4: dial tcp4 127.0.0.1:{port}: connect: "
    return (
        f"error forwarding port {port} to pod {pod['metadata']['uid']}, uid : failed to execute portforward in network "
        f"namespace: {words}{(error.strerror or str(error)).lower()}"
    )
