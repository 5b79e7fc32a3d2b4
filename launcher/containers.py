"""A supervised run in a container of Docker or Podman.

The container outlives the client that started it: what counts is what the engine says of it, by the id that the client
left in the supervisor's folder (`container.id`). Inside, the runner finds

    /opt/ml                      the run's folder                     /run/cvlaunch/job.json  read-only
    /opt/ml/input/data/CHANNEL   folders of this machine, read-only   /run/cvlaunch/notice/   why it started nothing
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts import Ended, Order, hand_over, last_line, signal_words
from launcher.contract import DEFAULT_ROOT, EXIT_PREEMPTED
from launcher.digest import text_digest
from launcher.engine import Container, ContainerOptions, Engine, Mount, engine_error, find_engine
from launcher.errors import CvlaunchError, SpecError, UnreachableError
from launcher.process import ProcessId, machine_memory
from launcher.quantities import format_size

__all__ = [
    "ContainerAttempt",
    "container_root",
    "end_of",
    "known_id",
    "options",
    "run_engine",
]

_RUN = "/run/cvlaunch"
_ENGINE_FAILED, _CANT_START, _NO_PROGRAM = 125, 126, 127
"""What a client exits with when it has started nothing."""
_KILLED = 137
_FILES = ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_CA_BUNDLE", "AWS_WEB_IDENTITY_TOKEN_FILE")
"""Inherited variables whose value is a file of this machine, which goes along."""

_LOOK_S = 0.1
_PATIENCE_S = 300.0
"""How long an engine may be away, as while its daemon is updated, until its container is given up."""


def run_engine(plan: Mapping[str, Any]) -> Engine:
    """The engine that the plan names; CvlaunchError if it isn't there."""
    return find_engine(plan.get("engine"))


def container_root(plan: Mapping[str, Any]) -> Path | None:
    """Where the run's folder stands on this machine."""
    return next((Path(mount["source"]) for mount in plan["mounts"] if mount["target"] == _inside(plan)), None)


def _inside(plan: Mapping[str, Any]) -> str:
    root: str = plan["env"].get("CVLAUNCH_ROOT", DEFAULT_ROOT)
    return root


def known_id(folder: Path) -> str:
    """Of the last container that was made for this supervisor's folder; empty if none was."""
    with contextlib.suppress(OSError):
        return _id_file(folder).read_text(encoding="ascii").strip()
    return ""


def _id_file(folder: Path) -> Path:
    return folder / "container.id"


class ContainerAttempt:
    """CvlaunchError if there is no engine; OSError if its client can't be started, or a folder not made."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._engine = run_engine(order.plan)
        self._over = threading.Event()
        self._ended_client = False
        self._log_start = order.log.stat().st_size if order.log.exists() else 0
        _id_file(order.folder).unlink(missing_ok=True)
        _make_folders(order)
        command = self._engine.run_command(options(order, self._engine))
        self._client = _start(command, stdin=subprocess.PIPE if order.secrets else subprocess.DEVNULL)
        self.process = ProcessId.of(self._client.pid)

    @property
    def engine(self) -> str:
        return self._engine.name

    @property
    def started(self) -> bool:
        return bool(self._id)

    @property
    def _id(self) -> str:
        return known_id(self._order.folder)

    def wait(self) -> Ended:
        try:
            return self._wait()
        finally:
            self._over.set()

    def _wait(self) -> Ended:
        hand_over(self._client, self._order.secrets)
        code = self._client.wait()
        known = code >= 0 and not self._ended_client  # else it may be the client's own
        while (container := self._look()) and container.running:
            self._client = _start(
                [self._engine.program, "attach", "--no-stdin", "--sig-proxy=false", self._id], stdin=subprocess.DEVNULL
            )
            self._client.wait()
            time.sleep(_LOOK_S)
        return self._end(container, code if known else None)

    def _look(self) -> Container | None:
        """None if there was never a container, or it is gone."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._id:
            try:
                return self._engine.container(self._id)
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        return None

    def _end(self, container: Container | None, code: int | None) -> Ended:
        """code: the client's, which is the container's where the engine has started it."""
        if container is not None and container.exit_code is not None:
            return end_of(container, self._order.plan, log=self._order.log)
        if container is None and self._id:
            reason = "its container was removed" + (", and nobody saw how it ended" if code is None else "")
            return Ended(_KILLED if code is None else code, reason if code != 0 else "")
        if self._ended_client:
            return Ended(EXIT_PREEMPTED, "stopped before its container was started")
        state = "FAILED" if code in (_CANT_START, _NO_PROGRAM) else "ERROR"
        return Ended(_ENGINE_FAILED if code is None else code, self._refusal(), state)

    def _refusal(self) -> str:
        """Why nothing was started, in the engine's words."""
        with self._order.log.open("rb") as file:
            file.seek(self._log_start)
            text = _without_usage(file.read().decode(errors="replace"))
        if re.search(r"name\b.* is already in use", text):
            name = _name(self._order)
            return f"another submission runs this run: the container {name} is there already; choose another --run-id"
        error = str(engine_error(self._engine.name, "run", text))
        if (argv := self._order.plan["argv"]) and f'"{argv[0]}"' in text and "not found" in text:
            error += f"; the image has no {argv[0]}: build it from ours, or write runner: none"
        return error

    def ask_to_stop(self) -> None:
        """Once there is something that runs; a client that still fetches the image is ended."""
        while not self._over.is_set():
            with contextlib.suppress(CvlaunchError):
                container = self._engine.container(self._id) if self._id else None
                if container is not None and container.running:
                    self._engine.read("kill", "--signal", "TERM", self._id)
                    return
            if not self._id:
                self._ended_client = True
                self._client.terminate()
            self._over.wait(_LOOK_S)

    def kill(self) -> None:
        if self._id:
            self._engine.signal(self._id, "KILL")
        else:
            self._ended_client = True
            self._client.kill()

    def remove(self) -> None:
        """A client that was ended may have made one without leaving its id; that one has never run."""
        with contextlib.suppress(CvlaunchError):
            for name in [self._id] if self._id else self._engine.containers(_mark(self._order)):
                self._engine.remove(name)


def _start(command: Sequence[str], *, stdin: int) -> subprocess.Popen[bytes]:
    """A client of the engine; it prints into our log, and signals to us don't reach it."""
    return subprocess.Popen(command, stdin=stdin, cwd="/", start_new_session=True)


def _without_usage(text: str) -> str:
    """Docker ends with a pointer to its help, which is no reason."""
    lines = [line.removeprefix("docker: ") for line in text.splitlines()]
    return "\n".join(line for line in lines if not re.match(r"(See|Run) 'docker run --help'", line))


def end_of(container: Container, plan: Mapping[str, Any], *, log: Path) -> Ended:
    """Of a container that has run. log: what it printed."""
    code = container.exit_code or 0
    limit = plan["limits"].get("memory")
    if code != _KILLED or limit is None:
        return Ended(code, signal_words("its container", code) or (last_line(log) if code else ""))
    at_limit = f"at its memory limit, {format_size(limit)} (resources.memory)"
    killed = f"killed {at_limit}" if container.out_of_memory else f"killed by SIGKILL, as it would be {at_limit}"
    return Ended(code, killed, killed=killed)


# -- from the plan to the engine's options ----------------------------------------------------------------------------


def _name(order: Order) -> str:
    """As `backends.base.native_name` has it."""
    run_id: str = order.plan["run_id"]
    return run_id if order.number == 1 else f"{run_id}-{order.number}"


def _labels(order: Order) -> dict[str, str]:
    plan_sha = text_digest((order.folder / "plan.json").read_text(encoding="utf-8"))
    mark, _, supervisor = _mark(order).partition("=")
    return {"cvlaunch.run": order.plan["run_id"], "cvlaunch.plan": plan_sha, mark: supervisor}


def _mark(order: Order) -> str:
    """The label by which a supervisor knows its own."""
    return f"cvlaunch.supervisor={order.native_id}"


def options(order: Order, engine: Engine) -> ContainerOptions:
    """What the plan says, and what only a start can know."""
    plan, limits = order.plan, order.plan["limits"]
    inherited = [name for name in plan["inherit"] if os.environ.get(name)]
    files = [name for name in inherited if name in _FILES and Path(os.environ[name]).is_file()]
    mounts = [Mount(mount["source"], mount["target"], mount["read_only"]) for mount in plan["mounts"]]
    return ContainerOptions(
        image=_image(plan, engine),
        entrypoint=tuple(plan["argv"]) or None,
        arguments=tuple(plan["arguments"]),
        name=_name(order),
        labels=_labels(order),
        env={**plan["env"], **_devices(order, engine), **_runner_variables(order), **{f: f"{_RUN}/{f}" for f in files}},
        inherit=tuple(name for name in inherited if name not in files),
        mounts=(*mounts, *_runner_mounts(order), *(Mount(os.environ[f], f"{_RUN}/{f}", read_only=True) for f in files)),
        user=plan["user"],
        shm=plan["shm"] or (limits["memory"] or machine_memory()) // 2,
        memory=limits["memory"],
        cpus=limits["cpus"],
        gpus=tuple(order.gpus),
        network=plan["network"],
        read_only=plan["read_only"],
        keep_stdin=bool(order.secrets),
        id_file=str(_id_file(order.folder)),
        proxy_signals=False,
    )


def _image(plan: Mapping[str, Any], engine: Engine) -> str:
    """The image of the job, even if its tag is another's by now. SpecError if it is not here any more."""
    reference: str = plan["image"]
    wanted = (plan["job"].get("image") or {}).get("config_digest")
    if wanted is None or "@" in reference:
        return reference
    found = engine.image(reference)
    if found is not None and found.config_digest == wanted:
        return reference
    if engine.image(wanted) is None:
        raise SpecError(f"the image {reference} of this job ({wanted[:19]}) is not here any more; submit the job again")
    return str(wanted)


def _devices(order: Order, engine: Engine) -> dict[str, str]:
    """Where NVIDIA's runtime is the engine's default, it reads this, and images say `all`. `void`: none in this way."""
    by_variable = order.gpus and engine.name == "docker"
    return {"NVIDIA_VISIBLE_DEVICES": ",".join(order.gpus) if by_variable else "void"}


def _runner_variables(order: Order) -> dict[str, str]:
    if not order.plan["argv"]:
        return {}
    variables = order.variables(job=f"{_RUN}/job.json", notice=f"{_RUN}/notice/{order.notice.name}")
    return {**variables, "CVLAUNCH_NODE": socket.gethostname()}


def _runner_mounts(order: Order) -> Iterator[Mount]:
    if order.plan["argv"]:
        yield Mount(str(order.write_job_file()), f"{_RUN}/job.json", read_only=True)
        yield Mount(str(order.notice.parent), f"{_RUN}/notice")


def _make_folders(order: Order) -> None:
    """What is mounted, and the points below the run's folder on which more is mounted, for the container's user."""
    plan, root = order.plan, container_root(order.plan)
    order.notice.parent.mkdir(exist_ok=True)
    order.notice.parent.chmod(0o777)  # for any user; in front of it stands the supervisor's folder, which is closed
    if root is None:
        return
    root.mkdir(parents=True, exist_ok=True)
    for mount in plan["mounts"]:
        if mount["target"].startswith(_inside(plan) + "/"):
            (root / Path(mount["target"]).relative_to(_inside(plan))).mkdir(parents=True, exist_ok=True)
    if plan["user"] and os.geteuid() == 0:
        _give(root, *map(int, plan["user"].split(":")))


def _give(folder: Path, uid: int, gid: int) -> None:
    """Everything in it, which an earlier attempt or a submission may have left as another user."""
    for top, folders, files in os.walk(folder):
        for path in (Path(top), *(Path(top, name) for name in (*folders, *files))):
            if path.lstat().st_uid != uid:
                os.chown(path, uid, gid, follow_symlinks=False)
