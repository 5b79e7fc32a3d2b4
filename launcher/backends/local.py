"""This machine: a supervised process that outlives the command line."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from launcher import gpus, paths, supervised
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
from launcher.beside import find_command
from launcher.contract import OUTPUT_FOLDERS, JobFile
from launcher.errors import SpecError
from launcher.process import exit_code, with_variable
from launcher.quantities import format_size
from launcher.rules import ContainerRules, Shm
from launcher.status import Status
from launcher.stores import Store, path_of, scheme
from launcher.supervisor import SupervisorFolder, start

__all__ = ["LocalBackend", "LocalTarget"]

_CHANNELS = {"client": "path", "file": "path", "s3": "staged", "gs": "staged"}

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
        return supervised.absolute_folder(value)


class LocalBackend:
    name: ClassVar[str] = "local"
    Target: ClassVar[type[BaseTarget]] = LocalTarget
    template: ClassVar[str] = "local/process.json.j2"
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
        Feature.EXEC: Support(True),
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
        if (free := supervised.free_space(place)) < 1 << 30:
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
        known = [run_id for run_id in run_ids if supervised.is_known(self._folder(run_id))]
        return {run_id: Handle(self.name, self.target_name, run_id) for run_id in known}

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        return {handle: _status(self._folder(handle.native)) for handle in handles}

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """The runner's log; what it printed, where it ended before it could write one."""
        folder = self._folder(handle.native)
        return supervised.logs(folder, lambda: _status(folder).state.terminal, follow=follow, since=since)

    def cancel(self, handle: Handle) -> None:
        folder = self._folder(handle.native)
        supervised.cancel(folder, _Processes(folder))

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        """In the command's folder, with its variables, job secrets included."""
        folder = self._folder(handle.native)
        supervised.require_running(handle.native, _status(folder))
        root = str(folder.root)
        if find_command(handle.native, root) is None:
            raise SpecError(f"the command of {handle.native} has not started yet; try again when it prints something")
        beside = [sys.executable, "-m", "launcher.beside", handle.native, root, *command]
        return exit_code(subprocess.run(beside, check=False).returncode)

    def remove(self, handle: Handle) -> None:
        shutil.rmtree(self._folder(handle.native).path, ignore_errors=True)

    def store(self, uri: str) -> Store | None:
        return None

    def _folder(self, run_id: str) -> SupervisorFolder:
        return SupervisorFolder(Path(self.target.root) / run_id)


def _status(folder: SupervisorFolder) -> Status:
    return supervised.status(folder, _Processes(folder))


@dataclass(frozen=True)
class _Processes:
    """Of a run whose supervisor is gone: the runner, or what outlived that, too."""

    folder: SupervisorFolder

    def running(self) -> bool:
        record = self.folder.record()
        return bool((record and record.runner and record.runner.alive) or self._commands())

    def stop(self) -> None:
        record = self.folder.record()
        if record and record.runner and supervised.is_alive(record.runner):
            supervised.send_signal(record.runner.pid, signal.SIGTERM)
        else:  # nobody is left to save anything
            for pid in self._commands():
                supervised.send_signal(pid, signal.SIGKILL)

    def end(self) -> None:
        """Exit codes are told to parents alone."""

    def _commands(self) -> list[int]:
        return with_variable("CVLAUNCH_ROOT", str(self.folder.root)) if self.folder.root else []


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
