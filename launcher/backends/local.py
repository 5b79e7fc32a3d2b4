"""This machine: a supervised process that outlives the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from launcher import gpus, paths
from launcher.backends.base import (
    BaseTarget,
    ContainerRules,
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
    CANCEL,
    EXIT_BAD_CONFIG,
    EXIT_CANCELLED,
    EXIT_PREEMPTED,
    OUTPUT_FOLDERS,
    RESULT,
    JobFile,
    Layout,
    read_json,
)
from launcher.logfiles import follow_logs
from launcher.process import ProcessId, with_variable
from launcher.quantities import format_size
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
}
"""The runner's word in result.json → ours. A preemption that nobody restarts is a failure."""

_CHANNELS = {"client": "path", "file": "path", "s3": "staged", "gs": "staged"}

_CODE_STATES = {0: State.SUCCEEDED, EXIT_CANCELLED: State.CANCELLED}
"""Exit code → state, where the runner left no result; any other is FAILED."""

_CODE_REASONS = {
    EXIT_BAD_CONFIG: "bad configuration",
    EXIT_PREEMPTED: "preempted with a checkpoint; nothing was left to restart it",
}


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
    rules: ClassVar[ContainerRules] = ContainerRules(container=False)
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(False, "this is one machine; write resources.nodes: 1"),
        Feature.SHM: Support(False, "shared memory is the machine's; write resources.shm: auto"),
        Feature.SPOT: Support(False, "this machine is not sold by the hour; write resources.spot: false"),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(True),
        Feature.SECRETS_CLIENT: Support(True),
        Feature.SECRETS_STORE: Support(False, "a process here reads no secret store; write env:NAME or file:PATH"),
        Feature.CONTAINER: Support(
            False, "a process is not a container: it runs in the target's python, without the image"
        ),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(False, "the process runs here: use your own shell"),
    }
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
            "env": {"CVLAUNCH_ROOT": str(root), "PYTHONUNBUFFERED": "1"},
            "cwd": "/",
            "gpus": job_file.gpus,
            "max_attempts": job_file.max_attempts,
            "grace_s": job_file.grace_s,
            "job": job_file.to_json(),
        }

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

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str]) -> list[Handle]:
        return [self.submit(plan, secrets) for plan in plans]

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
        root = folder.environment().get("CVLAUNCH_ROOT")
        if root is None:
            return
        ended = (lambda: _status(folder).state.terminal) if follow else None
        seen = False
        if not since.startswith(_PRINTED):
            for line in follow_logs(open_store(root), ended=ended, since=since):
                seen = True
                yield line
        if not seen and (not since or since.startswith(_PRINTED)) and _status(folder).state.terminal:
            yield from _printed(folder.log, since)

    def cancel(self, handle: Handle) -> None:
        folder = self._folder(handle.native)
        record = folder.record()
        if record is None or folder.exit():
            return
        if record.supervisor.here and record.supervisor.alive:
            os.kill(record.supervisor.pid, signal.SIGTERM)
        elif record.runner and record.runner.here and record.runner.alive:
            os.kill(record.runner.pid, signal.SIGTERM)
        else:  # nobody is left to save anything
            for pid in _left_behind(folder):
                os.kill(pid, signal.SIGKILL)

    def remove(self, handle: Handle) -> None:
        shutil.rmtree(self._folder(handle.native).path, ignore_errors=True)

    def store(self, uri: str) -> Store | None:
        return None

    def _folder(self, run_id: str) -> SupervisorFolder:
        return SupervisorFolder(Path(self.target.root) / run_id)


def _status(folder: SupervisorFolder) -> Status:
    record, end = folder.record(), folder.exit()
    if end is not None:
        return _ended(record, end)
    gone = record is None or (record.supervisor.here and not record.supervisor.alive)
    if gone and folder.locked():  # a new supervisor has not written its record yet
        return Status(State.STARTING, native="starting")
    if record is None:
        return Status(State.LOST, native="gone", reason=f"no trace of it in {folder.path}")
    if not record.supervisor.here:
        return Status(State.UNKNOWN, native="elsewhere", reason=f"it runs on {record.supervisor.host}; ask there")
    if record.supervisor.alive:
        return _running(folder, record, record.phase)
    if (record.runner and record.runner.alive) or _left_behind(folder):
        return _running(folder, record, "unsupervised")
    return _without_supervisor(folder, record)


_PRINTED = "printed:"
"""Begins the cursor of a line that is in no log file."""


def _printed(log: Path, since: str) -> Iterator[LogLine]:
    first = int(since.removeprefix(_PRINTED) or 0)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for number, text in enumerate(lines[first:], first + 1):
        yield LogLine(text, cursor=f"{_PRINTED}{number}")


def _running(folder: SupervisorFolder, record: Record, native: str) -> Status:
    state = State.RESTARTING if native == "restarting" else State.RUNNING
    root = Path(folder.environment().get("CVLAUNCH_ROOT", ""))
    if (root / CANCEL).exists() or (native != "restarting" and Layout(root).stop.exists()):
        state = State.STOPPING
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
    root = Path(folder.environment().get("CVLAUNCH_ROOT", ""))
    result = read_json(root / RESULT) or {}
    lost = Status(State.LOST, "gone", started=record.started, node=record.supervisor.host, attempt=record.attempt)
    if result.get("attempt") == record.attempt and result.get("state") in _RESULT_STATES:
        return dataclasses.replace(
            lost,
            state=_RESULT_STATES[str(result["state"])],
            native="unsupervised",
            reason=str(result.get("reason") or ""),
            exit_code=result.get("exit_code"),
            ended=result.get("ended"),
        )
    restarted = record.supervisor.boot != ProcessId.of().boot
    reason = (
        "the machine was restarted" if restarted else f"its supervisor (process {record.supervisor.pid}) was killed"
    )
    return dataclasses.replace(lost, reason=f"{reason}; go on with: cvlaunch submit --resume {folder.path.name}")


def _left_behind(folder: SupervisorFolder) -> list[int]:
    """Processes of the command that outlived the supervisor and the runner."""
    root = folder.environment().get("CVLAUNCH_ROOT")
    return with_variable("CVLAUNCH_ROOT", root) if root else []


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
