"""The job file: what the user wants, the same for every platform."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from launcher.contract import WEIGHTS_CHANNEL, channel_variable
from launcher.quantities import parse_duration, parse_size

__all__ = [
    "ClassifyConfig",
    "CodeSpec",
    "DetectConfig",
    "Duration",
    "JobSpec",
    "Model",
    "Real",
    "Resources",
    "Size",
    "TrainConfig",
    "Whole",
]


class Model(BaseModel):
    """What comes from a file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _no_truth(value: object) -> object:
    """pydantic would read `gpus: yes` as 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {str(value).lower()}")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Real = Annotated[float, BeforeValidator(_no_truth)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(description="bytes: 16Gi, 64GB", json_schema_extra={"type": ["integer", "string"]}),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(description="seconds: 12h, 90m, 1h30m", json_schema_extra={"type": ["number", "string"]}),
]

_CHANNEL = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|store:.+)")
_RESERVED_VARIABLES = ("CVLAUNCH_", "SM_CHANNEL_")


_OneOrMany = Annotated[
    tuple[str, ...],
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
_Variables = Annotated[
    dict[str, str],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "integer"]}}),
]
"""The schema is for what people write; validators turn it into the type."""


class Resources(Model):
    """What one node needs; `nodes` says how many."""

    nodes: Whole = Field(1, ge=1, le=1024, description="machines")
    gpus: Whole = Field(0, ge=0, le=64, description="GPUs per node; 0 trains on the CPU")
    gpu: _OneOrMany = Field((), description="acceptable GPU models, best first: [A100, L40S]")
    processes: Literal["auto"] | Annotated[Whole, Field(ge=1, le=64)] = Field(
        "auto", description="training processes per node; auto: one a GPU, one without GPUs"
    )
    cpus: Whole | None = Field(None, ge=1, le=1024, description="cores per node")
    memory: Size | None = Field(None, description="memory per node: 64GB")
    shm: Literal["auto"] | Size = Field("auto", description="shared memory per node: 16Gi")
    disk: Literal["auto"] | Size = Field("auto", description="scratch disk per node; auto: 1.2 × data + 20 GiB")
    timeout: Duration | None = Field(None, description="running time of all attempts together: 12h")
    max_wait: Duration | None = Field(None, description="longest time in a queue: 2h")
    spot: bool = Field(False, description="interruptible capacity, resumed from checkpoints")
    grace: Duration = Field(120.0, description="time between the stop signal and the kill: 2m")

    @field_validator("gpu", mode="before")
    @classmethod
    def _one_gpu_model(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _gpu_model_needs_gpus(self) -> Resources:
        if self.gpu and not self.gpus:
            raise ValueError("gpu names a model but gpus is 0; write gpus: 1")
        return self

    @property
    def processes_per_node(self) -> int:
        return max(self.gpus, 1) if self.processes == "auto" else self.processes


class _Train(Model):
    epochs: Whole = Field(10, ge=1, le=100_000, description="passes over the training images")
    batch: Whole = Field(32, ge=1, le=65_536, description="images per step and process")
    seed: Whole = Field(0, ge=0, lt=2**31, description="seeds weights, order and augmentation")
    workers: Whole = Field(2, ge=0, le=256, description="data loader processes; 0 loads in the training process")
    threads: Whole | None = Field(None, ge=1, le=256, description="CPU threads of one process; none: torch decides")
    init: str | None = Field(None, description="weights to start from: run://RUN/model, a URI or a path")
    checkpoint_every: Duration = Field(900.0, description="longest time between two checkpoints: 15m")
    patience: Whole | None = Field(None, ge=1, description="stop after so many epochs without a better result")


class ClassifyConfig(_Train):
    """Image classification with a timm model on class folders `<class>/<image>`; channels `train` and `val`."""

    task: Literal["classify"]
    model: str = Field("resnet18", description="a timm model name")
    pretrained: bool = Field(True, description="timm's published weights (network, or the channel `weights`)")
    image_size: Whole = Field(224, ge=8, le=4096, description="side of the square input in pixels")
    learning_rate: Real = Field(1e-3, gt=0, le=10, description="peak of the one-cycle schedule")
    weight_decay: Real = Field(0.05, ge=0, le=1, description="AdamW's")
    warmup: Real = Field(0.25, ge=0, lt=1, description="share of all steps in which the rate rises")
    label_smoothing: Real = Field(0.1, ge=0, lt=1)
    dropout: Real = Field(0.0, ge=0, lt=1, description="timm's drop_rate, before the last layer")
    augment: Literal["none", "shift", "standard"] = Field(
        "standard", description="none; shift: small moves and turns; standard: random resized crop and flip"
    )
    amp: bool = Field(True, description="mixed precision on a GPU; the CPU always computes in float32")


class DetectConfig(_Train):
    """Object detection with an Ultralytics YOLO model; channels hold images/ and labels/ in YOLO's format."""

    task: Literal["detect"]
    model: str = Field("yolo11n", description="an Ultralytics model name")
    pretrained: bool = Field(True, description="Ultralytics' published weights (network, or the channel `weights`)")
    image_size: Whole = Field(640, ge=32, le=4096, multiple_of=32, description="longer side of the input in pixels")
    learning_rate: Real | None = Field(None, gt=0, le=10, description="lr0; none: Ultralytics chooses")
    classes: tuple[str, ...] = Field((), description="names by class id; empty: data.yaml in the channel `train`")
    amp: bool = Field(True, description="mixed precision on a GPU")


TrainConfig = Annotated[ClassifyConfig | DetectConfig, Field(discriminator="task")]


class CodeSpec(Model):
    """The user's own code, archived and unpacked at `<root>/code` on the command's path."""

    root: str = Field(description="folder, relative to the job file")
    requirements: str | None = Field(None, description="lock file of packages to install, relative to root")


class JobSpec(Model):
    """A training job, said once."""

    name: str = Field(min_length=1, max_length=128, description="any text; the run id starts with a slug of it")
    image: str | None = Field(None, description="container image")
    build: str | None = Field(None, description="folder with a Dockerfile to build the image from")
    runner: Literal["auto", "none"] = Field("auto", description="none: a foreign image; nothing is injected")
    train: TrainConfig | None = Field(None, description="fine-tune with the built-in trainer")
    command: tuple[str, ...] | None = Field(None, min_length=1, description="or run this")
    code: CodeSpec | None = None
    data: dict[str, str] = Field(
        default_factory=dict, description="channel → dataset name, path, URI or target:/absolute/path"
    )
    resources: Resources = Resources()
    env: _Variables = Field(default_factory=dict, description="variables of the command")
    secrets: dict[str, str] = Field(
        default_factory=dict, description="variable → env:NAME, file:PATH or store:REFERENCE; never a value"
    )
    retries: Whole = Field(0, ge=0, le=100, description="restarts after a crash")
    max_attempts: Whole = Field(20, ge=1, le=1000, description="starts of all kinds, preemptions included")
    tags: dict[str, str] = Field(default_factory=dict)
    output: str | None = Field(None, description="where runs are kept; normally the target says it")
    native: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="backend → merge patch of what it is sent; the job is then not portable"
    )

    @field_validator("name")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value.isprintable() or not any(c.isalnum() for c in value):
            raise ValueError("expected one line with at least one letter or digit")
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        """`WORKERS: 4` is clear. `PYTHON: 3.10`, which YAML reads as 3.1, and `FLAG: yes` must be quoted."""
        return {k: str(v) if type(v) is int else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("env", "secrets")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is not a variable name; expected letters, digits and _")
            if name.startswith(_RESERVED_VARIABLES):
                raise ValueError(f"{name!r} is set by cvlaunch; choose another name")
            if "\0" in text:
                raise ValueError(f"{name!r} holds a NUL character")
        return value

    @field_validator("secrets")
    @classmethod
    def _references(cls, value: dict[str, str]) -> dict[str, str]:
        for name, reference in value.items():
            if not _SECRET.fullmatch(reference):
                raise ValueError(
                    f"the secret {name!r} is given by value; give a reference: env:{name}, file:PATH or store:REFERENCE"
                )
        return value

    @field_validator("data")
    @classmethod
    def _channels(cls, value: dict[str, str]) -> dict[str, str]:
        variables: dict[str, str] = {}
        for name, place in value.items():
            if not _CHANNEL.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a channel name; expected a-z, 0-9, _ and -, a letter first, at most 31"
                )
            other = variables.setdefault(channel_variable(name), name)
            if other != name:
                raise ValueError(f"channels {other!r} and {name!r} would share the variable {channel_variable(name)}")
            if not place:
                raise ValueError(f"channel {name!r} has no place")
        return value

    @field_validator("code")
    @classmethod
    def _requirements_inside(cls, value: CodeSpec | None) -> CodeSpec | None:
        if value and value.requirements:
            path = PurePosixPath(value.requirements)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError("requirements must be a path inside root")
        return value

    @model_validator(mode="after")
    def _one_thing_to_run(self) -> JobSpec:
        if self.train is not None and self.command is not None:
            raise ValueError("train and command are both given; keep one")
        if self.train is None and self.command is None and self.runner != "none":
            raise ValueError("nothing to run; give train or command")
        if self.image is not None and self.build is not None:
            raise ValueError("image and build are both given; keep one")
        if self.runner == "none" and (self.image is None or self.train is not None):
            raise ValueError("runner: none is for foreign images; give image, and command instead of train")
        both = sorted(set(self.env) & set(self.secrets))
        if both:
            raise ValueError(f"{both[0]!r} is in env and in secrets; keep one")
        if self.train is not None:
            missing = [c for c in ("train", "val") if c not in self.data]
            if missing:
                raise ValueError(f"train needs the data channels train and val; {missing[0]!r} is missing")
            if self.train.init and WEIGHTS_CHANNEL in self.data:
                raise ValueError("train.init and the channel weights are both given; keep one")
            self._check_detect()
        return self

    def _check_detect(self) -> None:
        if isinstance(self.train, DetectConfig) and self.resources.nodes > 1:
            raise ValueError(
                "detect trains on one node: Ultralytics derives its ranks per node and would train one model a node"
            )
        if isinstance(self.train, DetectConfig) and not self.resources.gpus and self.resources.processes_per_node > 1:
            raise ValueError("detect on the CPU trains in one process: Ultralytics' distributed training needs GPUs")
