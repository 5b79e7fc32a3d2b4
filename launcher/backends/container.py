"""A container of Docker or Podman on this machine: the local twin of the cloud backends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from launcher import beside, gpus, paths, supervised
from launcher.attempts import Ended
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
    asked_of_foreign,
)
from launcher.containers import end_of, known_id, run_engine
from launcher.contract import DEFAULT_ROOT, OUTPUT_FOLDERS, JobFile
from launcher.engine import Container, Engine, find_engine
from launcher.errors import CvlaunchError
from launcher.process import exit_code, machine_memory
from launcher.quantities import format_size
from launcher.rules import ContainerRules, Shm
from launcher.status import Status
from launcher.stores import Store, path_of, scheme
from launcher.supervisor import SupervisorFolder, start

__all__ = ["ContainerBackend", "ContainerTarget"]

_CHANNELS = {"client": "mounted", "file": "mounted", "s3": "staged", "gs": "staged"}

_INHERITED = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_CA_BUNDLE",
        "AWS_ROLE_ARN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
}
"""Scheme of a place that the runner reads or writes → variables of the submitting shell by which it may."""

_NO_RUNNER = "a foreign image (runner: none) has nobody to do it"
_FOREIGN = {
    "retries": f"{_NO_RUNNER}; write retries: 0",
    "code": f"{_NO_RUNNER}; build the code into the image",
    "secrets": f"{_NO_RUNNER}; mount a file in the image's own way",
    "train": "the trainer is started by our runner; write runner: auto",
}
"""Key of the job → why a foreign image can't have it."""

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""As the kernel calls it → as images do."""

_CDI = ("/etc/cdi", "/var/run/cdi")
_NVIDIA = ("nvidia-container-runtime-hook", "nvidia-container-toolkit", "nvidia-container-runtime")
_LEAST_DISK = 1 << 30
_STOP_S = 10


class ContainerTarget(BaseTarget):
    """Folders of this machine, and the engine with what it gives to every container."""

    backend: Literal["container"] = "container"
    output: str = Field(default_factory=lambda: str(paths.data_folder() / "output"), description="where runs are kept")
    root: str = Field(
        default_factory=lambda: str(paths.data_folder() / "container"), description="records of supervised containers"
    )
    engine: Literal["auto", "docker", "podman"] = Field("auto", description="auto: the first one that answers")
    user: str | None = Field(
        None, pattern=r"^\d+:\d+$", description="UID:GID in the container; none: the caller's, who owns the results"
    )
    network: str | None = Field(None, description="host, none or a network's name; none given: the engine's default")
    read_only: bool = Field(False, description="the image's own folders can't be written")

    @field_validator("root")
    @classmethod
    def _absolute(cls, value: str) -> str:
        return supervised.absolute_folder(value)


class ContainerBackend:
    name: ClassVar[str] = "container"
    Target: ClassVar[type[BaseTarget]] = ContainerTarget
    template: ClassVar[str] = "container/container.json.j2"
    form: ClassVar[Literal["json", "yaml", "script"]] = "json"
    inline_job: ClassVar[bool] = True
    doubt_s: ClassVar[float] = 0.0
    rules: ClassVar[ContainerRules] = ContainerRules(shm=Shm(how="--shm-size"))
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(False, "this is one machine; write resources.nodes: 1"),
        Feature.SHM: Support(True),
        Feature.SPOT: Support(False, "this machine is not sold by the hour; write resources.spot: false"),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(True),
        Feature.SECRETS_CLIENT: Support(True),
        Feature.SECRETS_STORE: Support(False, "a container here reads no secret store; write env:NAME or file:PATH"),
        Feature.CONTAINER: Support(True),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(True),
    }
    ignored: ClassVar[Mapping[str, str]] = {
        "resources.gpu": "the GPUs of this machine are taken, whatever their model",
        "resources.disk": "the disk is the machine's; nothing is set aside",
    }
    placeholders: ClassVar[Mapping[str, str]] = {}
    transports: ClassVar[Mapping[str, Transport]] = {
        "file": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "in_place")),
        "s3": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "runner")),
        "gs": Transport(_CHANNELS, dict.fromkeys(OUTPUT_FOLDERS, "runner")),
    }

    def __init__(self, target: ContainerTarget, target_name: str) -> None:
        self.target = target
        self.target_name = target_name

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        foreign, resources = job.spec.runner == "none", job.spec.resources
        return {
            "run_id": run_id,
            "engine": self.target.engine,
            "image": job.image.reference if job.image else "",
            "argv": [] if foreign else ["cvlaunch-run"],
            "arguments": (job.command or ()) if foreign else (),
            "env": job.spec.env if foreign else {"CVLAUNCH_ROOT": DEFAULT_ROOT, "PYTHONUNBUFFERED": "1"},
            "inherit": [] if foreign else _inherited(job_file),
            "mounts": list(self._mounts(run_id, job_file)),
            "user": self.target.user,
            "shm": job.shm,
            "network": self.target.network,
            "read_only": self.target.read_only,
            "gpus": job_file.gpus,
            "cpus": resources.cpus,
            "memory": resources.memory,
            "max_attempts": job_file.max_attempts,
            "grace_s": job_file.grace_s,
            "timeout_s": job_file.timeout_s if foreign else None,
            "job": job_file.to_json(),
        }

    def _mounts(self, run_id: str, job_file: JobFile) -> Iterator[Mapping[str, object]]:
        """The run's folder, or one from which the runner uploads and which a later attempt finds again; channels."""
        in_place = job_file.movers["output"] == "in_place"
        folder = path_of(job_file.output) / run_id if in_place else self._folder(run_id).path / "ml"
        yield {"source": str(folder), "target": DEFAULT_ROOT, "read_only": False}
        for channel in job_file.channels:
            if channel.access == "mounted":
                target = f"{DEFAULT_ROOT}/input/data/{channel.name}"
                yield {"source": str(path_of(channel.uri)), "target": target, "read_only": True}

    # -- before a run -------------------------------------------------------------------------------------------------

    def check(self, job: Job) -> Iterator[Problem]:
        try:
            engine = find_engine(self.target.engine)
        except CvlaunchError as error:
            yield Problem("engine", str(error))
            return
        yield from _check_foreign(job)
        yield from self._check_machine(job)
        yield from _check_gpus(engine, job.spec.resources.gpus)
        if job.image:
            yield from _check_image(engine, job.image.reference)
        if self.target.user and os.geteuid() != 0:
            mine = f"{os.geteuid()}:{os.getegid()}"
            yield Problem(
                "user", f"only root can hand the run's folder to {self.target.user}; leave `user` out to run as {mine}"
            )
        if self.target.storage.profile and _schemes(job.output, *(c.uri for c in job.channels)):
            profile = self.target.storage.profile
            how = f'eval "$(aws configure export-credentials --profile {profile} --format env)"'
            yield Problem("storage.profile", f"a container can't use a profile of this machine; give it keys: {how}")

    def _check_machine(self, job: Job) -> Iterator[Problem]:
        resources, cores = job.spec.resources, os.cpu_count() or 1
        if resources.cpus and resources.cpus > cores:
            yield Problem("resources.cpus", f"{resources.cpus} wanted, this machine has {cores}")
        if resources.memory and resources.memory > machine_memory():
            wanted, there = format_size(resources.memory), format_size(machine_memory())
            yield Problem("resources.memory", f"{wanted} wanted, this machine has {there}")
        place = path_of(job.output) if scheme(job.output) == "file" else Path(self.target.root)
        if (free := supervised.free_space(place)) < _LEAST_DISK:
            yield Problem("disk", f"{place} has {format_size(free)} left; free some space", fatal=False)

    # -- a run --------------------------------------------------------------------------------------------------------

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
        """The runner's log; what was printed, where there is no runner or it ended before it could write one."""
        folder = self._folder(handle.native)
        runner = bool(folder.read_plan().get("argv"))
        return supervised.logs(
            folder, lambda: _status(folder).state.terminal, follow=follow, since=since, runner=runner
        )

    def cancel(self, handle: Handle) -> None:
        folder = self._folder(handle.native)
        supervised.cancel(folder, _InContainer(folder))

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        """With the command's variables, where there is a runner that has started one; else with the container's."""
        folder = self._folder(handle.native)
        supervised.require_running(handle.native, _status(folder))
        engine, name = _engine(folder), known_id(folder.path)
        if folder.read_plan().get("argv"):
            script = Path(beside.__file__).read_text(encoding="utf-8")
            command = ["python3", "-c", script, handle.native, DEFAULT_ROOT, *command]
        terminal = ["--tty"] if tty else []
        done = subprocess.run([engine.program, "exec", "--interactive", *terminal, name, *command], check=False)
        return exit_code(done.returncode)

    def remove(self, handle: Handle) -> None:
        folder = self._folder(handle.native)
        if known_id(folder.path):
            _engine(folder).remove(known_id(folder.path))
        shutil.rmtree(folder.path, ignore_errors=True)

    def store(self, uri: str) -> Store | None:
        return None

    def _folder(self, run_id: str) -> SupervisorFolder:
        return SupervisorFolder(Path(self.target.root) / run_id)


def _inherited(job_file: JobFile) -> list[str]:
    places = [job_file.output, *(channel.uri for channel in job_file.channels)]
    return [name for kind in _schemes(*places) for name in _INHERITED[kind]]


def _schemes(*places: str) -> list[str]:
    """Of the stores among them, each once."""
    return sorted({scheme(place) for place in places} & _INHERITED.keys())


def _check_foreign(job: Job) -> Iterator[Problem]:
    """What only our runner does."""
    if job.spec.runner != "none":
        return
    yield from (Problem(key, why) for key, why in asked_of_foreign(job, _FOREIGN))
    if scheme(job.output) != "file":
        yield Problem("output", f"{_NO_RUNNER}: results can't go to {job.output}; write a folder")
    for channel in job.channels:
        if channel.access != "mounted":
            yield Problem(f"data.{channel.name}", f"{_NO_RUNNER}: {channel.uri} can't be fetched; give a folder")


def _check_gpus(engine: Engine, wanted: int) -> Iterator[Problem]:
    if not wanted:
        return
    if wanted > (there := gpus.count()):
        hint = "resources.gpus: 0 trains on the CPU" if not there else f"at most resources.gpus: {there}"
        yield Problem("resources.gpus", f"{wanted} wanted, this machine has {there}; {hint}")
    elif engine.name == "podman" and not any(Path(folder).glob("*nvidia*") for folder in _CDI):
        how = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        yield Problem("resources.gpus", f"podman finds GPUs by {_CDI[0]}, where there is none of NVIDIA's; run: {how}")
    elif engine.name == "docker" and not any(map(shutil.which, _NVIDIA)):
        yield Problem("resources.gpus", "docker gives GPUs through the NVIDIA container toolkit; install it")


def _check_image(engine: Engine, reference: str) -> Iterator[Problem]:
    machine = _MACHINES.get(os.uname().machine, os.uname().machine)
    image = engine.image(reference)
    if image is None:
        yield Problem("image", f"{engine.name} has no image {reference}; {engine.name} pull {reference} brings it")
    elif image.platform.split("/")[1] != machine:
        message = f"{reference} is for {image.platform}, this machine is {machine}: it may not start, or be slow"
        yield Problem("image", message, fatal=False)


def _engine(folder: SupervisorFolder) -> Engine:
    """The one that has the container, whatever this shell would choose."""
    record = folder.record()
    return find_engine(record.engine) if record and record.engine else run_engine(folder.read_plan())


def _status(folder: SupervisorFolder) -> Status:
    return supervised.status(folder, _InContainer(folder))


@dataclass(frozen=True)
class _InContainer:
    """Of a run whose supervisor is gone: its container, or the client that is about to make one."""

    folder: SupervisorFolder

    def running(self) -> bool:
        container = self._container()
        return container.running if container else self._client_alive()

    def stop(self) -> None:
        """Our runner keeps the grace itself; a foreign image gets a moment, as nobody stays to count."""
        container, record = self._container(), self.folder.record()
        if container and container.running and self.folder.read_plan()["argv"]:
            _engine(self.folder).signal(container.name, "TERM")
        elif container and container.running:
            _engine(self.folder).read("stop", "-t", str(_STOP_S), container.name)
        elif record and record.runner and self._client_alive():
            supervised.send_signal(record.runner.pid, signal.SIGTERM)

    def end(self) -> Ended | None:
        container = self._container()
        if container is None or container.exit_code is None:
            return None
        return end_of(container, self.folder.read_plan(), log=self.folder.log)

    def _container(self) -> Container | None:
        known = known_id(self.folder.path)
        return _engine(self.folder).container(known) if known else None

    def _client_alive(self) -> bool:
        record = self.folder.record()
        return bool(record and record.runner and supervised.is_alive(record.runner))
