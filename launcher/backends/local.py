"""This machine: a supervised process that outlives the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from launcher import gpus, paths
from launcher.backends.base import (
    BaseTarget,
    Feature,
    Handle,
    Job,
    LogLine,
    Plan,
    Problem,
    Support,
    Transport,
)
from launcher.contract import (
    EXIT_BAD_CONFIG,
    EXIT_CANCELLED,
    EXIT_PREEMPTED,
    OUTPUT_FOLDERS,
    JobFile,
    Layout,
)
from launcher.logfiles import follow_logs
from launcher.process import ProcessId, with_variable
from launcher.quantities import format_size
from launcher.rules import ContainerRules, Shm
from launcher.status import State, Status
from launcher.stores import Store, open_store, path_of, scheme
from launcher.supervisor import Record, SupervisorFolder, start

__all__ = ["LocalBackend", "LocalTarget"]

_RESULT_STATES = {
    "SUCCEEDED": State.SUCCEEDED,
    "FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED,
    "TIMED_OUT": State.TIMED_OUT,
    "PREEMPTED": State.FAILED,
    "ERROR": State.ERROR,
}
"""The runner's word in result.json or in its notice → ours. A preemption that nobody restarts is a failure."""

_CHANNELS = {"client": "path", "file": "path", "s3": "staged", "gs": "staged"}

_CODE_STATES = {0: State.SUCCEEDED, EXIT_CANCELLED: State.CANCELLED}
"""Exit code → state, where the runner left no result; any other is FAILED."""

_CODE_REASONS = {
    EXIT_BAD_CONFIG: "bad configuration",
    EXIT_PREEMPTED: "preempted with a checkpoint; nothing was left to restart it",
}


_NO_IMAGE = "a process is not a container: it runs in the target's python, without the image"
_NO_LIMIT = "a process here has the whole machine, and no limit is set"


class LocalTarget(BaseTarget):
    """A folder of this machine and the Python that runs the trainer."""

    backend: Literal["local"] = "local"
    output: str = Field(default_factory=lambda: str(paths.data_folder() / "output"), description="where runs are kept")
    root: str = Field(
        default_factory=lambda: str(paths.data_folder() / "local"), description="records of supervised processes"
    )
    python: str = Field(
        default_factory=lambda: sys.executable, description="interpreter that has cvlaunch and the trainer's packages"
    )

    @field_validator("root")
    @classmethod
    def _absolute(cls, value: str) -> str:
        path = Path(value).expanduser()
        if not path.is_absolute():
            raise ValueError(f"expected an absolute path or one that starts with ~, found {value!r}")
        return str(path)


class LocalBackend:
    name: ClassVar[str] = "local"
    Target: ClassVar[type[BaseTarget]] = LocalTarget
    template: ClassVar[str] = "process.json.j2"
    form: ClassVar[Literal["json", "yaml", "script"]] = "json"
    inline_job: ClassVar[bool] = True
    doubt_s: ClassVar[float] = 0.0
    rules: ClassVar[ContainerRules] = ContainerRules(container=False, shm=Shm(source="it is the machine's own"))
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(False, "this is one machine; write resources.nodes: 1"),
        Feature.SHM: Support(False, "shared memory is the machine's; write resources.shm: auto"),
        Feature.SPOT: Support(False, "this machine is not sold by the hour; write resources.spot: false"),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(True),
        Feature.SECRETS_CLIENT: Support(True),
        Feature.SECRETS_STORE: Support(False, "a process here reads no secret store; write env:NAME or file:PATH"),
        Feature.CONTAINER: Support(False, _NO_IMAGE),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(False, "the process runs here: use your own shell"),
    }
    ignored: ClassVar[Mapping[str, str]] = {
        "image": _NO_IMAGE,
        "build": _NO_IMAGE,
        "resources.gpu": "the GPUs of this machine are taken, whatever their model",
        "resources.cpus": _NO_LIMIT,
        "resources.memory": _NO_LIMIT,
        "resources.disk": "the disk is the machine's; nothing is set aside",
    }
    placeholders: ClassVar[Mapping[str, str]] = {}
    transports: ClassVar[Mapping[str, Transport]] = {
        "file": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "in_place")),
        "s3": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "runner")),
        "gs": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "runner")),
    }

    def __init__(self, target: LocalTarget, target_name: str) -> None:
        self.target = target
        self.target_name = target_name

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        in_place = job_file.movers["output"] == "in_place"
        root = path_of(job.output) / run_id if in_place else self._folder(run_id).path / "ml"
        return {
            "run_id": run_id,
            "argv": [self.target.python, "-m", "launcher.runner"],
            "env": {"CVLAUNCH_ROOT": str(root), "PYTHONUNBUFFERED": "1", **self._identity()},
            "cwd": "/",
            "gpus": job_file.gpus,
            "max_attempts": job_file.max_attempts,
            "grace_s": job_file.grace_s,
            "job": job_file.to_json(),
        }

    def _identity(self) -> Mapping[str, str]:
        """The profile of this machine, which job.json does not carry to others."""
        profile = self.target.storage.profile
        return {"AWS_PROFILE": profile} if profile else {}

    def check(self, job: Job) -> Iterator[Problem]:
        wanted, there = job.spec.resources.gpus, gpus.count()
        if wanted > there:
            hint = "resources.gpus: 0 trains on the CPU" if not there else f"at most resources.gpus: {there}"
            yield Problem("resources.gpus", f"{wanted} wanted, this machine has {there}; {hint}")
        yield from self._check_python(job)
        place = path_of(job.output) if scheme(job.output) == "file" else Path(self.target.root)
        if (free := _free_space(place)) < 1 << 30:
            yield Problem("disk", f"{place} has {format_size(free)} left; free some space", fatal=False)

    def _check_python(self, job: Job) -> Iterator[Problem]:
        needed = ["launcher", *(["torch", "timm"] if job.spec.train and job.spec.train.task == "classify" else [])]
        needed += ["torch", "ultralytics"] if job.spec.train and job.spec.train.task == "detect" else []
        missing = _modules_missing(self.target.python, needed)
        if missing is None:
            yield Problem("python", f"{self.target.python} can't be started; correct the target's key `python`")
        elif missing:
            extra = "cvlaunch" if "launcher" in missing else "'cvlaunch[trainer]'"
            yield Problem(
                "python",
                f"{self.target.python} lacks {', '.join(missing)}: {self.target.python} -m pip install {extra}",
            )

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        start(self._folder(plan.run_id), plan.text, secrets, again=attempt > 1)
        return Handle(self.name, self.target_name, plan.run_id)

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        return [self.submit(plan, secrets, attempt=attempt) for plan in plans]

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        """Exact: a submission holds the lock from before it starts the supervisor until the run has ended."""
        folders = {run_id: self._folder(run_id) for run_id in run_ids}
        return {
            run_id: Handle(self.name, self.target_name, run_id)
            for run_id, folder in folders.items()
            if folder.record() or folder.exit() or folder.locked()
        }

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        return {handle: _status(self._folder(handle.native)) for handle in handles}

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """The runner's log; what it printed, where it ended before it could write one."""
        folder = self._folder(handle.native)
        if folder.root is None:
            return
        ended = (lambda: _status(folder).state.terminal) if follow or _status(folder).state.terminal else None
        seen = False
        if not since.startswith(_PRINTED):
            for line in follow_logs(open_store(str(folder.root)), ended=ended, since=since):
                seen = True
                yield line
        if not seen and (not since or since.startswith(_PRINTED)) and _status(folder).state.terminal:
            yield from _printed(folder.log, since)

    def cancel(self, handle: Handle) -> None:
        folder = self._folder(handle.native)
        if folder.exit() or not folder.path.is_dir():
            return
        folder.cancel()
        record = _record_once_started(folder)
        if record and _runs_here(record.supervisor):
            _signal(record.supervisor.pid, signal.SIGTERM)
        elif record and record.runner and _runs_here(record.runner):
            _signal(record.runner.pid, signal.SIGTERM)
        else:  # nobody is left to save anything
            for pid in _left_behind(folder):
                _signal(pid, signal.SIGKILL)

    def remove(self, handle: Handle) -> None:
        shutil.rmtree(self._folder(handle.native).path, ignore_errors=True)

    def store(self, uri: str) -> Store | None:
        return None

    def _folder(self, run_id: str) -> SupervisorFolder:
        return SupervisorFolder(Path(self.target.root) / run_id)


def _status(folder: SupervisorFolder) -> Status:
    end = folder.exit()
    if end is None:
        if living := _living(folder):
            return living
        end = folder.exit()  # it may have come to its end meanwhile
    record = folder.record()
    if end is not None:
        return _ended(record, end)
    if record is None:
        return Status(State.LOST, native="gone", reason=f"no trace of it in {folder.path}")
    return _without_supervisor(folder, record)


def _living(folder: SupervisorFolder) -> Status | None:
    """None if none of its processes is left; UNKNOWN where that can't be seen from here."""
    record = folder.record()
    if record and not record.supervisor.here:
        return Status(State.UNKNOWN, native="elsewhere", reason=f"it runs on {record.supervisor.host}; ask there")
    if record and record.supervisor.alive:
        return _running(folder, record, record.phase)
    if folder.locked():  # a new supervisor has not written its record yet
        return Status(State.STARTING, native="starting")
    if (record and record.runner and record.runner.alive) or _left_behind(folder):
        return _running(folder, record, "unsupervised")
    return None


def _runs_here(process: ProcessId) -> bool:
    return process.here and process.alive


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


_START_S = 5.0
"""How long a new supervisor has until its record says who it is."""


def _record_once_started(folder: SupervisorFolder) -> Record | None:
    deadline = time.monotonic() + _START_S
    while True:
        record = folder.record()
        known = record is not None and (record.supervisor.alive or not record.supervisor.here)
        if known or not folder.locked() or time.monotonic() > deadline:
            return record
        time.sleep(0.02)


_PRINTED = "printed:"
"""Begins the cursor of a line that is in no log file."""


def _printed(log: Path, since: str) -> Iterator[LogLine]:
    first = int(since.removeprefix(_PRINTED) or 0)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for number, text in enumerate(lines[first:], first + 1):
        yield LogLine(text, cursor=f"{_PRINTED}{number}")


def _running(folder: SupervisorFolder, record: Record | None, native: str) -> Status:
    state = State.RESTARTING if native == "restarting" else State.RUNNING
    stopped = native != "restarting" and folder.root is not None and Layout(folder.root).stop.exists()
    if folder.cancelled or stopped:
        state = State.STOPPING
    if record is None:
        return Status(state, native)
    return Status(state, native, started=record.started, node=record.supervisor.host, attempt=record.attempt)


def _ended(record: Record | None, end: Mapping[str, object]) -> Status:
    code = int(str(end["code"]))
    state = _RESULT_STATES.get(str(end.get("state"))) or _CODE_STATES.get(code, State.FAILED)
    return Status(
        state,
        native=f"exited {code}",
        reason=str(end.get("reason") or _CODE_REASONS.get(code, "")),
        exit_code=code,
        started=record.started if record else None,
        ended=float(str(end["ended"])),
        node=record.supervisor.host if record else "",
        attempt=int(str(end["attempt"])),
    )


def _without_supervisor(folder: SupervisorFolder, record: Record) -> Status:
    """The supervisor was killed. The runner may have gone on and left a result; without one, nobody knows."""
    lost = Status(State.LOST, "gone", started=record.started, node=record.supervisor.host, attempt=record.attempt)
    account = folder.account(record.attempt, record.native_id) or {}
    if account.get("state") in _RESULT_STATES:
        return dataclasses.replace(
            lost,
            state=_RESULT_STATES[str(account["state"])],
            native="unsupervised",
            reason=str(account.get("reason") or ""),
            exit_code=account.get("exit_code"),
            ended=account.get("ended"),
        )
    if folder.cancelled:
        return dataclasses.replace(lost, state=State.CANCELLED, reason="cancelled")
    restarted = record.supervisor.boot != ProcessId.of().boot
    reason = (
        "the machine was restarted" if restarted else f"its supervisor (process {record.supervisor.pid}) was killed"
    )
    return dataclasses.replace(lost, reason=f"{reason}; go on with: cvlaunch submit --resume {folder.path.name}")


def _left_behind(folder: SupervisorFolder) -> list[int]:
    """Processes of the command that outlived the supervisor and the runner."""
    return with_variable("CVLAUNCH_ROOT", str(folder.root)) if folder.root else []


def _modules_missing(python: str, modules: Sequence[str]) -> list[str] | None:
    """Of these modules, those that `python` can't import; None if it can't be started."""
    if python == sys.executable:
        return [m for m in modules if importlib.util.find_spec(m) is None]
    script = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    try:
        answer = subprocess.run(
            [python, "-c", script, *modules], capture_output=True, text=True, timeout=60, check=True, cwd="/"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split()


def _free_space(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
