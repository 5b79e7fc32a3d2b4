"""What a backend is: types that pass between resolve, plan, submit and watch.

A backend module holds tables (words → State, errors → ours, features, rules) and few short methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, Field

from launcher.contract import Channel, Code, JobFile
from launcher.errors import SpecError
from launcher.rules import ContainerRules
from launcher.spec import JobSpec, Model
from launcher.status import Status
from launcher.stores import StorageOptions, Store

__all__ = [
    "IGNORABLE",
    "Adopted",
    "Adopts",
    "Backend",
    "BaseTarget",
    "Elsewhere",
    "Feature",
    "Handle",
    "Image",
    "Job",
    "LogLine",
    "Notify",
    "Output",
    "Plan",
    "Problem",
    "Remarks",
    "Reviews",
    "Storage",
    "Support",
    "Transport",
    "Url",
    "asked_of_foreign",
    "disk_for_data",
    "features_missing",
    "native_name",
]


IGNORABLE = ("image", "build", "resources.gpu", "resources.cpus", "resources.memory", "resources.disk")
"""Keys of a job that a backend may do nothing with (`Backend.ignored`); it must carry out all others or refuse them."""


_REGISTRY = r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+$"
"""With a repository, without a tag: each image gets one of its own."""


def _a_url(value: str) -> str:
    """HTTP clients say so in many ways, some of which are no words at all."""
    if not re.match(r"https?://[^/]", value):
        raise ValueError(f"expected a URL such as https://s3.example.com, found {value!r}")
    if re.match(r"[^/]+//[^/?#]*@", value):  # it would travel with each job
        raise ValueError("a URL with a user or password in it: leave them out, and give them as credentials")
    return value


Url = Annotated[str, AfterValidator(_a_url)]


class Storage(Model):
    """How the object stores of a target are reached; keys and passwords don't belong here."""

    endpoint: Url | None = Field(
        None, description="S3 endpoint of OVH, MinIO, Ceph, ODF: https://s3.gra.io.cloud.ovh.net"
    )
    region: str | None = None
    profile: str | None = Field(None, description="AWS profile of this machine, SSO included")
    ca_bundle: str | None = Field(None, description="certificates of a private authority (PEM)")

    @property
    def options(self) -> StorageOptions:
        return StorageOptions.from_mapping({k: v for k, v in self.model_dump().items() if v is not None})


class Notify(Model):
    """Tells somebody when a watched run ends."""

    command: tuple[str, ...] | None = Field(None, min_length=1, description="run with the end as JSON on its input")
    webhook: str | None = Field(None, pattern=r"^https?://", description="gets the end as a JSON POST")


class BaseTarget(Model):
    """A place to run jobs: the keys that every backend knows."""

    backend: str
    output: str | None = Field(None, description="where runs are kept: a folder or s3://bucket/prefix")
    registry: str | None = Field(
        None, pattern=_REGISTRY, description="where built images are pushed: registry.example.com/team/trainer"
    )
    storage: Storage = Storage()
    notify: Notify = Notify()
    templates: str | None = Field(
        None, description="folder with templates (kubernetes/job.yaml.j2), looked in before ours"
    )
    overlay: dict[str, Any] | list[dict[str, Any]] | None = Field(
        None, description="changes to the rendered text: a JSON merge patch (mapping) or a JSON patch (list)"
    )

    @property
    def reached_by(self) -> str | None:
        """`ssh://login1` where jobs see the folders of another machine, which this one reaches so; None: it is here.

        A path of the target is then `ssh://login1/path` here.
        """
        return None

    @property
    def has_image_files(self) -> bool:
        """Whether an image may also be a file or folder of the machine that runs jobs, by its absolute path."""
        return False


class Feature(StrEnum):
    """What a user may ask for and a backend may lack.

    `resolve` refuses a job that asks for one that is missing: CONTAINER is asked for by `runner: none`, RESTART (the
    platform starts a job again after taking its machine away) by `spot`. Nothing in a job asks for FOLLOW_LOGS or
    EXEC: they tell people what to expect, and `cvlaunch exec` why not.
    """

    GPUS = "gpus"
    MULTI_NODE = "multi-node"
    SHM = "shm"
    SPOT = "spot"
    RESTART = "restart"
    MAX_WAIT = "max_wait"
    SECRETS_CLIENT = "secrets from this machine (env:, file:)"
    SECRETS_STORE = "secrets from a store (store:)"
    CONTAINER = "container image"
    FOLLOW_LOGS = "follow logs"
    EXEC = "exec"


@dataclass(frozen=True)
class Support:
    """Whether a backend has a feature; without it, `reason` says why and what to do instead."""

    supported: bool
    reason: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that `check` found: what, and the way out. fatal: the job would not be accepted."""

    thing: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.thing}: {self.message}"


@dataclass(frozen=True)
class Transport:
    """Who moves what: one writer for each folder.

    channels: access of each channel (contract.Channel.access) by the scheme of its URI.
    movers: folder → in_place, runner or platform (contract.JobFile.movers).
    """

    channels: Mapping[str, str]
    movers: Mapping[str, str]


@dataclass(frozen=True)
class Image:
    """A container image. reference: what is sent, with the manifest's digest where it is known.

    digest: the manifest's, `sha256:…`. config_digest: the same before and after a push. None: unknown.
    """

    reference: str
    digest: str | None = None
    config_digest: str | None = None


@dataclass(frozen=True)
class Job:
    """A resolved job: complete and frozen. All I/O is behind it.

    output: base URI; the run's folder is `<output>/<run_id>`. unpinned: what the digest can't vouch for.
    shm, disk: bytes. storage: StorageOptions for the runner. code_archive: path of the archive on this machine.
    """

    spec: JobSpec
    target_name: str
    target: BaseTarget
    output: str
    channels: tuple[Channel, ...]
    image: Image | None
    code: Code | None
    code_archive: str | None
    train: Mapping[str, Any] | None
    command: tuple[str, ...] | None
    digest: str
    shm: int | None
    disk: int
    storage: Mapping[str, str] = field(default_factory=dict)
    unpinned: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the user wrote and this backend does not do, and what was not looked at."""
    version: str = ""


@dataclass(frozen=True)
class Output:
    """A place where results appear: `uri` holds a tree, or is a tar to unpack, into folder `into` of the run."""

    uri: str
    form: Literal["tree", "tar"] = "tree"
    into: str = ""


@dataclass(frozen=True)
class Plan:
    """The job in the platform's own form. `text` is what is sent, nothing added or removed.

    files: path in the run's folder → bytes, or the path of a file here; put in the output store before the call.
    placeholders: what nobody has given yet; such a plan is for reading, not for sending.
    """

    run_id: str
    backend: str
    text: str
    files: Mapping[str, bytes | str]
    job_digest: str
    plan_sha: str
    outputs: tuple[Output, ...]
    shm: str = ""
    """How much shared memory there will be, who sets it, and what follows if it is too little; a line for people."""
    notes: tuple[str, ...] = ()
    """What the backend has chosen, for people: a machine and its price."""
    unpinned: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Handle:
    """Enough to ask again from another process on another day. Prints as `slurm://hpc/1234`."""

    backend: str
    target: str
    native: str

    def __str__(self) -> str:
        return f"{self.backend}://{self.target}/{self.native}"

    @classmethod
    def parse(cls, text: str) -> Handle:
        backend, found, rest = text.partition("://")
        target, slash, native = rest.partition("/")
        if not (found and slash and backend and target and native):
            raise SpecError(f"{text!r} is not a handle; a handle looks like slurm://hpc/1234")
        return cls(backend, target, native)


@dataclass(frozen=True)
class LogLine:
    """One line. time: Unix seconds, None if unknown. rank: `-` is the runner itself.

    cursor: pass it as `since` to go on with the line after this one.
    """

    text: str
    time: float | None = None
    rank: str = "-"
    node: int = 0
    attempt: int = 1
    cursor: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """Of a job that was made without cvlaunch. id: the platform's, which no other job ever has. created: Unix seconds.

    outputs: where its results appear, each with its folder of the run; the first is what people look for.
    """

    id: str
    created: float
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Adopted:
    """A job that somebody else has sent.

    text: what was sent. job: its job.json; of one that was made elsewhere what is known of it, without a run id.
    has_runner: False for a foreign image of ours (`runner: none`). attempt: which submission of the run it is.
    notes: for people.
    """

    handle: Handle
    text: str
    job: JobFile
    has_runner: bool = True
    attempt: int = 1
    elsewhere: Elsewhere | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Adopts(Protocol):
    """A backend whose platform is shared by many who send jobs."""

    def adopt(self, name: str) -> Adopted:
        """name: a run id, or the platform's own. SpecError if there is no such job, or none that can be taken in."""
        ...


@dataclass(frozen=True)
class Remarks:
    """notes: what was chosen. warnings: what the user may not expect. missing: what nobody has given yet."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@runtime_checkable
class Examines(Protocol):
    """A backend whose platform refuses by itself, when a job is sent, most of what could not run there.

    `check` is then quick, and `examine` asks for all that may be wrong, beforehand.
    """

    def examine(self, job: Job) -> Iterator[Problem]: ...


@runtime_checkable
class Reviews(Protocol):
    """A backend that knows offline what its platform would refuse."""

    def review(self, job: Job, text: str) -> Remarks:
        """text: what would be sent, overlays applied. SpecError if the platform would refuse it. Pure."""
        ...


class Backend(Protocol):
    """One platform, bound to one target. Holds no state but its target.

    `template` is `<folder>/<file>` below `templates/`. `form` says how Plan.text is parsed: json, yaml or script.
    `inline_job`: job.json travels in the text; otherwise in Plan.files.
    `doubt_s`: how long a job that was sent may stay invisible to `find`.
    """

    name: ClassVar[str]
    Target: ClassVar[type[BaseTarget]]
    template: ClassVar[str]
    form: ClassVar[Literal["json", "yaml", "script"]]
    inline_job: ClassVar[bool]
    doubt_s: ClassVar[float]
    features: ClassVar[Mapping[Feature, Support]]
    placeholders: ClassVar[Mapping[str, str]]
    """Key of the target → well-formed stand-in, marked REPLACE-ME, for what neither it nor (`output`) the job gives."""

    def __init__(self, target: Any, target_name: str) -> None: ...

    @property
    def rules(self) -> ContainerRules: ...

    @property
    def ignored(self) -> Mapping[str, str]:
        """Key of the job file (`IGNORABLE`) → why this backend does nothing with it; the user is told."""
        ...

    @property
    def transports(self) -> Mapping[str, Transport]:
        """Scheme of the output → who moves what."""
        ...

    @property
    def target(self) -> BaseTarget: ...

    @property
    def target_name(self) -> str: ...

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        """The template's variables; pure."""
        ...

    def check(self, job: Job) -> Iterator[Problem]:
        """Would this job be accepted? Account, quota, image, data, room."""
        ...

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        """Sends the plan; adopts a job of the same name and plan_sha; ConflictError if the name is another's.

        attempt: later ones go on from the checkpoints of the first (`native_name`).
        """
        ...

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        """`submit` of each plan, in their order, in as few calls as the platform allows: a sweep is one array job.

        secrets: the same for every plan. After an error some may have been sent: `find` knows which.
        """
        ...

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        """The jobs of these run ids that the platform knows."""
        ...

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """Many in as few calls as the platform allows; a handle that is gone is UNKNOWN or LOST, never left out."""
        ...

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """Oldest first. follow: until the job has ended. since: the cursor of the last line seen."""
        ...

    def cancel(self, handle: Handle) -> None:
        """May be repeated, may be late."""
        ...

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        """Runs a command beside a run that is going on, with its environment; the command's exit code.

        Standard input, output and error are ours; tty: they are a terminal. SpecError if nothing runs there now.
        A backend without Feature.EXEC raises UnsupportedError with its reason.
        """
        ...

    def remove(self, handle: Handle) -> None:
        """Deletes what the platform still holds of an ended job; nothing there is fine."""
        ...

    def store(self, uri: str) -> Store | None:
        """A store for schemes that only this backend can reach (pvc://, ssh://), else None."""
        ...


def asked_of_foreign(job: Job, lacking: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What a job with a foreign image (runner: none) asks for, of what only our runner does.

    lacking: key of the job → why such an image can't have it on this platform.
    """
    if job.spec.runner == "none":
        yield from ((key, why) for key, why in lacking.items() if getattr(job.spec, key))


def native_name(run_id: str, attempt: int = 1) -> str:
    """The run id as it stands, `-2`, `-3` for later attempts: at most 40 + 3 characters, fits every platform."""
    return run_id if attempt == 1 else f"{run_id}-{attempt}"


def disk_for_data(sizes: Iterable[int | None]) -> int:
    """Bytes of disk for channels that are copied to it, a fifth more than theirs; None: unknown."""
    return int(1.2 * sum(size or 0 for size in sizes))


def features_missing(backend: type[Backend], wanted: Iterable[Feature]) -> Iterator[tuple[Feature, str]]:
    for feature in wanted:
        support = backend.features.get(feature, Support(False, "not known to this backend"))
        if not support.supported:
            yield feature, support.reason
