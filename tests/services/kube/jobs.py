"""The Job controller (pkg/controller/job), in its own words."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.services.kube.answers import ApiError
from tests.services.kube.api import Api
from tests.services.kube.events import record
from tests.services.kube.objects import Key, controller_of, grace_of
from tests.services.kube.resources import CORE
from tests.services.kube.times import now, parse_time, random_suffix

__all__ = ["FINALIZER", "INDEX", "Jobs"]

Json = dict[str, Any]

FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"
_BACKOFF_EXCEEDED = "Job has reached the specified backoff limit"
_TOO_LONG = "Job was active longer than specified deadline"


@dataclass
class _Work:
    """What one look at a job has found."""

    job: Json
    status: Json
    active: list[Json] = field(default_factory=list)
    terminating: list[Json] = field(default_factory=list)


class Jobs:
    """later: asks to be called again for this job in so many seconds."""

    def __init__(self, api: Api, later: Callable[[Key, float], None]) -> None:
        self._api, self._store, self._later = api, api.store, later
        self._delays: dict[str, float] = {}

    def sync(self, key: Key) -> None:
        with self._store.lock:
            job = self._store.get(key)
            if job is None or "deletionTimestamp" in job["metadata"]:
                self._release(key, job)
                return
            work = _Work(job, copy.deepcopy(job.get("status", {})))
            if _ended(work.status):
                self._expire(key, work)
                return
            self._count(work)
            self._decide(key, work)
            self._write(key, work)

    def _pods(self, job: Json) -> list[Json]:
        keys = self._store.dependents(job["metadata"]["uid"])
        pods = [self._store.get(key) for key in keys if key[0] == "pods"]
        return [pod for pod in pods if pod and controller_of(pod).get("uid") == job["metadata"]["uid"]]

    def _release(self, key: Key, job: Json | None) -> None:
        """Pods of a job that is gone keep no finalizer."""
        for pod in self._store.list("pods", key[1]):
            owner = controller_of(pod)
            orphan = (
                owner.get("kind") == "Job" and owner.get("name") == key[2] and not self._store.has_uid(owner["uid"])
            )
            ours = job is not None and owner.get("uid") == job["metadata"]["uid"]
            if orphan or ours or (not owner and FINALIZER in pod["metadata"].get("finalizers", ())):
                self._untrack(pod)

    def _untrack(self, pod: Json) -> None:
        if FINALIZER in pod["metadata"].get("finalizers", ()):
            self._store.clear_finalizer(_key(pod), FINALIZER)

    def _expire(self, key: Key, work: _Work) -> None:
        for pod in self._pods(work.job):
            self._untrack(pod)
        ttl = work.job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None:
            return
        ended = next(c for c in work.status["conditions"] if c["type"] in ("Complete", "Failed"))
        left = parse_time(ended["lastTransitionTime"]) + ttl - time.time()
        if left > 0:
            self._later(key, left)
        else:
            self._store.delete(key, propagation="Foreground")

    # -- counting -----------------------------------------------------------------------------------------------------

    def _count(self, work: _Work) -> None:
        only_failed = work.job["spec"]["podReplacementPolicy"] == "Failed"
        for pod in self._pods(work.job):
            phase, deleted = pod["status"].get("phase"), "deletionTimestamp" in pod["metadata"]
            ended = phase in ("Succeeded", "Failed")
            if not ended and deleted:
                work.terminating.append(pod)
            elif not ended:
                work.active.append(pod)
            if (ended or (deleted and not only_failed)) and FINALIZER in pod["metadata"].get("finalizers", ()):
                self._count_one(work, pod, succeeded=phase == "Succeeded")
                self._untrack(pod)

    def _count_one(self, work: _Work, pod: Json, *, succeeded: bool) -> None:
        status = work.status
        if succeeded:
            if work.job["spec"]["completionMode"] == "Indexed":
                done = _indexes(status.get("completedIndexes", ""))
                done.add(_index(pod))
                status["completedIndexes"] = _ranges(done)
                status["succeeded"] = len(done)
            else:
                status["succeeded"] = status.get("succeeded", 0) + 1
            return
        action, message = _failure_action(work.job, pod)
        if action == "Ignore":
            return
        status["failed"] = status.get("failed", 0) + 1
        if action == "FailJob" and not _condition(status, "FailureTarget"):
            self._aim(work, "PodFailurePolicy", message)

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _decide(self, key: Key, work: _Work) -> None:
        spec, status = work.job["spec"], work.status
        if spec.get("suspend"):
            self._suspend(work)
            return
        self._resume(work)
        status.setdefault("startTime", now())
        if not _condition(status, "FailureTarget"):
            self._look_for_failure(key, work)
        if target := _condition(status, "FailureTarget"):
            self._fail(work, target)
        elif self._complete(work):
            self._succeed(work)
        else:
            self._replace(key, work)

    def _look_for_failure(self, key: Key, work: _Work) -> None:
        spec, status = work.job["spec"], work.status
        if status.get("failed", 0) > spec["backoffLimit"] or self._restarted_too_often(work):
            self._aim(work, "BackoffLimitExceeded", _BACKOFF_EXCEEDED)
        elif limit := spec.get("activeDeadlineSeconds"):
            left = parse_time(status["startTime"]) + limit - time.time()
            if left <= 0:
                self._aim(work, "DeadlineExceeded", _TOO_LONG)
            else:
                self._later(key, left)

    def _restarted_too_often(self, work: _Work) -> bool:
        if work.job["spec"]["template"]["spec"]["restartPolicy"] != "OnFailure":
            return False
        restarts = sum(
            state["restartCount"] for pod in work.active for state in pod["status"].get("containerStatuses", ())
        )
        limit: int = work.job["spec"]["backoffLimit"]
        return restarts > 0 if limit == 0 else restarts >= limit

    def _aim(self, work: _Work, reason: str, message: str) -> None:
        _set_condition(work.status, "FailureTarget", "True", reason, message)
        record(self._store, work.job, reason, message, warning=True, source="job-controller")

    def _fail(self, work: _Work, target: Json) -> None:
        """All pods first: only then it says Failed."""
        self._stop(work, work.active)
        if not work.active and not work.terminating:
            _set_condition(work.status, "Failed", "True", target["reason"], target["message"])

    def _complete(self, work: _Work) -> bool:
        wanted = work.job["spec"].get("completions")
        done: int = work.status.get("succeeded", 0)
        if wanted is None:
            return done > 0 and not work.active
        return done >= wanted

    def _succeed(self, work: _Work) -> None:
        self._stop(work, work.active)
        reason, message = "CompletionsReached", "Reached expected number of succeeded pods"
        if not _condition(work.status, "SuccessCriteriaMet"):
            _set_condition(work.status, "SuccessCriteriaMet", "True", reason, message)
        if not work.active and not work.terminating:
            _set_condition(work.status, "Complete", "True", reason, message)
            work.status["completionTime"] = now()
            record(self._store, work.job, "Completed", "Job completed", source="job-controller")

    def _suspend(self, work: _Work) -> None:
        self._stop(work, work.active, counted=False)
        work.status.pop("startTime", None)
        if (_condition(work.status, "Suspended") or {}).get("status") != "True":
            _set_condition(work.status, "Suspended", "True", "JobSuspended", "Job suspended")
            record(self._store, work.job, "Suspended", "Job suspended", source="job-controller")

    def _resume(self, work: _Work) -> None:
        if (_condition(work.status, "Suspended") or {}).get("status") == "True":
            _set_condition(work.status, "Suspended", "False", "JobResumed", "Job resumed")
            work.status["startTime"] = now()
            record(self._store, work.job, "Resumed", "Job resumed", source="job-controller")

    def _stop(self, work: _Work, pods: list[Json], *, counted: bool = True) -> None:
        """counted: they are failures, too."""
        for pod in list(pods):
            work.active.remove(pod)
            if not counted:
                self._untrack(pod)
            left = self._store.delete(_key(pod), grace_s=grace_of(_key(pod), pod))
            record(self._store, work.job, "SuccessfulDelete", f"Deleted pod: {_key(pod)[2]}", source="job-controller")
            if left and left["metadata"]["deletionGracePeriodSeconds"]:
                work.terminating.append(left)
            else:
                self._untrack(pod)

    # -- pods ---------------------------------------------------------------------------------------------------------

    def _replace(self, key: Key, work: _Work) -> None:
        spec = work.job["spec"]
        busy = [*work.active, *(work.terminating if spec["podReplacementPolicy"] == "Failed" else ())]
        if (surplus := len(work.active) - spec["parallelism"]) > 0:
            self._stop(work, work.active[-surplus:], counted=False)
        if spec["completionMode"] == "Indexed":
            taken = {_index(pod) for pod in busy} | _indexes(work.status.get("completedIndexes", ""))
            free = [index for index in range(spec["completions"]) if index not in taken]
            wanted: list[int | None] = [*free[: max(0, spec["parallelism"] - len(busy))]]
        else:
            left = spec.get("completions", spec["parallelism"]) - work.status.get("succeeded", 0)
            if spec.get("completions") is None and work.status.get("succeeded"):
                left = 0
            wanted = [None] * max(0, min(spec["parallelism"], left) - len(busy))
        for index in wanted:
            if not self._create(key, work, index):
                break

    def _create(self, key: Key, work: _Work, index: int | None) -> bool:
        uid = work.job["metadata"]["uid"]
        try:
            pod, _ = self._api.create(CORE["pods"], key[1], _new_pod(work.job, index))
        except ApiError as error:
            record(
                self._store, work.job, "FailedCreate", f"Error creating: {error.message}",
                warning=True, source="job-controller",
            )  # fmt: skip
            delay = self._delays[uid] = min(5.0, self._delays.get(uid, 0.1) * 2)
            self._later(key, delay)
            return False
        self._delays.pop(uid, None)
        work.active.append(pod)
        name = pod["metadata"]["name"]
        record(self._store, work.job, "SuccessfulCreate", f"Created pod: {name}", source="job-controller")
        return True

    def _write(self, key: Key, work: _Work) -> None:
        ready = [p for p in work.active if (_condition(p["status"], "Ready") or {}).get("status") == "True"]
        ended = _ended(work.status)
        counts = {"active": len(work.active), "ready": len(ready), "terminating": len(work.terminating)}
        for name, count in counts.items():
            if count or name != "active":
                work.status[name] = count
            else:
                work.status.pop(name, None)
        work.status["uncountedTerminatedPods"] = {}
        if ended:
            work.status.update(ready=0, terminating=0)

        def mutate(job: Json) -> None:
            job["status"] = work.status

        self._store.change(key, mutate)


def _new_pod(job: Json, index: int | None) -> Json:
    template, name = copy.deepcopy(job["spec"]["template"]), job["metadata"]["name"]
    labels, annotations = (
        dict(template["metadata"].get("labels", {})),
        dict(template["metadata"].get("annotations", {})),
    )
    spec = template["spec"]
    if index is not None:
        labels[INDEX] = annotations[INDEX] = str(index)
        spec.setdefault("hostname", f"{name}-{index}")
        source = {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}}
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            names = [variable["name"] for variable in container.get("env", ())]
            if "JOB_COMPLETION_INDEX" not in names:
                container["env"] = [*container.get("env", ()), {"name": "JOB_COMPLETION_INDEX", **source}]
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": name,
        "uid": job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    stem = f"{name}-" if index is None else f"{name}-{index}-"
    meta = {
        "name": f"{stem[:58]}{random_suffix()}",
        "generateName": stem,
        "labels": labels,
        "finalizers": [FINALIZER],
        "ownerReferences": [owner],
        **({"annotations": annotations} if annotations else {}),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def _failure_action(job: Json, pod: Json) -> tuple[str, str]:
    """(action, message) of the first rule that matches."""
    place = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", ())):
        for name, code in _exit_codes(pod, rule.get("onExitCodes")):
            action = rule["action"]
            words = f"Container {name} for pod {place} failed with exit code {code}"
            return action, f"{words} matching {action} rule at index {number}"
        for wanted in rule.get("onPodConditions", ()):
            found = _condition(pod["status"], wanted["type"])
            if found and found["status"] == wanted["status"]:
                action = rule["action"]
                return action, f"Pod {place} has condition {wanted['type']} matching {action} rule at index {number}"
    return "Count", ""


def _exit_codes(pod: Json, rule: Json | None) -> Iterator[tuple[str, int]]:
    statuses = [pod["status"].get(kind, []) for kind in ("initContainerStatuses", "containerStatuses")]
    for state in itertools.chain(*statuses) if rule else ():
        code = state.get("state", {}).get("terminated", {}).get("exitCode", 0)
        if code == 0 or rule is None or rule.get("containerName") not in (None, state["name"]):
            continue
        if (code in rule["values"]) == (rule["operator"] == "In"):
            yield state["name"], code


def _condition(status: Json, kind: str) -> Json | None:
    return next((c for c in status.get("conditions", ()) if c["type"] == kind), None)


def _set_condition(status: Json, kind: str, value: str, reason: str, message: str) -> None:
    others = [c for c in status.get("conditions", ()) if c["type"] != kind]
    times = {"lastProbeTime": now(), "lastTransitionTime": now()}
    new = {"type": kind, "status": value, **times, "reason": reason, "message": message}
    status["conditions"] = [*others, new]


def _ended(status: Json) -> bool:
    return any((_condition(status, kind) or {}).get("status") == "True" for kind in ("Complete", "Failed"))


def _key(pod: Json) -> Key:
    return "pods", pod["metadata"]["namespace"], pod["metadata"]["name"]


def _index(pod: Json) -> int:
    return int(pod["metadata"].get("annotations", {}).get(INDEX, -1))


def _indexes(text: str) -> set[int]:
    """`0,2-4` → {0, 2, 3, 4}"""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found


def _ranges(indexes: set[int]) -> str:
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(indexes)), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}{',' if len(run) == 2 else '-'}{run[-1]}")
    return ",".join(parts)
