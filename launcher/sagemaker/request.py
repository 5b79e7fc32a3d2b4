"""From a resolved job to the body of CreateTrainingJob: the variables of the template. Pure."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from launcher.backends.base import Job, disk_for_data
from launcher.contract import ARTIFACTS, DEFAULT_ROOT, JOB, Channel, JobFile
from launcher.errors import SpecError
from launcher.quantities import format_duration
from launcher.rules import RULES
from launcher.sagemaker.catalogue import InstanceType, choose, instance_type
from launcher.sagemaker.client import Json
from launcher.sagemaker.target import LONGEST_RUN_S, SageMakerTarget
from launcher.stores import join_uri

__all__ = [
    "DIGEST",
    "JOB_CHANNEL",
    "METRICS",
    "PLAN_SHA",
    "ROLE",
    "RUN",
    "instances",
    "is_accelerated",
    "longest_run",
    "request_context",
    "too_large",
]

RUN, DIGEST, PLAN_SHA = "cvlaunch-run", "cvlaunch-digest", "cvlaunch-plan-sha"
"""Keys of tags. The last holds the hash of the text, so that it can't stand in it: it is added when it is sent."""

ROLE = "arn:aws:iam::000000000000:role/REPLACE-ME"
JOB_CHANNEL = "cvlaunch"
"""Brings job.json and code where the container reaches no store."""

_AROUND_TIMEOUT_S = 15 * 60
"""The platform's limit is the job's own plus this: the runner keeps the timeout, over all starts."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 1800, 28 * 24 * 3600
_GIB = 1 << 30
_TOO_MANY = 4
"""Times the GPUs that a job uses."""

_MOST_TAGS = 49
"""One is added when the job is sent."""
_MOST_HYPERPARAMETERS, _LONGEST_HYPERPARAMETER = 100, 256
"""The manual says 256 characters, the service's model 2,500."""

_NUMBER = "([0-9.]+(?:e[+-]?[0-9]+)?)"
_EPOCH = "epoch [0-9]+/[0-9]+"
_SHARED = {
    "train/lr": f"{_EPOCH}.*  lr {_NUMBER}",
    "train/images_per_second": f"{_EPOCH}.*  {_NUMBER} images/s",
}
METRICS: Mapping[str, Mapping[str, str]] = {
    "classify": {
        **_SHARED,
        "train/epoch_loss": f"{_EPOCH}  loss {_NUMBER}",
        "train/epoch_accuracy": f"{_EPOCH}  loss [^ ]+  acc {_NUMBER}",
        "val/loss": f"{_EPOCH}.*  val loss {_NUMBER}",
        "val/accuracy": f"{_EPOCH}.*  val acc {_NUMBER}",
    },
    "detect": {
        **_SHARED,
        "train/loss": f"{_EPOCH}  loss {_NUMBER}",
        "val/map50": f"{_EPOCH}.*  val map50 {_NUMBER}",
        "val/map": f"{_EPOCH}.*  map {_NUMBER}",
    },
}
"""Task → name of a metric → where it stands in the line that our trainer prints after an epoch.

Names are those of metrics.jsonl, but for means over an epoch, where that has single steps.
"""


def instances(job: Job, target: SageMakerTarget) -> tuple[str, ...]:
    """Acceptable types, best first; several only where SageMaker may choose. SpecError if it has none that will do."""
    found = target.instance_types or tuple(kind.name for kind in _sorted_out(job, target)[0])
    return found[:1] if job.spec.resources.spot else found


def too_large(job: Job, target: SageMakerTarget) -> tuple[InstanceType, ...]:
    """Types of acceptable GPUs that are sold in such numbers that nobody means them who names others beside."""
    return _sorted_out(job, target)[1]


def _sorted_out(job: Job, target: SageMakerTarget) -> tuple[tuple[InstanceType, ...], tuple[InstanceType, ...]]:
    """(those that will do, those that are passed over for them)"""
    chosen = _chosen(job, target)
    large = tuple(kind for kind in chosen if kind.gpus >= _TOO_MANY * job.spec.resources.gpus > 0)
    fitting = tuple(kind for kind in chosen if kind not in large)
    return (fitting, large) if fitting else (chosen, ())


def _chosen(job: Job, target: SageMakerTarget) -> tuple[InstanceType, ...]:
    wanted = job.spec.resources
    disk = _disk(job, target)
    return choose(gpus=wanted.gpus, models=wanted.gpu, cpus=wanted.cpus, memory=wanted.memory, disk=disk)


def _disk(job: Job, target: SageMakerTarget) -> int:
    """Bytes. What FastFile reads is not copied, so that nothing is bought for it unless the job says so."""
    if job.spec.resources.disk != "auto":
        return job.disk
    return job.disk - disk_for_data(channel.size for channel in job.channels if _mode(channel, target) == "FastFile")


def request_context(job: Job, run_id: str, job_file: JobFile, *, target: SageMakerTarget) -> Mapping[str, object]:
    """The variables of templates/sagemaker/training_job.json.j2."""
    resources, foreign = job.spec.resources, job.spec.runner == "none"
    home, types = join_uri(job.output, run_id), instances(job, target)
    return {
        "job_name": run_id,
        "role": target.role or ROLE,
        "image": job.image.reference if job.image else "",
        "image_access": target.image_access if target.image_access != "Platform" else "",
        "entrypoint": [] if foreign else ["cvlaunch-run"],
        "arguments": list(job.command or ()) if foreign else [],
        "input_mode": target.input_mode,
        "metrics": _metric_definitions(job),
        "hyperparameters": _hyperparameters(job),
        "environment": dict(job.spec.env) if foreign else _variables(job, home, job_file, target),
        "channels": [*_channels(job, target), *_job_channel(home, foreign=foreign, target=target)],
        "artifacts": join_uri(home, ARTIFACTS),
        "kms_key": target.kms_key,
        "checkpoints": join_uri(home, "checkpoints"),
        "checkpoints_folder": f"{DEFAULT_ROOT}/checkpoints",
        "instance_type": types[0],
        "preferences": _preferences(types, resources.nodes),
        "nodes": resources.nodes,
        "volume_gb": math.ceil(_disk(job, target) / _GIB),
        "volume_kms_key": target.volume_kms_key,
        "keep_alive_s": math.ceil(target.keep_alive or 0),
        "stopping": _stopping(job, target, accelerated=any(map(is_accelerated, types))),
        "spot": resources.spot,
        "subnets": target.subnets,
        "security_groups": target.security_groups,
        "isolated": target.network_isolation,
        "encrypt_traffic": target.encrypt_traffic,
        "retries": target.retries_by_platform,
        "tags": _tags(job, run_id, target),
    }


def is_accelerated(name: str) -> bool:
    """Whether jobs of this type can wait for room. What nobody knows is taken to be new, and for GPUs."""
    known = instance_type(name)
    return known is None or known.accelerated


def _preferences(types: Sequence[str], count: int) -> list[Json]:
    """Of one type there is nothing to prefer."""
    return [{"InstanceType": name, "InstanceCount": count} for name in types] if len(types) > 1 else []


def longest_run(job: Job, target: SageMakerTarget) -> int:
    """Seconds after which SageMaker itself ends the job."""
    around = 0 if job.spec.runner == "none" else _AROUND_TIMEOUT_S
    timeout = job.spec.resources.timeout
    return min(math.ceil(target.max_runtime if timeout is None else timeout + around), LONGEST_RUN_S)


def _metric_definitions(job: Job) -> list[Json]:
    task = job.train["task"] if job.train else None
    return [{"Name": name, "Regex": regex} for name, regex in METRICS.get(str(task), {}).items()]


def _hyperparameters(job: Job) -> dict[str, str]:
    """The recipe, so that consoles and experiment trackers show it; the runner itself reads job.json."""
    shown = {name: _shown(value) for name, value in (job.train or {}).items() if value is not None}
    fitting = {name: text for name, text in shown.items() if len(text) <= _LONGEST_HYPERPARAMETER}
    return dict(list(fitting.items())[:_MOST_HYPERPARAMETERS])


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _variables(job: Job, home: str, job_file: JobFile, target: SageMakerTarget) -> dict[str, str]:
    inside = f"{DEFAULT_ROOT}/input/data/{JOB_CHANNEL}/{JOB.removeprefix('input/')}"
    found = {
        "CVLAUNCH_JOB": inside if target.network_isolation else join_uri(home, JOB),
        "CVLAUNCH_JOB_SHA256": hashlib.sha256(job_file.to_bytes()).hexdigest(),
        "CVLAUNCH_ROOT": DEFAULT_ROOT,
        "CVLAUNCH_LOG": "tagged",
        "CVLAUNCH_GRACE": f"{RULES['sagemaker'].grace_s:g}",
        "PYTHONUNBUFFERED": "1",
    }
    # an authority is of the way that leaves this machine, and too long for a variable
    storage = {key: value for key, value in job.storage.items() if key != "ca_bundle"}
    if storage and not target.network_isolation:
        found["CVLAUNCH_STORAGE"] = json.dumps(storage, sort_keys=True)
    return found


def _channels(job: Job, target: SageMakerTarget) -> Iterator[Json]:
    for channel in job.channels:
        yield _channel(channel.name, channel.uri, _mode(channel, target))


def _mode(channel: Channel, target: SageMakerTarget) -> str:
    return target.input_modes.get(channel.name, target.input_mode)


def _job_channel(home: str, *, foreign: bool, target: SageMakerTarget) -> Iterator[Json]:
    if target.network_isolation and not foreign:
        yield _channel(JOB_CHANNEL, join_uri(home, "input"), "File")


def _channel(name: str, uri: str, mode: str) -> Json:
    """A prefix without `/` at its end would also take `train-old/` for `train`."""
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{uri.rstrip('/')}/", "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": mode, "DataSource": {"S3DataSource": source}}


def _stopping(job: Job, target: SageMakerTarget, *, accelerated: bool) -> dict[str, int]:
    resources = job.spec.resources
    found = {"MaxRuntimeInSeconds": longest_run(job, target)}
    if resources.spot:
        wait = target.spot_wait if resources.max_wait is None else resources.max_wait
        found["MaxWaitTimeInSeconds"] = found["MaxRuntimeInSeconds"] + math.ceil(wait)
    elif resources.max_wait is not None and accelerated:
        found["MaxPendingTimeInSeconds"] = _pending(resources.max_wait)
    return found


def _pending(wait: float) -> int:
    if not _SHORTEST_WAIT_S <= wait <= _LONGEST_WAIT_S:
        least, most = format_duration(_SHORTEST_WAIT_S), format_duration(_LONGEST_WAIT_S)
        raise SpecError(
            f"SageMaker lets a job wait for {least} to {most}, not for {format_duration(wait)}; leave it out to wait "
            "as long as SageMaker does",
            key="resources.max_wait",
        )
    return math.ceil(wait)


def _tags(job: Job, run_id: str, target: SageMakerTarget) -> list[Json]:
    """The target's, and those of the job's own that can be tags of AWS; all of the job's stand in job.json."""
    tags = {RUN: run_id, DIGEST: job.digest, **target.tags}
    own = {name: value for name, value in job.spec.tags.items() if name not in tags and _can_be_tag(name, value)}
    tags |= dict(list(own.items())[: max(_MOST_TAGS - len(tags), 0)])
    return [{"Key": name, "Value": value} for name, value in tags.items()]


def _can_be_tag(name: str, value: str) -> bool:
    fits = 1 <= len(name) <= 128 and len(value) <= 256 and not name.lower().startswith("aws:")
    return fits and all(_in_tags(character) for character in name + value)


def _in_tags(character: str) -> bool:
    return character in "_.:/=+-@" or unicodedata.category(character)[0] in "LZN"
