"""Rehearsal: a job's image runs on this machine under another platform's rules, before that platform is paid for.

Two containers at most: one that may end by itself (a training after a few steps), and one that is asked to stop while
it trains. The output store is a folder of this machine, mounted; findings.py says what their logs and files mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import gpus, paths
from launcher.attempts import hand_over
from launcher.contract import CODE, JOB, OUTPUT_FOLDERS, RESULT, STARTED, JobFile, Layout, newest_checkpoint, read_json
from launcher.engine import ContainerOptions, Engine, LocalImage, Mount, engine_error, find_engine
from launcher.errors import SpecError, nearest
from launcher.findings import Case, Finding, Ran, Verdict, findings
from launcher.jobfile import load_job
from launcher.plan import job_file
from launcher.rules import DEFAULT_SHM, RULES, ContainerRules
from launcher.shm import shm_size
from launcher.spec import JobSpec
from launcher.stores import path_of, scheme
from launcher.submission import Prepared, client_secrets, prepare
from launcher.targets import load_targets

if TYPE_CHECKING:
    from launcher.backends.base import Job

__all__ = ["LABEL", "Report", "Request", "rehearse", "rules_of", "user_of"]

LABEL = "io.cvlaunch.rehearsal"
"""Of its containers: the process that rehearses."""

_BACKEND = "container"
_STORE, _DATA = "/mnt/cvlaunch-store", "/mnt/cvlaunch-data"
_RUNNER = "cvlaunch-run"
_RANDOM_UID, _RANDOM_UID_ROOTLESS = 1_000_730_000, 54_321
"""Like OpenShift's; a rootless engine has 65,536 ids."""
_STAND_IN_UID = 1000
"""For root, who runs no jobs on a cluster."""
_ENDLESS_EPOCHS = 100_000
_CHECKPOINT_EVERY_S = 1.0
_LOOK_S = 0.1
_LAST_LINES = 20
_LOG_BYTES = 4 << 20
_FILES_LOOKED_AT = 1000
_START_S = 120.0
"""A busy engine's."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be rehearsed. image: instead of the job's. steps: of training.

    seconds: how long a command may run, and how long a training has until its first checkpoint.
    """

    job: Path
    platform: str
    image: str | None = None
    settings: tuple[str, ...] = ()
    steps: int = 1
    seconds: float = 60.0
    network: bool = False


@dataclass(frozen=True)
class Report:
    """notes: what differs from the platform. assumed: what no source says of it. log: the last lines, if a rule is
    broken."""

    platform: str
    image: str
    user: str
    findings: Sequence[Finding]
    notes: Sequence[str] = ()
    assumed: Sequence[str] = ()
    log: Sequence[str] = ()

    @property
    def kept(self) -> bool:
        """Whether no rule is broken."""
        return all(finding.verdict is not Verdict.BROKEN for finding in self.findings)


def rules_of(platform: str) -> ContainerRules:
    """SpecError if there is none such, or none to rehearse."""
    known = ", ".join(RULES)
    if platform == "local":
        raise SpecError("local runs a process without a container: `cvlaunch submit` tries it at once", key="--like")
    if platform == _BACKEND:
        raise SpecError(f"container is this machine, which makes no rules; there are {known}", key="--like")
    if platform not in RULES:
        raise SpecError(f"unknown platform {platform!r}; there are {known}{nearest(platform, RULES)}", key="--like")
    return RULES[platform]


def user_of(rules: ContainerRules, image: LocalImage, *, rootless: bool = False) -> str | None:
    """`uid:gid` or what the image names; None is the caller, whom the engine knows."""
    if rules.uid == "image":
        return image.user or "0:0"
    if rules.uid is None and os.geteuid():
        return None
    uid = rules.uid
    if uid == "random":
        uid = _RANDOM_UID_ROOTLESS if rootless else _RANDOM_UID
    uid = _STAND_IN_UID if uid is None else uid
    return f"{uid}:{uid if rules.gid is None else rules.gid}"


def rehearse(request: Request, say: Say) -> Report:
    """Runs it. SpecError for a job that can't be rehearsed; whatever the image does wrong is in the report."""
    rules = rules_of(request.platform)
    folder = request.job.absolute().parent
    written = load_job(request.job, request.settings)
    engine = _engine(folder)
    image = _image(engine, written, request, folder, say)
    spec, notes = _here(written)
    with _scratch(engine, image) as scratch:
        spec = spec.model_copy(update={"image": image.config_digest, "build": None, "output": str(scratch / "output")})
        with (
            prepare(spec, backend=_BACKEND, folder=folder, online=request.network) as prepared,
            gpus.reserved(spec.resources.gpus, paths.data_folder() / "gpus") as reserved,
        ):
            values = client_secrets(spec, folder) | _stand_ins(written)
            devices = tuple(gpu.uuid for gpu in reserved)
            stage = _Stage(engine, rules, request, prepared, image, values, devices, scratch, say)
            stage.bring_data()
            return _report(stage, [*notes, *_notes(stage, written)])


def _engine(folder: Path) -> Engine:
    """The one that the target for containers names, as everywhere."""
    target = load_targets(folder).select(backend=_BACKEND).target
    return find_engine(getattr(target, "engine", None))


def _image(engine: Engine, spec: JobSpec, request: Request, folder: Path, say: Say) -> LocalImage:
    """Built or pulled where it isn't here yet."""
    from launcher.image import Wanted, pin

    name = request.image or spec.image
    built = folder / Path(spec.build).expanduser() if spec.build and request.image is None else None
    if not (name or built):
        raise SpecError("the job has no image to rehearse; add image: cvlaunch-trainer, or --image", key="image")
    wanted = Wanted("the rehearsal", None if built else name, built, here=True, engine=engine.name)
    reference = pin(wanted, make=say).reference
    found = engine.image(reference)
    if found is None:
        raise SpecError(f"{engine.name} does not know {reference}; check its name and tag", key="image")
    return found


def _here(spec: JobSpec) -> tuple[JobSpec, list[str]]:
    """The job as this machine can run it, without what one platform alone knows; and what that leaves out."""
    notes = []
    resources = spec.resources.model_copy(update={"nodes": 1, "spot": False, "max_wait": None})
    if spec.resources.nodes > 1:
        notes.append(f"one node instead of {spec.resources.nodes}")
    if resources.gpus > gpus.count():
        notes.append(f"on the CPU: the job asks for {resources.gpus} GPUs, and this machine has {gpus.count()}")
        resources = resources.model_copy(update={"gpus": 0, "gpu": (), "processes": 1})
    mine = {name: reference for name, reference in spec.secrets.items() if not reference.startswith("store:")}
    return spec.model_copy(update={"resources": resources, "native": {}, "secrets": mine, "retries": 0}), notes


def _stand_ins(spec: JobSpec) -> dict[str, str]:
    """For secrets that only the platform's store knows."""
    return {name: "rehearsal" for name, reference in spec.secrets.items() if reference.startswith("store:")}


def _notes(stage: _Stage, written: JobSpec) -> Iterator[str]:
    if stand_ins := sorted(_stand_ins(written)):
        yield f"a stand-in for {', '.join(stand_ins)}, which only the platform's secret store knows"
    if stage.values and stage.foreign:
        yield f"without {', '.join(sorted(stage.values))}: secrets reach a job by cvlaunch-run"
    if stage.rules.uid is None and not os.geteuid():
        yield f"as user {_STAND_IN_UID} instead of root, who runs no jobs on a cluster"
    if stage.rules.init and not stage.init:
        yield "as the container's first process: Podman has no catatonit here"
    if stage.engine.name == "docker" and stage.rules.passwd:
        yield "without an entry in /etc/passwd, which Docker can't make"


@contextlib.contextmanager
def _scratch(engine: Engine, image: LocalImage) -> Iterator[Path]:
    """A folder that is removed, too, if other users own what is in it: then a container does it."""
    folder = Path(tempfile.mkdtemp(prefix="cvlaunch-rehearsal-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            _remove_as_root(engine, image, folder)


def _remove_as_root(engine: Engine, image: LocalImage, folder: Path) -> None:
    options = ContainerOptions(
        image=image.config_digest,
        entrypoint=("rm", "-rf"),
        arguments=tuple(f"{_STORE}/{path.name}" for path in folder.iterdir()),
        mounts=(Mount(str(folder), _STORE),),
        user="0:0",
        network="none",
    )
    command = engine.run_command(options)
    subprocess.run([*command[:2], "--rm", *command[2:]], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise SpecError(f"{folder} could not be removed: other users own what is in it; run: sudo rm -r {folder}")


@dataclass
class _Stage:
    """values: of secrets. devices: UUIDs of GPUs. foreign: it runs without cvlaunch-run."""

    engine: Engine
    rules: ContainerRules
    request: Request
    prepared: Prepared
    image: LocalImage
    values: Mapping[str, str]
    devices: tuple[str, ...]
    folder: Path
    say: Say
    foreign: bool = False
    data: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.foreign = self.job.spec.runner == "none"

    @property
    def job(self) -> Job:
        return self.prepared.job

    @property
    def init(self) -> bool:
        """Docker brings its own."""
        places = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit")
        there = self.engine.name == "docker" or shutil.which("catatonit") or any(map(os.path.exists, places))
        return self.rules.init and bool(there)

    @property
    def shm(self) -> int:
        """Bytes: what the job gets where it can be asked for, else what must be expected."""
        if self.rules.shm.host:
            return shm_size() or DEFAULT_SHM
        asked = self.job.shm if self.rules.shm.how else None
        return asked or self.rules.shm.size or DEFAULT_SHM

    @property
    def grace_s(self) -> float:
        return min(self.rules.grace_s or math.inf, self.job.spec.resources.grace)

    @property
    def data_folder(self) -> str:
        """Where channels are mounted: where the contract has them, if the platform mounts the root or no runner links
        them there."""
        at_root = self.foreign or self.rules.root in self.rules.mounts
        return str(Layout(Path(self.rules.root)).channel("x").parent) if at_root else _DATA

    def bring_data(self) -> None:
        """Folders of this machine as they are; what is in a store is fetched, with --network."""
        self.data = {channel.name: self._bring(channel.name, channel.uri) for channel in self.job.channels}

    def _bring(self, name: str, uri: str) -> Path:
        if scheme(uri) == "file":
            if user_of(self.rules, self.image) not in (None, "0:0"):
                _check_readable(path_of(uri), name)
            return path_of(uri)
        if not self.request.network:
            raise SpecError(
                f"{uri} is in a store; give --network to fetch it, or a small folder: --set data.{name}=FOLDER",
                key=f"data.{name}",
            )
        import threading

        from launcher.runner.stage import stage_channels

        channel = next(channel for channel in self.job.channels if channel.name == name)
        layout = Layout(self.folder / "fetched")
        alone = dataclasses.replace(
            self.job_file("rehearsal"),
            channels=(dataclasses.replace(channel, access="staged"),),
            storage=self.job.target.storage.options.to_mapping(),
        )
        scratch = self.folder / "unpacked"
        unpacked = stage_channels(alone, layout, scratch, abort=threading.Event(), say=self.say)
        return unpacked.get(name, layout.channel(name))

    def job_file(self, run_id: str) -> JobFile:
        """As this stage runs it: outputs go to the mounted store, channels are mounted."""
        at_root = not self.data_folder.startswith(_DATA)
        channels = (
            dataclasses.replace(
                channel,
                uri=f"file://{self.data_folder}/{channel.name}",
                access="mounted" if at_root else "path",
            )
            for channel in self.job.channels
        )
        return dataclasses.replace(
            job_file(self.prepared.backend, self.job, run_id),
            output=f"file://{_STORE}",
            channels=tuple(channels),
            secrets={name: f"env:{name}" for name in self.values},
            movers=dict.fromkeys(OUTPUT_FOLDERS, "runner"),
            storage={},
        )


def _check_readable(folder: Path, name: str) -> None:
    """Platforms bring data in for their own user; here they are this user's files. Looks at the first thousand."""
    for path in itertools.islice(itertools.chain((folder,), folder.rglob("*")), _FILES_LOOKED_AT):
        wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
        if path.stat().st_mode & wanted != wanted:
            raise SpecError(
                f"{path} is closed to other users, as which the image runs here; run: chmod -R go+rX "
                f"{shlex.quote(str(folder))}",
                key=f"data.{name}",
            )


# One container


@dataclass(frozen=True)
class _Container:
    """A container that runs, and the folder of its run in the store."""

    stage: _Stage
    name: str
    client: subprocess.Popen[bytes]
    log: Path
    store: Path
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether it has ended by then, or when `until` is true."""
        end = time.monotonic() + seconds
        while self.client.poll() is None and time.monotonic() < end and not until():
            time.sleep(_LOOK_S)
        return self.client.poll() is not None

    def running(self) -> bool:
        """As a stop takes for granted: the engine has started it, and cvlaunch-run, if it is there, hears signals."""
        if not self.stage.foreign:
            return (self.store / STARTED).exists()
        known = self.stage.engine.container(self.name)
        return known is not None and known.running

    def stop(self) -> Ran:
        """Asks, waits for the grace, kills."""
        after, asked = self.seconds, time.monotonic()
        self.stage.engine.signal(self.name, self.stage.rules.stop_signal)
        in_time = self.wait(self.stage.grace_s)
        took = time.monotonic() - asked
        if not in_time:
            self.stage.engine.signal(self.name, "SIGKILL")
            self.client.wait()
        return dataclasses.replace(self.ran(), stopped_after=after, took=took if in_time else None)

    def ran(self) -> Ran:
        """What is known of it, now that it has ended."""
        seconds = self.seconds
        lines = self.lines()
        known = self.stage.engine.container(self.name)
        if known is None or known.exit_code is None:
            error = engine_error(
                self.stage.engine.name, "run", known.error if known and known.error else "\n".join(lines)
            )
            return Ran(seconds, None, lines, error=str(error))
        result = read_json(self.store / RESULT) or {}
        newest = newest_checkpoint(self.store / "checkpoints")
        return Ran(
            seconds,
            known.exit_code,
            lines,
            self.stage.engine.changes(self.name),
            result=result.get("state", ""),
            reason=result.get("reason", ""),
            upload=result.get("upload", ""),
            checkpoint=newest.name if newest else None,
            model=any((self.store / "model").glob("*")),
        )

    def lines(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(max(self.log.stat().st_size - _LOG_BYTES, 0))
            return file.read().decode(errors="replace").splitlines()


@contextlib.contextmanager
def _running(stage: _Stage, name: str, *, steps: int | None) -> Iterator[_Container]:
    """steps: of training, None for one without an end. The container is gone afterwards, whatever happens."""
    folder = _opened(stage.folder / name)
    run_id = f"rehearsal-{name}"
    options = _options(stage, folder, run_id, steps=steps)
    log = folder / "log"
    secret = bool(stage.values) and not stage.foreign
    with log.open("wb") as out:
        began = time.monotonic()
        client = subprocess.Popen(
            stage.engine.run_command(options),
            stdin=subprocess.PIPE if secret else subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours: the container is removed then
        )
    container = _Container(stage, str(options.name), client, log, folder / "store" / run_id, began)
    try:
        if secret:
            hand_over(client, _secret_lines(stage.values))
        yield container
    finally:
        if client.poll() is None:
            stage.engine.signal(container.name, "SIGKILL")  # a removal alone would ask first, and wait
        stage.engine.remove(container.name)
        client.wait()


def _secret_lines(values: Mapping[str, str]) -> bytes:
    """As the runner reads them from its standard input."""
    return "".join(f"{name}={json.dumps(value)}\n" for name, value in values.items()).encode()


def _opened(folder: Path) -> Path:
    """Made for any user: the folder above it keeps others out."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    return folder


def _options(stage: _Stage, folder: Path, run_id: str, *, steps: int | None) -> ContainerOptions:
    rules, job = stage.rules, stage.job
    mounts = [*_mounts(stage, folder), *_data_mounts(stage)]
    env = {**rules.env, "CVLAUNCH_JOB": f"{_STORE}/{run_id}/{JOB}"}
    if steps is not None:
        env["CVLAUNCH_MAX_STEPS"] = str(steps)
    if stage.foreign:
        env |= job.spec.env
    else:
        _store_job(stage, folder, run_id, endless=steps is None)
        env |= {"CVLAUNCH_SECRETS_FILE": "-"} if stage.values else {}
        mounts.append(Mount(str(folder / "store"), _STORE))
    return ContainerOptions(
        image=stage.image.config_digest,
        entrypoint=None if stage.foreign else (_RUNNER,),
        arguments=(job.command or ()) if stage.foreign else (),
        name=f"cvlaunch-rehearsal-{secrets.token_hex(4)}",
        labels={LABEL: str(os.getpid())},
        env=env,
        mounts=tuple(mounts),
        user=user_of(rules, stage.image, rootless=stage.engine.rootless),
        groups=rules.groups,
        shm=stage.shm,
        gpus=stage.devices,
        network=None if stage.request.network else "none",
        read_only=rules.read_only_root,
        passwd=rules.passwd,
        drop_capabilities=rules.drop_capabilities,
        stop_signal=rules.stop_signal,
        init=stage.init,
        keep_stdin=bool(stage.values) and not stage.foreign,
    )


def _mounts(stage: _Stage, folder: Path) -> Iterator[Mount]:
    """The platform's, empty but for what it writes itself."""
    rules = stage.rules
    for number, target in enumerate(rules.mounts):
        source = _opened(folder / f"mount-{number}")
        if target == rules.root:
            for name in ("input", "input/data", "input/config", "input/control", *OUTPUT_FOLDERS):
                _opened(source / name)
            for name, text in rules.files.items():
                (source / name).write_text(text)
        yield Mount(str(source), target)


def _data_mounts(stage: _Stage) -> Iterator[Mount]:
    for name, source in stage.data.items():
        yield Mount(str(source), f"{stage.data_folder}/{name}", read_only=True)


def _store_job(stage: _Stage, folder: Path, run_id: str, *, endless: bool) -> None:
    """job.json and the code, as the client stores them before it submits."""
    run = _opened(_opened(folder / "store") / run_id)
    for name in ("input", "input/config"):
        _opened(run / name)
    job = stage.job_file(run_id)
    if endless and job.train:
        endless_train = {"epochs": _ENDLESS_EPOCHS, "patience": None, "checkpoint_every": _CHECKPOINT_EVERY_S}
        job = dataclasses.replace(job, train={**job.train, **endless_train})
    (run / JOB).write_bytes(job.to_bytes())
    if stage.job.code_archive:
        shutil.copyfile(stage.job.code_archive, run / CODE)


# The play


def _report(stage: _Stage, notes: Sequence[str]) -> Report:
    first, stopped, no_runner = _play(stage)
    case = Case(
        platform=stage.request.platform,
        rules=stage.rules,
        image=stage.image,
        user=user_of(stage.rules, stage.image, rootless=stage.engine.rootless) or f"{os.geteuid()}:{os.getegid()}",
        runner=not stage.foreign,
        trains=bool(stage.job.train) and not stage.foreign,
        shm=stage.shm,
        grace_s=stage.grace_s,
        network=stage.request.network,
        mounted=(*stage.rules.mounts, _STORE, _DATA, stage.data_folder),
    )
    found = findings(case, first, stopped, no_runner=no_runner)
    bad = any(finding.verdict is Verdict.BROKEN for finding in found)
    lines = list((stopped if stopped and not first.failed else first).lines)[-_LAST_LINES:] if bad else []
    name = next(iter(stage.image.names), stage.image.config_digest)
    assumed = tuple(stage.rules.assumed.values())
    return Report(stage.request.platform, name, case.user, found, notes, assumed, lines)


def _play(stage: _Stage) -> tuple[Ran, Ran | None, str]:
    """(the first run, the one that was stopped, why cvlaunch-run could not be started)."""
    first, stopped = _first(stage)
    no_runner = ""
    if first.exit_code is None and not stage.foreign and _RUNNER in first.error:
        no_runner = f"{_RUNNER} is not in the image"
        stage.foreign = True
        first, stopped = _first(stage)
    if stopped is None and first.exit_code is not None and not first.failed:
        stopped = _second(stage, first)
    return first, stopped, no_runner


def _first(stage: _Stage) -> tuple[Ran, Ran | None]:
    """A training ends after its steps; a command that goes on is stopped, which is all that there is to see then."""
    trains = bool(stage.job.train) and not stage.foreign
    what = f"{stage.request.steps} step{'s' * (stage.request.steps > 1)} of training" if trains else "the command"
    stage.say(f"running {what} as on {stage.request.platform}")
    with _running(stage, "first", steps=stage.request.steps) as container:
        if container.wait(math.inf if trains else stage.request.seconds):
            return container.ran(), None
        stage.say(f"still running after {stage.request.seconds:g} s; stopping it, with {stage.grace_s:g} s of grace")
        stopped = container.stop()
        return stopped, stopped


def _second(stage: _Stage, first: Ran) -> Ran:
    """A training is stopped at its first checkpoint, a command half way."""
    trains = bool(stage.job.train) and not stage.foreign
    stage.say(f"again, to stop it with {stage.rules.stop_signal} and {stage.grace_s:g} s of grace")
    with _running(stage, "second", steps=None) as container:
        wait = stage.request.seconds if trains else first.seconds / 2
        container.wait(_START_S, until=container.running)
        if container.wait(
            wait, until=lambda: trains and newest_checkpoint(container.store / "checkpoints") is not None
        ):
            return container.ran()
        return container.stop()
