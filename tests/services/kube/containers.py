"""One container of a pod, run by podman."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.services.kube.environment import Environment, expand
from tests.services.kube.times import parse_quantity, stamp, whole
from tests.services.kube.volumes import host_path

__all__ = ["LABEL", "ContainerRun", "Image", "Launch", "find_image", "kill", "remove_containers", "start_container"]

Json = dict[str, Any]

LABEL = "cvlaunch-test-kube"
"""Of all containers of a cluster; its value is the process that the cluster lives in."""
_PODMAN_FAILED = 125
_MESSAGE_BYTES, _FALLBACK_BYTES, _FALLBACK_LINES = 4096, 2048, 80


@dataclass(frozen=True)
class Image:
    """user: of USER."""

    id: str
    user: str


@dataclass(frozen=True)
class Launch:
    """All that `podman run` is told. owner: value of LABEL."""

    pod: Json
    container: Json
    image: Image
    environment: Environment
    volumes: dict[str, Path]
    hosts: Path
    message: Path
    log: Path
    pids: Path
    name: str
    hostname: str
    owner: str


@dataclass
class ContainerRun:
    """id: podman's; empty if it could not be started. process: a pidfd of its first process; watched: one of its
    monitor, which ends after the container. killed: who sent SIGKILL, if we did."""

    launch: Launch
    restart: int
    started: float
    id: str = ""
    process: int = -1
    watched: int = -1
    killed: str = ""
    failure: str = ""
    terminated: Json = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def signal(self, number: int) -> None:
        with self.lock, contextlib.suppress(ProcessLookupError):
            if self.process >= 0:
                signal.pidfd_send_signal(self.process, number)

    def ended(self) -> bool:
        return self.watched < 0 or bool(select.select([self.watched], [], [], 0)[0])

    def finish(self) -> Json:
        """Its `terminated` state, once it has ended."""
        if not self.terminated:
            self.forget()
            self.terminated = _terminated(self)
        return self.terminated

    def forget(self) -> None:
        with self.lock:
            for descriptor in (self.process, self.watched):
                if descriptor >= 0:
                    os.close(descriptor)
            self.process = self.watched = -1


def find_image(reference: str, *, tries: int) -> Image | None:
    """None if podman has none of that name, or is not here. It may also say so while another process removes one."""
    for number in range(tries if shutil.which("podman") else 0):
        done = subprocess.run(
            ["podman", "image", "inspect", "--format", "{{.Id}} {{.Config.User}}", reference],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            identity, _, user = done.stdout.strip().partition(" ")
            return Image(identity, user)
        time.sleep(0.1 if number + 1 < tries else 0)
    return None


def start_container(launch: Launch, restart: int) -> ContainerRun:
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    launch.log.touch()
    launch.message.touch()
    launch.message.chmod(0o666)
    secret = {name: launch.environment.values[name] for name in launch.environment.secret}
    run = ContainerRun(launch, restart, time.time())
    _monitor_folder(launch).mkdir(exist_ok=True)
    done = _podman_run(launch, {**_environ(), **secret})
    if done.returncode:
        run.failure = done.stderr.strip().removeprefix("Error: ")
        return run
    run.id, run.started = done.stdout.strip(), time.time()
    run.watched, run.process = (_descriptor(Path(f"{launch.pids}.{kind}")) for kind in ("monitor", "pid"))
    return run


def _environ() -> dict[str, str]:
    """This process's, of which a test in another thread may take a variable away meanwhile."""
    while True:
        with contextlib.suppress(KeyError):
            return dict(os.environ)


def _podman_run(launch: Launch, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Again if podman itself failed, as it may while another process removes an image or a container."""
    for more in ([], ["--replace"], ["--replace"]):
        done = subprocess.run(
            ["podman", "run", *more, *_options(launch), launch.image.id, *_arguments(launch)],
            env=environ, cwd=_monitor_folder(launch), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != _PODMAN_FAILED:
            break
    return done


def _monitor_folder(launch: Launch) -> Path:
    """Where conmon works, which writes an empty file `oom` there when the kernel kills for memory. (Podman 4.3 looks
    for it elsewhere, and says OOMKilled: false.)"""
    return Path(f"{launch.pids}.monitor-folder")


def _descriptor(file: Path) -> int:
    """-1 if that process is gone already."""
    try:
        return os.pidfd_open(int(file.read_text()))
    except ProcessLookupError:
        return -1


def _options(launch: Launch) -> Iterator[str]:
    pod, container, context = launch.pod, launch.container, launch.container.get("securityContext", {})
    yield from ("--detach", "--pull", "never", "--network", "host", "--no-hosts", "--passwd=false")
    yield from ("--name", launch.name, "--label", f"{LABEL}={launch.owner}", "--hostname", launch.hostname)
    yield from ("--pidfile", f"{launch.pids}.pid", "--conmon-pidfile", f"{launch.pids}.monitor")
    yield from ("--log-driver", "k8s-file", "--log-opt", f"path={launch.log}")
    yield from ("--unsetenv", "TERM", "--unsetenv", "container", "--shm-size", "64m")
    for name, value in launch.environment.values.items():
        yield from ("--env", name if name in launch.environment.secret else f"{name}={value}")
    yield from _mounts(launch)
    yield from _user(pod, container)
    if context.get("readOnlyRootFilesystem"):
        yield from ("--read-only", "--read-only-tmpfs=false")
    for capability in context.get("capabilities", {}).get("drop", ()):
        yield from ("--cap-drop", capability)
    for capability in context.get("capabilities", {}).get("add", ()):
        yield from ("--cap-add", capability)
    if context.get("allowPrivilegeEscalation") is False:
        yield from ("--security-opt", "no-new-privileges")
    if memory := container["resources"].get("limits", {}).get("memory"):
        yield from ("--memory", f"{max(whole(parse_quantity(memory)), 6 << 20)}b")
    if container.get("workingDir"):
        yield from ("--workdir", container["workingDir"])
    if container.get("command"):
        command = [expand(word, launch.environment.values) for word in container["command"]]
        yield from ("--entrypoint", json.dumps(command))


def _arguments(launch: Launch) -> list[str]:
    return [expand(word, launch.environment.values) for word in launch.container.get("args", ())]


def _user(pod: Json, container: Json) -> Iterator[str]:
    own, common = container.get("securityContext", {}), pod["spec"]["securityContext"]
    user, group = (own.get(name, common.get(name)) for name in ("runAsUser", "runAsGroup"))
    if user is not None:
        yield from ("--user", f"{user}:{group}" if group is not None else str(user))
    groups = [*common.get("supplementalGroups", ()), *([common["fsGroup"]] if "fsGroup" in common else ())]
    for number in groups:
        yield from ("--group-add", str(number))


def _mounts(launch: Launch) -> Iterator[str]:
    container = launch.container
    yield from _bind(launch.hosts, "/etc/hosts")
    yield from _bind(launch.message, container["terminationMessagePath"])
    for mount in container.get("volumeMounts", ()):
        source = host_path(launch.volumes[mount["name"]], mount, launch.environment.values)
        volume = next(v for v in launch.pod["spec"]["volumes"] if v["name"] == mount["name"])
        fixed = any(kind in volume for kind in ("secret", "configMap", "downwardAPI", "projected"))
        read_only = fixed or mount.get("readOnly") or volume.get("persistentVolumeClaim", {}).get("readOnly")
        yield from _bind(source, mount["mountPath"], read_only=bool(read_only))


def _bind(source: Path, target: str, *, read_only: bool = False) -> Iterator[str]:
    yield from ("--volume", f"{source}:{target}:{'ro' if read_only else 'rw'}")


def _terminated(run: ContainerRun) -> Json:
    code, ended = _exit(run)
    reason = "Completed" if code == 0 else "Error"
    if code and (run.killed == "OOMKilled" or (_monitor_folder(run.launch) / "oom").exists()):
        reason = "OOMKilled"
    message = _message(run, code)
    return {
        "exitCode": code,
        "reason": reason,
        "startedAt": stamp(run.started),
        "finishedAt": stamp(ended),
        "containerID": f"containerd://{run.id}",
        **({"message": message} if message else {}),
    }


def _exit(run: ContainerRun) -> tuple[int, float]:
    for _ in range(100):
        done = subprocess.run(
            ["podman", "container", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", run.id],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        state, _, code = done.stdout.strip().partition(" ")
        if state in ("exited", "stopped"):
            return int(code), time.time()
        if "no such container" in done.stderr:
            break
        time.sleep(0.03)
    return 137, time.time()


def _message(run: ContainerRun, code: int) -> str:
    written = run.launch.message.read_bytes()[:_MESSAGE_BYTES] if run.launch.message.exists() else b""
    policy = run.launch.container["terminationMessagePolicy"]
    if written or code == 0 or policy != "FallbackToLogsOnError":
        return written.decode(errors="replace")
    lines = run.launch.log.read_bytes().split(b"\n")[-_FALLBACK_LINES - 1 :]
    text = b"\n".join(line.split(b" ", 3)[3] for line in lines if line.count(b" ") >= 3)
    return (text + b"\n")[-_FALLBACK_BYTES:].decode(errors="replace") if text else ""


def kill(run: ContainerRun, why: str) -> None:
    """At once, with all of its processes. why: `OOMKilled`, or any word for who did it."""
    run.killed = why
    run.signal(signal.SIGKILL)


def remove_containers(names: list[str]) -> None:
    """Killed where they run."""
    for _ in range(3):
        if not names:
            return
        done = subprocess.run(
            ["podman", "rm", "--force", "--ignore", "--time", "0", *names], capture_output=True, check=False
        )
        if done.returncode == 0:
            return
        time.sleep(0.2)
