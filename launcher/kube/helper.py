"""The pod that serves a claim: a Job that is made when somebody asks, shared by all who ask, and ends by itself."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    nearest,
)
from launcher.kube import serve
from launcher.kube.client import Cluster, Json
from launcher.kube.queues import queue_words
from launcher.kube.serve import HELLO
from launcher.kube.sockets import forward
from launcher.kube.words import (
    HELPER,
    MANAGED,
    QUEUE,
    VOLUME,
    Seen,
    condition,
    end_of,
    is_over,
    labels_of,
    main_container,
    main_of,
    status_of,
)
from launcher.quantities import format_duration
from launcher.status import State, Status

__all__ = ["Helper", "HelperSpec", "helper_job", "helper_name"]

_NAME = "cvlaunch/helper-name"
_FOLDER = "/data"
_LONGEST_S = 3600
_KEPT_S = 30
"""After its end, so that it can be seen why it failed."""
_ALONE_IDLE_S = 30.0
"""At most, where nobody on another machine can use the claim meanwhile."""
_PORTS = range(20000, 32000)
"""Below those that Linux gives to outgoing connections."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.1, 1.0
_GREETING_S = 10.0
_ADMITTED_S = 15.0
"""Kueue needs a second or so for a Job that it has room for."""
_CPU, _MEMORY = "100m", "128Mi"
_LEAVING = Status(State.UNKNOWN, "gone", reason="the one before has not gone yet")


_WAYS_OUT: Sequence[tuple[str, type[CvlaunchError], str]] = (
    ("it waits in queue", CapacityError, f"wait, or ask for a queue with room for {_CPU} of CPU and {_MEMORY}"),
    ("in no queue|Job is suspended", CapacityError, "name a LocalQueue in the target's `queue`"),
    ("exceeded quota", CapacityError, "wait, or ask for more quota"),
    ("runAsNonRoot", SpecError, "set `run_as_user` of the target, or take an image that names a user"),
    ("forbidden|denied the request", SpecError,
     "correct `run_as_user` of the target, or ask the cluster's administrators"),
    ("python3", SpecError, "take an image with Python 3.8 or newer"),
    ("image", SpecError, "correct the image, or the pull secrets of the target"),
    ("(?i)persistentvolumeclaim", CapacityError, "choose another claim, or another storage class"),
    ("no node takes it", CapacityError, "wait, or correct the `tolerations` of the target"),
    ("", UnreachableError, "try again"),
)  # fmt: skip
"""What the words hold → what the user can do, from top to bottom."""

_FINAL = re.compile("exceeded quota|runAsNonRoot|forbidden|denied the request|InvalidImageName|ErrImageNeverPull")
"""Words that another minute does not change."""


@dataclass(frozen=True)
class HelperSpec:
    """What a helper is made of. image: with Python 3.8 or newer as `python3`; asked for only when one must be made.

    run_as_user, fs_group: None where the cluster chooses them, as OpenShift does. labels: of Job and pod. queue: of
    Kueue, where it takes Jobs that ask for none. idle_s: it ends after so long without a request.
    """

    claim: str
    image: Callable[[], str]
    run_as_user: int | None = None
    fs_group: int | None = None
    service_account: str | None = None
    priority_class: str | None = None
    pull_secrets: Sequence[str] = ()
    tolerations: Sequence[Json] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    queue: str | None = None
    idle_s: float = 120.0


@dataclass(frozen=True)
class _Place:
    """Where a claim can be mounted. node: empty is anywhere. alone: by one node at a time."""

    node: str = ""
    tolerations: Sequence[Json] = ()
    alone: bool = False


def helper_name(spec: HelperSpec) -> str:
    """The same for all that the same pod can serve, with this version of serve.py."""
    facts = repr((spec.claim, spec.run_as_user, spec.fs_group, _text()))
    slug = re.sub(r"[^a-z0-9]+", "-", spec.claim[:24]).strip("-")
    return f"cvlaunch-volume-{slug}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"


def _text() -> str:
    return Path(serve.__file__).read_text(encoding="utf-8")


def helper_job(spec: HelperSpec, place: _Place, *, port: int) -> Json:
    """port: on the pod's loopback, and one of many, as pods of a network of hosts share it."""
    name = helper_name(spec)
    managed, _, us = MANAGED.partition("=")
    labels = {**spec.labels, managed: us, HELPER: "volume", _NAME: name}
    metadata = {"labels": labels, "annotations": {**spec.annotations}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": _LONGEST_S,
            "ttlSecondsAfterFinished": _KEPT_S,
            "template": {"metadata": metadata, "spec": _pod(spec, place, port)},
        },
    }


def _pod(spec: HelperSpec, place: _Place, port: int) -> Json:
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "securityContext": _security(spec),
        "containers": [_container(spec, place, port)],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": spec.claim}}],
    }
    tolerations = [*spec.tolerations, *(one for one in place.tolerations if one not in spec.tolerations)]
    if tolerations:
        pod["tolerations"] = tolerations
    if spec.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in spec.pull_secrets]
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    if spec.priority_class:
        pod["priorityClassName"] = spec.priority_class
    if spec.node_selector and not place.node:
        pod["nodeSelector"] = {**spec.node_selector}
    if place.node:
        fields = [{"key": "metadata.name", "operator": "In", "values": [place.node]}]
        terms = {"nodeSelectorTerms": [{"matchFields": fields}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return pod


def _security(spec: HelperSpec) -> Json:
    context: Json = {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    if spec.run_as_user is not None:
        context |= {"runAsUser": spec.run_as_user, "runAsGroup": 0}
    if spec.fs_group is not None:
        context["fsGroup"] = spec.fs_group
    return context


def _container(spec: HelperSpec, place: _Place, port: int) -> Json:
    idle_s = min(spec.idle_s, _ALONE_IDLE_S) if place.alone else spec.idle_s
    return {
        "name": VOLUME,
        "image": spec.image(),
        "command": ["python3", "-I", "-c", _text(), str(port), _FOLDER, str(idle_s)],
        "ports": [{"name": "files", "containerPort": port}],
        "resources": {
            "requests": {"cpu": _CPU, "memory": _MEMORY},
            "limits": {"cpu": "1", "memory": "256Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "data", "mountPath": _FOLDER}],
    }


class Helper:
    """The pod that serves one claim. Thread-safe, and safe beside other processes that want the same one."""

    def __init__(
        self,
        cluster: Cluster,
        spec: HelperSpec,
        *,
        wait_s: float = 180.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cluster, self._spec, self._wait_s, self._sleep = cluster, spec, wait_s, sleep
        self._lock = threading.Lock()
        self._name = helper_name(spec)

    def connect(self) -> socket.socket:
        """A connection to serve.py, which has answered on it, in a pod that is made where there is none."""
        with self._lock:
            began, mine = time.monotonic(), set[str]()
            for pause in _pauses():
                pod, port = self._pod(began, mine)
                try:
                    return _greeted(forward(self._cluster, pod, port))
                except (SpecError, UnreachableError, OSError) as error:  # it begins or ends just now
                    if time.monotonic() - began > self._wait_s:
                        words = f"{self._what}: pod {pod}, which serves its files, does not answer ({error}): try again"
                        raise UnreachableError(words) from error
                self._sleep(pause)
        raise AssertionError("pauses have no end")

    def _pod(self, began: float, mine: set[str]) -> tuple[str, int]:
        """Name and port of the one that serves. began: this connection, by the monotonic clock. mine: uids of Jobs that
        were made for it."""
        status = _LEAVING
        for pause in _pauses():
            job = self._job(mine)
            pods = self._pods(job) if job else []
            if found := next(filter(None, map(_serving, pods)), None):
                return found
            if job:
                status = self._status(job, pods, mine)
            wait_s = self._patience_s(job)
            if _is_final(status) or time.monotonic() - began > wait_s:
                raise self._failure(status, pods, wait_s)
            self._sleep(pause)
        raise AssertionError("pauses have no end")

    def _status(self, job: Json, pods: Sequence[Json], mine: set[str]) -> Status:
        """Of a Job that does not serve. One whose container has ended, and whose pod a sidecar keeps, is removed; not
        one of `mine` that failed."""
        ended = next(filter(None, map(end_of, pods)), None)
        if ended and ended.exit_code and job["metadata"]["uid"] in mine:
            return ended
        if ended:
            self._cluster.delete(self._path)
            return _LEAVING
        if job["spec"].get("suspend"):
            self._choose_queue(job)
            return status_of(Seen(job, queue=queue_words(self._cluster).get(job["metadata"]["uid"], "")), now=0.0)
        return status_of(Seen(job, pods, "" if pods else self._refused(job)), now=self._cluster.now)

    def _choose_queue(self, job: Json) -> None:
        """For one that Kueue took though it asked for no queue, where none is the default. In a queue from the
        beginning it would wait behind runs, which most clusters don't ask of it."""
        if self._spec.queue and not labels_of(job).get(QUEUE):
            change = {"metadata": {"labels": {QUEUE: self._spec.queue}}}
            with contextlib.suppress(AuthError):
                self._cluster.patch(self._path, change, form="merge")

    def _patience_s(self, job: Json | None) -> float:
        suspended = job is not None and job["spec"].get("suspend")
        return min(self._wait_s, _ADMITTED_S) if suspended else self._wait_s

    def _job(self, mine: set[str]) -> Json | None:
        """One that can serve, made where there is none; None as long as one that ended is there.

        One of `mine` that failed is kept: the next would fail as well.
        """
        job = self._cluster.get(self._path)
        if job is None:
            job = self._make()
            mine |= {job["metadata"]["uid"]} if job else set()
        elif _is_leaving(job) and not (_has_failed(job) and job["metadata"]["uid"] in mine):
            self._cluster.delete(self._path)
            return None
        return job

    def _make(self) -> Json | None:
        """None if another process was faster."""
        job = helper_job(self._spec, self._place(), port=secrets.choice(_PORTS))
        with contextlib.suppress(ConflictError):
            return self._cluster.create(self._cluster.path("jobs"), job)
        return None

    def _pods(self, job: Json) -> list[Json]:
        """Of this Job, not of one of the same name before it."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        found = self._cluster.list(self._cluster.path("pods"), labels=f"{_NAME}={name}")
        return [pod for pod in found if any(o["uid"] == uid for o in pod["metadata"].get("ownerReferences") or ())]

    @property
    def _path(self) -> str:
        return self._cluster.path("jobs", self._name)

    # -- where --

    def _place(self) -> _Place:
        claim = self._claim()
        modes = (claim.get("status") or {}).get("accessModes") or claim["spec"].get("accessModes") or []
        if "ReadWriteMany" in modes or modes == ["ReadOnlyMany"]:
            return _Place()
        pods = [pod for pod in self._cluster.list(self._cluster.path("pods")) if _uses(pod, self._spec.claim)]
        others = [pod["metadata"]["name"] for pod in pods if labels_of(pod).get(_NAME) != self._name]
        if "ReadWriteOncePod" in modes and others:
            raise CapacityError(
                f"{self._what} is ReadWriteOncePod and pod {others[0]} uses it: wait until that ends, "
                "or take a claim that several pods can use"
            )
        if not pods:
            return _Place(alone=True)
        return _Place(pods[0]["spec"]["nodeName"], pods[0]["spec"].get("tolerations") or (), alone=True)

    def _claim(self) -> Json:
        name, resource = self._spec.claim, "persistentvolumeclaims"
        claim = self._cluster.get(self._cluster.path(resource, name))
        if claim is None:
            there = [one["metadata"]["name"] for one in self._cluster.list(self._cluster.path(resource))]
            known = f"there are {', '.join(there)}" if there else "there are none"
            raise SpecError(f"{self._cluster.where}: there is no claim {name!r}{nearest(name, there)}; {known}")
        if claim["metadata"].get("deletionTimestamp"):
            raise SpecError(f"{self._what} is being deleted: choose another")
        if (claim.get("status") or {}).get("phase") == "Lost":
            raise SpecError(f"{self._what} has lost its volume: choose another, or ask the cluster's administrators")
        return claim

    # -- what went wrong --

    @property
    def _what(self) -> str:
        return f"{self._cluster.where}: claim {self._spec.claim}"

    def _refused(self, job: Json) -> str:
        return self._said(job, "Warning", reason="FailedCreate")

    def _said(self, about: Json, *kinds: str, reason: str = "") -> str:
        """The last event of an object; empty if there is none, or none for us to read. kinds: Normal, Warning."""
        name, uid = about["metadata"]["name"], about["metadata"]["uid"]
        fields = f"involvedObject.name={name}" + (f",reason={reason}" if reason else "")
        try:
            found = list(self._cluster.list(self._cluster.path("events"), fields=fields))
        except AuthError:
            return ""
        mine = [one for one in found if one["involvedObject"].get("uid") == uid and one.get("type") in kinds]
        return str(max(mine, key=_when).get("message", "")) if mine else ""

    def _failure(self, status: Status, pods: Sequence[Json], wait_s: float) -> CvlaunchError:
        """What is said of it after so long; the pod, which would wait on, is removed."""
        words = ": ".join(filter(None, (status.reason or f"it stays {status.native}", self._more(status, pods))))
        kind, advice = next((kind, advice) for found, kind, advice in _WAYS_OUT if re.search(found, words))
        if not _is_final(status):
            words = f"within {format_duration(wait_s)}: {words}"
        with contextlib.suppress(AuthError):
            self._cluster.delete(self._path)
        return kind(f"{self._what}: the pod that serves its files did not start: {words.rstrip('.')}: {advice}")

    def _more(self, status: Status, pods: Sequence[Json]) -> str:
        """What events say of a volume that can't be mounted or bound."""
        if "PersistentVolumeClaim" in status.reason:
            return self._said(self._claim(), "Normal", "Warning")
        if status.state is State.STARTING and not re.search("image|container", status.reason):
            return next((said for pod in pods if (said := self._said(pod, "Warning"))), "")
        return ""


def _pauses() -> Iterator[float]:
    pause = _SHORTEST_WAIT_S
    while True:
        yield pause
        pause = min(1.5 * pause, _LONGEST_WAIT_S)


def _greeted(connection: socket.socket) -> socket.socket:
    """A port where nobody listens can be connected to, too."""
    said = b""
    try:
        connection.settimeout(_GREETING_S)
        connection.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
        while not said.endswith(HELLO):
            block = connection.recv(1024)
            if not block or len(said) > 10 * 1024:
                raise ConnectionError("nobody listens, or somebody else does")
            said += block
    except BaseException:
        connection.close()
        raise
    return connection


def _is_final(status: Status) -> bool:
    """Whether waiting is in vain."""
    return status.state.terminal or _FINAL.search(f"{status.native} {status.reason}") is not None


def _is_leaving(job: Mapping[str, Any]) -> bool:
    gone = job["metadata"].get("deletionTimestamp")
    return bool(gone or is_over(job) or _has_failed(job) or condition(job, "SuccessCriteriaMet"))


def _has_failed(job: Mapping[str, Any]) -> bool:
    return bool(condition(job, "Failed") or condition(job, "FailureTarget"))


def _serving(pod: Mapping[str, Any]) -> tuple[str, int] | None:
    if pod["metadata"].get("deletionTimestamp") or "running" not in (main_container(pod).get("state") or {}):
        return None
    return pod["metadata"]["name"], int(main_of(pod)["ports"][0]["containerPort"])


def _uses(pod: Mapping[str, Any], claim: str) -> bool:
    """On a node, now."""
    if not pod["spec"].get("nodeName") or (pod.get("status") or {}).get("phase") not in ("Pending", "Running"):
        return False
    volumes = pod["spec"].get("volumes") or ()
    return any((volume.get("persistentVolumeClaim") or {}).get("claimName") == claim for volume in volumes)


def _when(event: Mapping[str, Any]) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
