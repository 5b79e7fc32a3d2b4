"""What a Job and its pods say, in our words. Pure: objects of the API server in, a Status out.

Reasons: kubernetes/api core/v1/types.go and batch/v1/types.go; kubelet images/types.go and kuberuntime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from launcher.attempts import signal_words
from launcher.contract import EXIT_DONE
from launcher.quantities import format_duration
from launcher.status import State, Status
from launcher.supervised import ended_state

__all__ = [
    "CAPACITY",
    "CONTAINER",
    "HELPER",
    "INDEX",
    "JOB_JSON",
    "MANAGED",
    "MAX_WAIT",
    "QUEUE",
    "RUN_ID",
    "STOPPED",
    "SUBMISSION",
    "VOLUME",
    "Seen",
    "annotations_of",
    "completion_index",
    "condition",
    "end_of",
    "has_runner",
    "held_by",
    "is_ours",
    "is_over",
    "labels_of",
    "main_container",
    "main_of",
    "needs_pods",
    "seconds",
    "slow_to_set_up",
    "status_of",
    "stuck",
]

CONTAINER, VOLUME = "train", "volume"
"""The one that has the runner, and that of a pod which serves a claim. Others in a pod are injected (sidecars)."""

# Labels and annotations.
MANAGED = "app.kubernetes.io/managed-by=cvlaunch"
RUN_ID = "cvlaunch/run-id"
HELPER = "cvlaunch/helper"
"""On what we make for ourselves; a run's objects don't have it."""
SUBMISSION = "cvlaunch/submission"
JOB_JSON = "cvlaunch/job.json"
STOPPED = "cvlaunch/stopped"
"""On a Job that we ended: `cancelled`, or why it could never start."""
MAX_WAIT = "cvlaunch/max-wait-s"
INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE = "kueue.x-k8s.io/queue-name"

CAPACITY = "capacity"
"""Begins the reason of a run that waited too long for a place."""

_CANCELLED = "cancelled"

_WAITING = {
    "ErrImagePull": "its image can't be pulled",
    "ImagePullBackOff": "its image can't be pulled",
    "InvalidImageName": "its image can't be pulled",
    "ErrImageNeverPull": "its image can't be pulled",
    "RegistryUnavailable": "its image can't be pulled",
    "CreateContainerConfigError": "its container can't be set up",
    "CreateContainerError": "its container can't be made",
    "RunContainerError": "its container can't be started",
    "CrashLoopBackOff": "its container ends again and again",
}
"""Why a container waits → our words in front of the kubelet's; others are steps on the way."""

_SETTING_UP = ("", "ContainerCreating", "PodInitializing")
_SET_UP_S = 20.0
"""Usually less; a node tries again after 0.5, 1, 2, 4, … seconds."""
_REPEATED_S = 300.0
"""A node tries again every 2 minutes at least (kubernetes/kubernetes pkg/util/goroutinemap/exponentialbackoff)."""

_NOT_SCHEDULED = {
    "Unschedulable": "no node takes it",
    "SchedulingGated": "a scheduling gate holds it back",
}
_POD_ENDS = {
    "Evicted": "its node evicted it",
    "DeadlineExceeded": "its time on the platform is used up",
    "NodeLost": "its node was lost",
    "Preempted": "a job of a higher priority took its place",
    "UnexpectedAdmissionError": "its node refused it",
    "OutOfcpu": "its node had no room for it",
    "OutOfmemory": "its node had no room for it",
    "NodeAffinity": "its node did not fit any more",
}
_JOB_ENDS = {
    "BackoffLimitExceeded": "its pod failed and is gone",
    "DeadlineExceeded": "its time on the platform is used up",
    "PodFailurePolicy": "its pod failed and is gone",
    "FailedIndexes": "one of its nodes failed",
    "MaxFailedIndexesExceeded": "one of its nodes failed",
}
"""`reason` of the condition Failed → our words, where no pod tells more."""

_OUT_OF_MEMORY = "out of memory: it used more than resources.memory, of which shared memory is a part"


@dataclass(frozen=True)
class Seen:
    """All that is known of one run. job: None is gone. pods: of this Job, the oldest first.

    refused: what the Job controller said when it could make no pod. queue: why Kueue lets it wait. held: uid of a pod →
    what its node lacks to set it up.
    """

    job: Mapping[str, Any] | None
    pods: Sequence[Mapping[str, Any]] = ()
    refused: str = ""
    queue: str = ""
    held: Mapping[str, str] = field(default_factory=dict)


def labels_of(obj: Mapping[str, Any]) -> Mapping[str, str]:
    """Of a Job's template, too, which need not have metadata."""
    return (obj.get("metadata") or {}).get("labels") or {}


def annotations_of(obj: Mapping[str, Any]) -> Mapping[str, str]:
    return obj["metadata"].get("annotations") or {}


def is_ours(obj: Mapping[str, Any]) -> bool:
    key, _, name = MANAGED.partition("=")
    return labels_of(obj).get(key) == name


def completion_index(pod: Mapping[str, Any]) -> int:
    """Which node of the job it is."""
    index = annotations_of(pod).get(INDEX) or labels_of(pod).get(INDEX) or "0"
    return int(index) if index.isdecimal() else 0


def seconds(stamp: str | None) -> float | None:
    """Unix seconds of RFC 3339."""
    return datetime.fromisoformat(stamp).timestamp() if stamp else None


def condition(obj: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The one of this type, if it holds."""
    found = (obj.get("status") or {}).get("conditions") or ()
    return next((c for c in found if c["type"] == kind and c["status"] == "True"), None)


def has_runner(pod: Mapping[str, Any]) -> bool:
    """Of a pod or a Job's template of it: a foreign image (`runner: none`) is started by its own entry point."""
    return bool(main_of(pod).get("command"))


def main_of(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our container of a pod, or of a Job's template of it; empty if there is none.

    By name: whoever injects a sidecar may put it first.
    """
    return _ours(pod, pod["spec"]["containers"])


def main_container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """Status of our container, which kubelet lists by name; empty before there is one."""
    return _ours(pod, (pod.get("status") or {}).get("containerStatuses") or ())


def _ours(pod: Mapping[str, Any], containers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    name = VOLUME if HELPER in labels_of(pod) else CONTAINER
    return next((one for one in containers if one.get("name") == name), {})


def is_over(job: Mapping[str, Any]) -> bool:
    return condition(job, "Complete") is not None or condition(job, "Failed") is not None


def needs_pods(job: Mapping[str, Any]) -> bool:
    """Whether its pods have more to say than that they run. A suspended one has none."""
    status, spec = job.get("status") or {}, job.get("spec") or {}
    running = status.get("ready", 0) >= spec.get("parallelism", 1) and status.get("active", 0) > 0
    return is_over(job) or not (running or spec.get("suspend"))


def status_of(seen: Seen, *, now: float) -> Status:
    """UNKNOWN, native `gone`, for a Job that is not there."""
    job = seen.job
    if job is None:
        return Status(State.UNKNOWN, "gone", reason="the cluster has no such Job (any more)")
    if condition(job, "Complete"):
        return _complete(seen, job)
    if failed := condition(job, "Failed"):
        return _failed(seen, job, failed)
    if job["metadata"].get("deletionTimestamp"):
        return Status(State.STOPPING, "Terminating", reason="the Job is being deleted")
    if annotations_of(job).get(STOPPED) or condition(job, "FailureTarget"):
        return replace(_facts(seen, job), state=State.STOPPING, native="FailureTarget")
    if job["spec"].get("suspend"):
        return Status(State.QUEUED, "Suspended", reason=seen.queue or _suspended(job))
    return _going_on(seen, job, now)


def _suspended(job: Mapping[str, Any]) -> str:
    queue = labels_of(job).get(QUEUE)
    return f"it waits in queue {queue}" if queue else "the Job is suspended; somebody has to resume it"


# -- under way --------------------------------------------------------------------------------------------------------


def _going_on(seen: Seen, job: Mapping[str, Any], now: float) -> Status:
    facts, status = _facts(seen, job), job.get("status") or {}
    if condition(job, "SuccessCriteriaMet"):
        return replace(facts, state=State.FINALIZING, native="SuccessCriteriaMet")
    if status.get("ready", 0) >= job["spec"].get("parallelism", 1):
        return replace(facts, state=State.RUNNING, native="Running")
    waiting = [pod for pod in seen.pods if not _has_ended(pod)]
    again = len(waiting) < len(seen.pods)
    if not waiting:
        reason = seen.refused and f"the cluster makes no pod for it: {seen.refused}"
        native = "FailedCreate" if seen.refused else "Pending"
        return replace(facts, state=State.RESTARTING if again else State.QUEUED, native=native, reason=reason)
    held = seen.held
    found = [_waiting(pod, now, held=held.get(pod["metadata"]["uid"], "")) for pod in waiting]
    worst = min(found, key=lambda found: _ORDER.index(found.state))
    running = worst.state is State.RUNNING
    return replace(
        facts,
        state=State.RESTARTING if again and not running else worst.state,
        native=worst.native,
        reason=worst.reason,
        node=worst.node,
    )


_ORDER = (State.QUEUED, State.STARTING, State.RESTARTING, State.RUNNING)
"""A job of several nodes is as far as its last one."""


def _has_begun(pod: Mapping[str, Any]) -> bool:
    return not {"running", "terminated"}.isdisjoint(main_container(pod).get("state") or {})


def _has_ended(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")


def _waiting(pod: Mapping[str, Any], now: float, *, held: str) -> Status:
    """Of a pod that has not ended."""
    status, node = pod.get("status") or {}, pod["spec"].get("nodeName", "")
    if pod["metadata"].get("deletionTimestamp"):
        return Status(State.RESTARTING, "Terminating", reason="its pod is being taken away", node=node)
    scheduled: Mapping[str, str] = next((c for c in status.get("conditions") or () if c["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        word, message = scheduled.get("reason", ""), scheduled.get("message", "")
        reason = _words(_NOT_SCHEDULED.get(word, word), message)
        return Status(State.QUEUED, f"Pending/{word}", reason=reason + _way_out(pod, message))
    state = main_container(pod).get("state") or {}
    if "running" in state:
        return Status(State.RUNNING, "Running", node=node)
    if "terminated" in state:
        return Status(State.RUNNING, "Running", reason=_kept_by(pod), node=node)
    word, message = _why_waiting(pod, state)
    lead = _WAITING.get(word)
    reason = _words(lead, message) if lead else held and f"its node can't set it up: {held}"
    if not reason and (since := seconds(status.get("startTime"))) and now - since > 60:
        reason = f"for {format_duration(now - since)}"
    native = f"Pending/{word}" if word else str(status.get("phase", "Pending"))
    return Status(State.STARTING if node else State.QUEUED, native, reason=reason, node=node)


def _way_out(pod: Mapping[str, Any], message: str) -> str:
    """Where nobody would guess it: a job gets disk that it did not ask for."""
    if "Insufficient ephemeral-storage" not in message:
        return ""
    asked = (main_of(pod).get("resources") or {}).get("requests") or {}
    return f" It asks for {asked.get('ephemeral-storage')} of disk: set resources.disk to less, or take larger disks"


def _kept_by(pod: Mapping[str, Any]) -> str:
    """What still runs in a pod whose own container has ended; empty for a pod that ends just now."""
    found = (pod.get("status") or {}).get("containerStatuses") or ()
    names = [one["name"] for one in found if "running" in (one.get("state") or {})]
    return f"its command has ended, and sidecars keep its pod: have {', '.join(names)} not injected" if names else ""


def slow_to_set_up(pod: Mapping[str, Any], now: float) -> bool:
    """Whether its node has had the time to mount its volumes and to begin with its image."""
    status = pod.get("status") or {}
    word, _ = _why_waiting(pod, main_container(pod).get("state") or {})
    since = seconds(status.get("startTime")) or now
    return status.get("phase") == "Pending" and word in _SETTING_UP and now - since > _SET_UP_S


def held_by(event: Mapping[str, Any], pod: Mapping[str, Any], now: float) -> str:
    """What a warning tells of its pod, which is slow to set up; empty if it is no more so.

    A Secret of the run comes after the Job: that it was not there in the first seconds means nothing.
    """
    last = seconds(event.get("lastTimestamp") or event.get("eventTime")) or 0.0
    since = seconds((pod.get("status") or {}).get("startTime")) or now
    holds = last > since + _SET_UP_S and last > now - _REPEATED_S
    return f"{event.get('reason', '')}: {event.get('message', '')}" if holds else ""


def _why_waiting(pod: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[str, str]:
    """The container's word, an init container's before it; none once it has begun, whatever a sidecar does."""
    if "running" in state or "terminated" in state:
        return "", ""
    found = [c.get("state") or {} for c in (pod.get("status") or {}).get("initContainerStatuses") or ()]
    waiting = next((s["waiting"] for s in found if "waiting" in s), state.get("waiting") or {})
    return waiting.get("reason", ""), waiting.get("message", "")


def _words(lead: str, message: str) -> str:
    return f"{lead}: {message}" if message else lead


def stuck(seen: Seen, *, now: float, patience_s: float) -> str:
    """Why a run that waits should be given up; empty as long as it should not.

    patience_s: how long a kubelet may try to pull an image, or to set up a container.
    """
    job = seen.job
    if job is None or is_over(job) or annotations_of(job).get(STOPPED):
        return ""
    created = seconds(job["metadata"].get("creationTimestamp")) or now
    limit = annotations_of(job).get(MAX_WAIT)
    begun = any(_has_begun(pod) or _has_ended(pod) for pod in seen.pods)
    ready = (job.get("status") or {}).get("ready", 0) or (job.get("status") or {}).get("failed", 0)
    if limit and not begun and not ready and now - created > float(limit):
        return f"{CAPACITY}: it did not start within max_wait, {format_duration(float(limit))}"
    for pod in seen.pods:
        word, message = _why_waiting(pod, main_container(pod).get("state") or {})
        since = seconds((pod.get("status") or {}).get("startTime")) or now
        if word in _WAITING and now - since > patience_s:
            return f"{_WAITING[word]}, for {format_duration(now - since)}: {message or word}"
    return ""


# -- ended ------------------------------------------------------------------------------------------------------------


def _complete(seen: Seen, job: Mapping[str, Any]) -> Status:
    """The runner's word tells a doubled submission, which exits with 0, from a run that is done."""
    facts, said = _facts(seen, job), _said(seen.pods[-1]) if seen.pods else {}
    state = ended_state(said.get("state"), EXIT_DONE)
    reason = str(said.get("reason") or "") if state is not State.SUCCEEDED else ""
    return replace(facts, state=state, native="Complete", reason=reason, exit_code=EXIT_DONE)


def _failed(seen: Seen, job: Mapping[str, Any], failed: Mapping[str, Any]) -> Status:
    facts, word = _facts(seen, job), failed.get("reason", "")
    status = replace(facts, native=f"Failed/{word}")
    if stopped := annotations_of(job).get(STOPPED):
        return _stopped_by_us(status, stopped)
    pod = _to_blame(seen.pods)
    if pod is None:
        state = State.TIMED_OUT if word == "DeadlineExceeded" else State.FAILED
        return replace(status, state=state, reason=_words(_JOB_ENDS.get(word, word), failed.get("message", "")))
    return _of_pod(status, pod)


def _stopped_by_us(status: Status, word: str) -> Status:
    state = State.CANCELLED if word == _CANCELLED else State.ERROR
    return replace(status, state=state, reason=word)


def _to_blame(pods: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The failed pod that ended first of those of the last attempt: the others failed because of it."""
    failed = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Failed"]
    last = {completion_index(pod): pod for pod in failed}
    return min(last.values(), key=lambda pod: _ended_at(pod) or 0.0, default=None)


def end_of(pod: Mapping[str, Any]) -> Status | None:
    """How our container has ended, though a sidecar may go on; None as long as it has not."""
    return _of_pod(Status(State.FAILED, "Failed"), pod) if _terminated(pod) else None


def _of_pod(status: Status, pod: Mapping[str, Any]) -> Status:
    facts, ended = pod.get("status") or {}, _terminated(pod)
    said, code = _said(pod), ended.get("exitCode")
    if ended.get("reason") == "OOMKilled":
        return replace(status, state=State.FAILED, exit_code=code, reason=_OUT_OF_MEMORY)
    if said:
        state = ended_state(said.get("state"), int(said.get("exit_code", 1)))
        return replace(status, state=state, exit_code=said.get("exit_code"), reason=str(said.get("reason") or ""))
    word = facts.get("reason", "")
    if word in _POD_ENDS:
        state = State.TIMED_OUT if word == "DeadlineExceeded" else State.FAILED
        return replace(status, state=state, exit_code=code, reason=_words(_POD_ENDS[word], facts.get("message", "")))
    lines = str(ended.get("message") or "").strip().splitlines()
    reason = signal_words("the runner", code or 0) or (lines[-1] if lines else str(facts.get("message") or ""))
    return replace(status, state=State.FAILED, exit_code=code, reason=reason)


def _terminated(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (main_container(pod).get("state") or {}).get("terminated") or {}
    return found


def _said(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The runner's last word, which is the container's termination message; empty if it left none."""
    try:
        said = json.loads(_terminated(pod).get("message") or "")
    except ValueError:
        return {}
    return said if isinstance(said, dict) and "state" in said else {}


def _facts(seen: Seen, job: Mapping[str, Any]) -> Status:
    """All but the state and its reason."""
    status, pods = job.get("status") or {}, seen.pods
    latest = pods[-1] if pods else None
    said = [attempt for pod in pods if isinstance(attempt := _said(pod).get("attempt"), int)]
    ended = max(filter(None, map(_ended_at, pods)), default=None) if is_over(job) else None
    over = condition(job, "Complete") or condition(job, "Failed") or {}
    begun = over or status.get("ready")  # its pods were not looked at
    return Status(
        State.UNKNOWN,
        started=min(filter(None, map(_started_at, pods)), default=seconds(status.get("startTime")) if begun else None),
        ended=ended or seconds(over.get("lastTransitionTime")),
        node=latest["spec"].get("nodeName", "") if latest else "",
        attempt=max([*said, len({pod["metadata"]["uid"] for pod in pods if completion_index(pod) == 0}), 1]),
    )


def _started_at(pod: Mapping[str, Any]) -> float | None:
    state = main_container(pod).get("state") or {}
    return seconds((state.get("running") or state.get("terminated") or {}).get("startedAt"))


def _ended_at(pod: Mapping[str, Any]) -> float | None:
    return seconds(_terminated(pod).get("finishedAt"))
