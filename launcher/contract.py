"""The contract between launcher and container: folders, variables, files, exit codes. Standard library only.

    <root>/input/data/<channel>/      read-only       <root>/input/config/job.json
    <root>/input/control/stop                         <root>/checkpoints/<step>/
    <root>/model/                                     <root>/output/

`<root>` is /opt/ml in a container, which are SageMaker's paths, because its can't be moved.
In the output store the run's folder `<output>/<run_id>/` has the same tree, plus `started.json`, `owner`,
`heartbeat`, `control/` and, while the run is going on, `segments/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ARTIFACTS",
    "CANCEL",
    "CODE",
    "COMPLETE",
    "CONTRACT",
    "CONTRACTS_ACCEPTED",
    "DEFAULT_ROOT",
    "ENVIRONMENT",
    "EXIT_BAD_CONFIG",
    "EXIT_CANCELLED",
    "EXIT_DONE",
    "EXIT_LOST",
    "EXIT_PREEMPTED",
    "HEARTBEAT",
    "JOB",
    "LOGS",
    "MANIFEST",
    "METRICS",
    "MIRROR",
    "OUTPUT_FOLDERS",
    "OWNER",
    "PACKED",
    "RESULT",
    "SEGMENTS",
    "STARTED",
    "WATCH",
    "WEIGHTS_CHANNEL",
    "Channel",
    "Code",
    "JobFile",
    "Layout",
    "being_uploaded",
    "canonical_json",
    "channel_variable",
    "check_checkpoint",
    "complete_checkpoint",
    "is_marker",
    "newest_checkpoint",
    "read_json",
    "sha256_file",
    "write_json",
]

CONTRACT = 1
CONTRACTS_ACCEPTED = (1,)
"""A runner accepts its own version and the one before."""

DEFAULT_ROOT = "/opt/ml"

EXIT_DONE = 0
EXIT_BAD_CONFIG = 64
"""sysexits.h EX_USAGE: restarting can't help."""
EXIT_PREEMPTED = 75
"""sysexits.h EX_TEMPFAIL: stopped with a complete checkpoint; start me again."""
EXIT_CANCELLED = 143
EXIT_LOST = 255
"""What a kubelet says of a container whose node was restarted under it; no runner in a pod ends with it."""

# Files of the run's folder in the output store, relative to <output>/<run_id>/.
STARTED = "started.json"
OWNER = "owner"
HEARTBEAT = "heartbeat"
CANCEL = "control/cancel"
WATCH = "control/watch"
RESULT = "output/result.json"
METRICS = "output/metrics.jsonl"
ENVIRONMENT = "output/environment.json"
LOGS = "output/logs"
SEGMENTS = "segments"
JOB = "input/config/job.json"
CODE = "input/code.tar.gz"
ARTIFACTS = "artifacts"
"""Where a platform leaves `<its name of the job>/output/`: model.tar.gz and output.tar.gz, or model/ and data/."""
MIRROR = "checkpoints/.cvlaunch"
"""The run's folder for a runner that reaches no store: the platform brings it out and, at a restart, back."""
PACKED = ".cvlaunch"
"""In output.tar.gz, what that runner leaves at its end, as it stands in the run's folder."""

OUTPUT_FOLDERS = ("checkpoints", "model", "output")
WEIGHTS_CHANNEL = "weights"
"""Reserved channel: weights to start from, for machines without network and for `train.init`."""

MANIFEST = ".cvlaunch-manifest.json"
COMPLETE = "complete.json"


@dataclass(frozen=True)
class Layout:
    """Where things stand below one root. Every member is an absolute path.

    places: variable of a channel → its folder, where that is another than the usual one.
    """

    root: Path
    places: Mapping[str, Path] = field(default_factory=dict, compare=False)

    @property
    def job(self) -> Path:
        return self.root / JOB

    @property
    def stop(self) -> Path:
        return self.root / "input/control/stop"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def metrics(self) -> Path:
        return self.root / METRICS

    @property
    def exit(self) -> Path:
        """`{"code": 75, "reason": "..."}`, left by rank 0 through a rename; preferred to a process's own code."""
        return self.output / "exit.json"

    @property
    def failure(self) -> Path:
        """Plain text, at most 1024 characters: why the job failed (SageMaker shows it)."""
        return self.output / "failure"

    def channel(self, name: str) -> Path:
        return self.places.get(channel_variable(name), self.root / "input/data" / name)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Layout:
        """The layout of the running job: `$CVLAUNCH_ROOT`, or /opt/ml; channels by their variables."""
        environ = os.environ if environ is None else environ
        places = {name: Path(value) for name, value in environ.items() if name.startswith(_CHANNEL_VARIABLE)}
        return cls(Path(environ.get("CVLAUNCH_ROOT", DEFAULT_ROOT)), places)


_CHANNEL_VARIABLE = "CVLAUNCH_DATA_"


def channel_variable(channel: str) -> str:
    """`CVLAUNCH_DATA_<CHANNEL>`: upper case, everything but letters and digits as `_`."""
    return _CHANNEL_VARIABLE + "".join(c if c.isalnum() else "_" for c in channel).upper()


@dataclass(frozen=True)
class Channel:
    """One input folder.

    access: `path` (already a folder of this machine: `uri` is file://), `mounted` (the platform put it at
    `<root>/input/data/<name>`), `staged` (the runner copies it from the store at `uri`).
    fingerprint: SHA-256 of the manifest's lines, None if the data has no manifest. files, size: count and bytes.
    """

    name: str
    uri: str
    access: str = "staged"
    fingerprint: str | None = None
    files: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Code:
    """The user's code archive: a .tar.gz at `CODE` in the run's folder of the output store."""

    sha256: str
    size: int
    requirements: str | None = None
    commit: str | None = None
    dirty: bool = False


@dataclass(frozen=True)
class JobFile:
    """job.json: all that the runner knows. Exactly one of `command` and `train` is given.

    movers: folder of `OUTPUT_FOLDERS` → `in_place` (root is the output), `runner` (uploads), `platform` (brings out
    what stands there; for `output` also: the runner reaches no store, and keeps its account in `MIRROR`).
    timeout_s bounds the running time of all attempts together; grace_s is the time between TERM and KILL.
    image: `reference`, `digest` (of the manifest) and `config_digest`, as far as they are known; None for a process.
    """

    run_id: str
    name: str
    job_digest: str
    output: str
    command: tuple[str, ...] | None = None
    train: Mapping[str, Any] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    channels: tuple[Channel, ...] = ()
    code: Code | None = None
    image: Mapping[str, str | None] | None = None
    nodes: int = 1
    gpus: int = 0
    processes: int = 1
    movers: Mapping[str, str] = field(default_factory=dict)
    retries: int = 0
    max_attempts: int = 20
    timeout_s: float | None = None
    grace_s: float = 120.0
    tags: Mapping[str, str] = field(default_factory=dict)
    storage: Mapping[str, str] = field(default_factory=dict)
    cvlaunch: str = ""
    contract: int = CONTRACT

    def to_json(self) -> dict[str, Any]:
        channels = [dataclasses.asdict(channel) for channel in self.channels]
        return {**vars(self), "channels": channels, "code": dataclasses.asdict(self.code) if self.code else None}

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json()) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> JobFile:
        """Reads any accepted version; keys of newer minor changes are ignored. ValueError if it can't be read."""
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("contract") not in CONTRACTS_ACCEPTED:
            found = raw.get("contract") if isinstance(raw, dict) else type(raw).__name__
            accepted = ", ".join(map(str, CONTRACTS_ACCEPTED))
            raise ValueError(f"contract version {found}, this runner takes {accepted}: rebuild the image")
        values = _known(cls, raw)
        try:
            values["channels"] = tuple(Channel(**_known(Channel, c)) for c in values.get("channels") or ())
            values["command"] = tuple(values["command"]) if values.get("command") else None
            values["code"] = Code(**_known(Code, values["code"])) if values.get("code") else None
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"job.json: {error}") from error


def _known(kind: type[JobFile | Channel | Code], raw: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: raw[field.name] for field in dataclasses.fields(kind) if field.name in raw}


def canonical_json(value: object) -> bytes:
    """Sorted keys, no white space, UTF-8, no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Writes by rename, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none, or only part of one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_UPLOADING, _UPLOADED = ".sagemaker-uploading", ".sagemaker-uploaded"
"""SageMaker's agent puts the first beside a file of checkpoints/ while it sends it, then the second in its place.

https://github.com/aws/sagemaker-xgboost-container, src/sagemaker_xgboost_container/checkpointing.py
"""


def is_marker(name: str) -> bool:
    """Whether a file of that name is a platform's remark on the one beside it, which comes and goes at any time."""
    return name.endswith((_UPLOADING, _UPLOADED))


def being_uploaded(folder: Path) -> bool:
    """Whether the platform is sending a file in `folder`, as its markers say: not the moment to remove it."""
    names = {str(path) for path in folder.rglob("*")}
    files = (name.removesuffix(_UPLOADING) for name in names if name.endswith(_UPLOADING))
    return any(file in names and file + _UPLOADED not in names for file in files)


def complete_checkpoint(folder: Path, **extra: object) -> None:
    """Ends a checkpoint: writes `complete.json` with size and SHA-256 of each file. Without it, it does not exist.

    A platform's markers are no files of it. extra: JSON values kept beside the files, such as step, epoch and metric.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE and not path.name.endswith(".part") and not is_marker(path.name)
    }
    write_json(folder / COMPLETE, {"files": files, **extra})


def check_checkpoint(folder: Path, *, read: bool = True) -> dict[str, Any] | None:
    """The content of `complete.json` if every file is there and has its recorded hash, else None.

    read: False takes its size to be enough, and reads none of them.
    """
    try:
        complete: dict[str, Any] = json.loads((folder / COMPLETE).read_text())
        for name, facts in complete["files"].items():
            path = folder / name
            if path.stat().st_size != facts["size"] or (read and sha256_file(path) != facts["sha256"]):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return complete


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The folder with the highest step that checks; damaged and unfinished ones are passed over."""
    if not checkpoints.is_dir():
        return None
    steps = sorted((p for p in checkpoints.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name), reverse=True)
    return next((p for p in steps if check_checkpoint(p) is not None), None)
