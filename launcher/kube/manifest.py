"""From a resolved job to what its Job and pods say: the variables of the template. Pure."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.backends.base import Job
from launcher.contract import DEFAULT_ROOT, EXIT_LOST, EXIT_PREEMPTED, JobFile
from launcher.errors import SpecError
from launcher.kube import words
from launcher.kube.gpus import node_requirement, toleration_key
from launcher.kube.target import KubernetesTarget, Spot
from launcher.kube.volume import split_uri
from launcher.kube.words import CONTAINER
from launcher.quantities import format_size
from launcher.shm import SHM, size_as_written
from launcher.stores import scheme

__all__ = ["manifest_context", "places", "stored_secrets"]

_JOB, _SECRETS = "/etc/cvlaunch/job", "/etc/cvlaunch/secrets"
_TERMINATION = "/dev/termination-log"
_PORT = 29500

_LONGEST_JOB = 200_000
"""Bytes of job.json; the annotations of an object hold 256 KiB together."""
_LONGEST_LABEL = 63
_LEAST_MEMORY = 512 << 20
"""Bytes that Python and torch need besides shared memory."""
_USUAL_MEMORY = 2 << 30
"""Asked for besides shared memory, where the job says nothing: a pod without a request is evicted first."""
_AROUND_TIMEOUT_S = 15 * 60
"""The pod's limit is the job's own plus this: the runner keeps the timeout, over all starts."""
_REFUSALS_BY_NODES = 2
"""How often a node may refuse a pod, or forget it in a restart, until the run has failed."""


def manifest_context(job: Job, run_id: str, job_file: JobFile, *, target: KubernetesTarget) -> Mapping[str, object]:
    """The variables of templates/kubernetes/job.yaml.j2; pure."""
    resources, foreign = job.spec.resources, job.spec.runner == "none"
    text = json.dumps(job_file.to_json(), indent=1, sort_keys=True)
    if len(text.encode()) > _LONGEST_JOB:
        raise SpecError(f"the job has more than {_LONGEST_JOB} bytes; put long values into a file of its code")
    labels = {"app.kubernetes.io/managed-by": "cvlaunch", words.RUN_ID: run_id, **target.labels}
    return {
        "run_id": run_id,
        "namespace": target.namespace,
        "labels": labels,
        "job_labels": {**labels, **_queue_labels(target)},
        "annotations": _job_annotations(job),
        "pod_labels": {**labels, words.SUBMISSION: "1"},
        "pod_annotations": {**target.annotations, words.JOB_JSON: text},
        "nodes": resources.nodes,
        "container": CONTAINER,
        "again_codes": sorted({EXIT_PREEMPTED, EXIT_LOST}),
        "preempted_code": EXIT_PREEMPTED,
        "retries": job.spec.retries if foreign else _REFUSALS_BY_NODES,
        "foreign": foreign,
        "grace_s": math.ceil(resources.grace),
        "deadline_s": _deadline(resources.timeout, foreign),
        "service_account": target.service_account,
        "priority_class": target.priority_class,
        "pull_secrets": target.image_pull_secrets,
        "node_selector": {**target.node_selector, **_spot(target, resources.spot).node_selector},
        "gpu_nodes": node_requirement(resources.gpu, target.gpu_label, values=target.gpu_values),
        "tolerations": list(_tolerations(target, resources.gpus, resources.spot)),
        "run_as_user": target.run_as_user,
        "fs_group": target.fs_group,
        "read_only": target.read_only and not foreign,
        "image": _image(job, target),
        "command": ["cvlaunch-run"],
        "arguments": [_literal(word) for word in job.command or ()],
        "env": list(_variables(job, run_id, job_file, target)),
        "storage_secret": target.storage_secret,
        "termination": _TERMINATION,
        "requests": _requests(job, target.gpu_resource),
        "limits": _limits(job, target.gpu_resource),
        "mounts": list(_mounts(job, run_id, job_file)),
        "volumes": list(_volumes(job, run_id, job_file)),
    }


def _image(job: Job, target: KubernetesTarget) -> str:
    reference = job.image.reference if job.image else ""
    here, inside = target.registry, target.registry_inside
    same = here and inside and reference.startswith((f"{here}:", f"{here}@"))
    return f"{inside}{reference.removeprefix(here)}" if same and here else reference


def _queue_labels(target: KubernetesTarget) -> dict[str, str]:
    found = {words.QUEUE: target.queue, "kueue.x-k8s.io/priority-class": target.queue_priority}
    return {name: value for name, value in found.items() if value}


def _job_annotations(job: Job) -> dict[str, str]:
    found = {"cvlaunch/job-digest": job.digest}
    wait = job.spec.resources.max_wait
    return found if wait is None else {**found, words.MAX_WAIT: f"{wait:g}"}


def _deadline(timeout: float | None, foreign: bool) -> int | None:
    """Of the pod, whose clock starts when a node has taken it."""
    return None if timeout is None else math.ceil(timeout) + (0 if foreign else _AROUND_TIMEOUT_S)


def _spot(target: KubernetesTarget, wanted: bool) -> Spot:
    if wanted and target.spot is None:
        raise SpecError(
            "the target doesn't say which nodes are spot; add spot: {node_selector: …, tolerations: […]} to it",
            key="resources.spot",
        )
    return target.spot if wanted and target.spot else Spot.model_construct(node_selector={}, tolerations=())


def _tolerations(target: KubernetesTarget, gpus: int, spot: bool) -> Iterator[Mapping[str, Any]]:
    if gpus:
        yield {"key": toleration_key(target.gpu_resource), "operator": "Exists", "effect": "NoSchedule"}
    yield from target.tolerations
    yield from _spot(target, spot).tolerations


def _variables(job: Job, run_id: str, job_file: JobFile, target: KubernetesTarget) -> Iterator[Mapping[str, Any]]:
    if job.spec.runner == "none":
        yield from _foreign_variables(job, run_id)
        return
    plain = {
        "CVLAUNCH_JOB": f"{_JOB}/job.json",
        "CVLAUNCH_ROOT": DEFAULT_ROOT,
        "CVLAUNCH_LOG": "tagged",
        "CVLAUNCH_TERMINATION": _TERMINATION,
        "PYTHONUNBUFFERED": "1",
    }
    if job_file.nodes > 1:
        plain |= {"CVLAUNCH_NODES": str(job_file.nodes), "CVLAUNCH_MASTER": f"{run_id}-0.{run_id}:{_PORT}"}
    if target.interface:
        plain["CVLAUNCH_INTERFACE"] = target.interface
    if job_file.secrets:
        plain["CVLAUNCH_SECRETS_FOLDER"] = _SECRETS
    yield from ({"name": name, "value": value} for name, value in plain.items())
    fields = {
        "CVLAUNCH_NATIVE_ID": "metadata.labels['batch.kubernetes.io/controller-uid']",
        "CVLAUNCH_SUBMISSION": f"metadata.labels['{words.SUBMISSION}']",
        "CVLAUNCH_NODE": "spec.nodeName",
    }
    yield from ({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items())


def _foreign_variables(job: Job, run_id: str) -> Iterator[Mapping[str, Any]]:
    for name, value in job.spec.env.items():
        yield {"name": name, "value": _literal(value)}
    stored = stored_secrets(job.spec.secrets)
    for name in job.spec.secrets:
        secret, key = stored.get(name, (run_id, name))
        yield {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _literal(text: str) -> str:
    """Kubernetes takes `$(NAME)` for a variable and `$$` for a dollar; with each such `$` doubled it takes none."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def stored_secrets(secrets: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Variable → (Secret, key) of those that are in the cluster: `store:SECRET/KEY`."""
    found = {}
    for variable, reference in secrets.items():
        if not reference.startswith("store:"):
            continue
        name, slash, key = reference.removeprefix("store:").partition("/")
        if not (name and slash and key):
            raise SpecError(
                f"{reference!r} names no key of a Secret; it looks like store:SECRET/KEY", key=f"secrets.{variable}"
            )
        found[variable] = (name, key)
    return found


def _memory(job: Job) -> int | None:
    """The limit, of which shared memory is a part. SpecError if it leaves too little."""
    memory, shm = job.spec.resources.memory, job.shm or 0
    if memory is not None and shm and shm + _LEAST_MEMORY > memory:
        total = format_size(shm + _LEAST_MEMORY)
        raise SpecError(
            f"{format_size(memory)} is less than {total}: {format_size(shm)} of shared memory, which counts as memory, "
            f"and {format_size(_LEAST_MEMORY)} for the processes; write memory: {size_as_written(shm + _LEAST_MEMORY)} "
            "or more, or less shm",
            key="resources.memory",
        )
    return memory


def _requests(job: Job, gpu: str) -> dict[str, str]:
    resources = job.spec.resources
    found = {"memory": size_as_written(_memory(job) or _USUAL_MEMORY + (job.shm or 0))}
    if resources.cpus:
        found["cpu"] = str(resources.cpus)
    return {
        **found,
        "ephemeral-storage": size_as_written(job.disk),
        **({gpu: str(resources.gpus)} if resources.gpus else {}),
    }


def _limits(job: Job, gpu: str) -> dict[str, str]:
    """Cores have none: a limit slows a pod down even where cores are idle."""
    found = {"ephemeral-storage": size_as_written(job.disk)}
    if memory := _memory(job):
        found["memory"] = size_as_written(memory)
    return {**found, **({gpu: str(job.spec.resources.gpus)} if job.spec.resources.gpus else {})}


def _mounts(job: Job, run_id: str, job_file: JobFile) -> Iterator[Mapping[str, Any]]:
    """Where a volume is mounted below another, the kubelet makes the folders between and owns them: then those that the
    runner needs are mounts of their own."""
    foreign, (volume, base) = job.spec.runner == "none", _root(job_file, run_id)
    mounted = [channel for channel in job_file.channels if channel.access == "mounted"]
    if not foreign:
        yield {"name": volume, "mountPath": DEFAULT_ROOT, "subPath": base}
        yield {"name": "work", "mountPath": "/tmp", "subPath": "tmp"}  # noqa: S108 names the container's
        yield {"name": "job", "mountPath": _JOB, "readOnly": True}
    own = ["config", "control", *(f"data/{c.name}" for c in job_file.channels if c.access != "mounted")]
    for name in own if mounted and not foreign else ():
        yield {"name": volume, "mountPath": f"{DEFAULT_ROOT}/input/{name}", "subPath": f"{base}/input/{name}"}
    for channel in mounted:
        claim, path = split_uri(channel.uri)
        mount = {"name": _volume(claim), "mountPath": f"{DEFAULT_ROOT}/input/data/{channel.name}", "readOnly": True}
        yield {**mount, "subPath": path} if path else mount
    if job_file.secrets and not foreign:
        yield {"name": "secrets", "mountPath": _SECRETS, "readOnly": True}
    if job.shm:
        yield {"name": "shm", "mountPath": SHM}


def _volumes(job: Job, run_id: str, job_file: JobFile) -> Iterator[Mapping[str, Any]]:
    if job.spec.runner != "none":
        yield {"name": "work", "emptyDir": {"sizeLimit": size_as_written(job.disk)}}
        item = {"path": "job.json", "fieldRef": {"fieldPath": f"metadata.annotations['{words.JOB_JSON}']"}}
        yield {"name": "job", "downwardAPI": {"items": [item]}}
        if job_file.secrets:
            yield {"name": "secrets", "projected": {"defaultMode": 0o440, "sources": list(_sources(run_id, job_file))}}
    if job.shm:
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size_as_written(job.shm)}}
    for claim in sorted({split_uri(uri)[0] for uri in places(job) if scheme(uri) == "pvc"}):
        yield {"name": _volume(claim), "persistentVolumeClaim": {"claimName": claim}}


def _sources(run_id: str, job_file: JobFile) -> Iterator[Mapping[str, Any]]:
    """A file for each variable: of the run's own Secret, and of those in the cluster."""
    stored = stored_secrets(job_file.secrets)
    own = [name for name in job_file.secrets if name not in stored]
    if own:
        yield {"secret": {"name": run_id, "items": [{"key": name, "path": name} for name in own]}}
    for variable, (name, key) in stored.items():
        yield {"secret": {"name": name, "items": [{"key": key, "path": variable}]}}


def _root(job_file: JobFile, run_id: str) -> tuple[str, str]:
    """(volume, path in it) of /opt/ml."""
    if job_file.movers["output"] != "in_place":
        return "work", "ml"
    claim, path = split_uri(job_file.output)
    return _volume(claim), f"{path}/{run_id}".strip("/")


def places(job: Job) -> list[str]:
    return [job.output, *(channel.uri for channel in job.channels)]


def _volume(claim: str) -> str:
    """Names of volumes are labels: no dots, 63 characters. What that takes away is told apart by a hash."""
    name = f"claim-{claim.replace('.', '-')}"
    if name == f"claim-{claim}" and len(name) <= _LONGEST_LABEL:
        return name
    return f"{name[: _LONGEST_LABEL - 9].rstrip('-')}-{hashlib.sha256(claim.encode()).hexdigest()[:8]}"
