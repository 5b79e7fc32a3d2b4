"""What Jobs and pods of Kubernetes mean: the platform's words, as objects of the API server, and our Status of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from launcher.kube.words import (
    CONTAINER,
    INDEX,
    JOB_JSON,
    MAX_WAIT,
    RUN_ID,
    STOPPED,
    Seen,
    needs_pods,
    status_of,
    stuck,
)
from launcher.status import State, Status

NOW = 1_800_000_000.0
Object = dict[str, Any]


def stamp(ago_s: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(NOW - ago_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(*conditions: tuple[str, str, str], ago_s: float = 30, notes: Mapping[str, str] = {}, **keys: Any) -> Object:
    """conditions: (type, reason, message) that hold. keys: of the status; `spec` and `labels`, too."""
    spec, labels, gone = keys.pop("spec", {}), keys.pop("labels", {}), keys.pop("deletionTimestamp", None)
    found = [
        {"type": t, "status": "True", "reason": r, "message": m, "lastTransitionTime": stamp(1)}
        for t, r, m in conditions
    ]
    metadata = {"name": "a-0", "uid": "j", "labels": {RUN_ID: "a-0", **labels}, "annotations": {**notes}}
    metadata |= {"creationTimestamp": stamp(ago_s), **({"deletionTimestamp": gone} if gone else {})}
    template = {"metadata": {"annotations": {JOB_JSON: "{}"}}}
    status = {"conditions": found, "startTime": stamp(ago_s), **keys}
    return {"metadata": metadata, "spec": {"parallelism": 1, "template": template, **spec}, "status": status}


def pod(
    state: Mapping[str, Any] = {}, *, phase: str = "Pending", index: int = 0, node: str = "gpu-1", **keys: Any
) -> Object:
    """keys: of the status; `uid` and `deletionTimestamp` of the metadata."""
    metadata = {"name": f"a-0-{index}", "uid": keys.pop("uid", f"p{index}"), "annotations": {INDEX: str(index)}}
    if gone := keys.pop("deletionTimestamp", None):
        metadata["deletionTimestamp"] = gone
    container = [{"name": CONTAINER, "state": state}] if state else []
    status = {"phase": phase, "startTime": stamp(20), "containerStatuses": container, **keys}
    return {"metadata": metadata, "spec": {"nodeName": node, "containers": [{}]}, "status": status}


def waiting(word: str, message: str = "") -> Object:
    return {"waiting": {"reason": word, "message": message}}


def ended(code: int, *, word: str = "Error", said: Any = "", ago_s: float = 2, **keys: Any) -> Object:
    """A failed pod. said: its termination message, JSON of a mapping."""
    message = json.dumps(said) if isinstance(said, Mapping) else said
    times = {"startedAt": stamp(10), "finishedAt": stamp(ago_s)}
    state = {"terminated": {"exitCode": code, "reason": word, "message": message, **times}}
    return pod(state, **{"phase": "Succeeded" if code == 0 else "Failed", **keys})


RUNNING = {"running": {"startedAt": stamp(5)}}
UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}
FAILED = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")

GOING_ON = {
    "nothing yet": (job(active=1), [], State.QUEUED, "Pending", ""),
    "no node": (
        job(active=1),
        [pod(node="", conditions=[UNSCHEDULABLE])],
        State.QUEUED,
        "Pending/Unschedulable",
        "no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    ),
    "being made": (job(active=1), [pod(waiting("ContainerCreating"))], State.STARTING, "Pending/ContainerCreating", ""),
    "being made for long": (
        job(active=1),
        [pod(waiting("ContainerCreating"), startTime=stamp(300))],
        State.STARTING,
        "Pending/ContainerCreating",
        "for 5m 00s",
    ),
    "no image": (
        job(active=1),
        [pod(waiting("ImagePullBackOff", "Back-off pulling image"))],
        State.STARTING,
        "Pending/ImagePullBackOff",
        "its image can't be pulled: Back-off pulling image",
    ),
    "no secret": (
        job(active=1),
        [pod(waiting("CreateContainerConfigError", 'secret "a-0" not found'))],
        State.STARTING,
        "Pending/CreateContainerConfigError",
        'its container can\'t be set up: secret "a-0" not found',
    ),
    "running": (job(active=1, ready=1), [], State.RUNNING, "Running", ""),
    "running, not counted yet": (job(active=1), [pod(RUNNING, phase="Running")], State.RUNNING, "Running", ""),
    "one of two nodes waits": (
        job(active=2, ready=1, spec={"parallelism": 2}),
        [pod(RUNNING, phase="Running"), pod(waiting("ContainerCreating"), index=1)],
        State.STARTING,
        "Pending/ContainerCreating",
        "",
    ),
    "again": (
        job(active=1),
        [ended(75, uid="p1"), pod(waiting("ContainerCreating"), uid="p2")],
        State.RESTARTING,
        "Pending/ContainerCreating",
        "",
    ),
    "evicted": (
        job(active=1),
        [pod(RUNNING, phase="Running", deletionTimestamp=stamp(1))],
        State.RESTARTING,
        "Terminating",
        "its pod is being taken away",
    ),
    "suspended": (
        job(("Suspended", "JobSuspended", ""), spec={"suspend": True}),
        [],
        State.QUEUED,
        "Suspended",
        "the Job is suspended; somebody has to resume it",
    ),
    "deleted": (
        job(active=1, deletionTimestamp=stamp(1)),
        [],
        State.STOPPING,
        "Terminating",
        "the Job is being deleted",
    ),
    "stopped": (job(active=1, ready=1, notes={STOPPED: "cancelled"}), [], State.STOPPING, "FailureTarget", ""),
    "ending": (job(("SuccessCriteriaMet", "", "")), [], State.FINALIZING, "SuccessCriteriaMet", ""),
    "gone": (None, [], State.UNKNOWN, "gone", "the cluster has no such Job (any more)"),
}


def beside(found: Object, name: str, state: Mapping[str, Any]) -> Object:
    """A pod with a sidecar, which the kubelet lists before ours."""
    found["status"]["containerStatuses"].insert(0, {"name": name, "state": state})
    return found


KEPT = "its command has ended, and sidecars keep its pod: have istio-proxy not injected"
CRASHES = {"initContainerStatuses": [{"name": "istio-proxy", "state": waiting("CrashLoopBackOff", "back-off")}]}
BESIDE: dict[str, tuple[Object, State, str]] = {
    "it runs first": (beside(pod(waiting("ContainerCreating")), "istio-proxy", RUNNING), State.STARTING, ""),
    "it runs, ours is not listed": (beside(pod(), "istio-proxy", RUNNING), State.STARTING, ""),
    "it has ended": (beside(pod(RUNNING, phase="Running"), "linkerd-proxy", ended(1)), State.RUNNING, ""),
    "ours has ended": (beside(ended(0, phase="Running"), "istio-proxy", RUNNING), State.RUNNING, KEPT),
    "ours ends just now": (ended(0, phase="Running"), State.RUNNING, ""),
    "one that stays crashes": (pod(RUNNING, phase="Running", startTime=stamp(9000), **CRASHES), State.RUNNING, ""),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_sidecar_is_not_the_run(name: str) -> None:
    found, state, reason = BESIDE[name]
    seen = Seen(job(active=1, notes={MAX_WAIT: "1"} if state is State.RUNNING else {}), [found])
    status = status_of(seen, now=NOW)
    assert (status.state, status.reason) == (state, reason)
    assert stuck(seen, now=NOW, patience_s=60) == ""


@pytest.mark.parametrize("name", GOING_ON)
def test_under_way(name: str) -> None:
    found, pods, state, native, reason = GOING_ON[name]
    status = status_of(Seen(found, pods), now=NOW)
    assert (status.state, status.native, status.reason) == (state, native, reason)
    assert status.exit_code is None and status.ended is None


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (
            Seen(job(), refused='pods "a-0-x" is forbidden: exceeded quota: gpus, used: 2, limited: 2'),
            'the cluster makes no pod for it: pods "a-0-x" is forbidden: exceeded quota: gpus, used: 2, limited: 2',
        ),
        (
            Seen(job(spec={"suspend": True}, labels={"kueue.x-k8s.io/queue-name": "gpu"})),
            "it waits in queue gpu",
        ),
        (Seen(job(spec={"suspend": True}), queue="it waits in queue gpu: no quota"), "it waits in queue gpu: no quota"),
    ],
)
def test_what_keeps_it_waiting_is_said(seen: Seen, reason: str) -> None:
    status = status_of(seen, now=NOW)
    assert (status.state, status.reason) == (State.QUEUED, reason)


WORD = {"state": "FAILED", "exit_code": 3, "reason": "ValueError: no", "attempt": 2}
ENDS: dict[str, tuple[Object, Sequence[Object], State, int | None, str]] = {
    "done": (job(("Complete", "", "")), [ended(0, word="Completed")], State.SUCCEEDED, 0, ""),
    "done, pods gone": (job(("Complete", "", "")), [], State.SUCCEEDED, 0, ""),
    "another submission runs it": (
        job(("Complete", "", "")),
        [ended(0, said={"state": "ERROR", "exit_code": 0, "reason": "submitted twice", "attempt": None})],
        State.ERROR,
        0,
        "submitted twice",
    ),
    "the runner's word": (job(FAILED), [ended(3, said=WORD)], State.FAILED, 3, "ValueError: no"),
    "timed out": (
        job(FAILED),
        [ended(1, said={**WORD, "state": "TIMED_OUT", "exit_code": 1, "reason": "the timeout of 2h is used up"})],
        State.TIMED_OUT,
        1,
        "the timeout of 2h is used up",
    ),
    "before the runner": (
        job(FAILED),
        [ended(1, said="Traceback\nModuleNotFoundError: no launcher\n")],
        State.FAILED,
        1,
        "ModuleNotFoundError: no launcher",
    ),
    "out of memory": (
        job(FAILED),
        [ended(137, word="OOMKilled")],
        State.FAILED,
        137,
        "out of memory: it used more than resources.memory, of which shared memory is a part",
    ),
    "killed": (job(FAILED), [ended(137)], State.FAILED, 137, "the runner was killed by signal 9 (Killed)"),
    "no room on the node": (
        job(FAILED),
        [pod(phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage.")],
        State.FAILED,
        None,
        "its node evicted it: The node was low on resource: ephemeral-storage.",
    ),
    "the pod's deadline": (
        job(FAILED),
        [pod(phase="Failed", reason="DeadlineExceeded", message="Pod was active on the node longer than allowed")],
        State.TIMED_OUT,
        None,
        "its time on the platform is used up: Pod was active on the node longer than allowed",
    ),
    "its pods are gone": (
        job(FAILED),
        [],
        State.FAILED,
        None,
        "its pod failed and is gone: Job has reached the specified backoff limit",
    ),
    "cancelled": (
        job(("Failed", "DeadlineExceeded", ""), notes={STOPPED: "cancelled"}),
        [ended(143, said={**WORD, "state": "CANCELLED"})],
        State.CANCELLED,
        None,
        "cancelled",
    ),
    "given up": (
        job(("Failed", "DeadlineExceeded", ""), notes={STOPPED: "its image could not be pulled"}),
        [],
        State.ERROR,
        None,
        "its image could not be pulled",
    ),
    "done before the cancellation": (
        job(("Complete", "", ""), notes={STOPPED: "cancelled"}),
        [ended(0)],
        State.SUCCEEDED,
        0,
        "",
    ),
    "the node that failed first": (
        job(FAILED),
        [ended(1, said="peer lost", index=0, ago_s=1), ended(3, said=WORD, index=1, ago_s=4)],
        State.FAILED,
        3,
        "ValueError: no",
    ),
    "the last attempt": (
        job(FAILED),
        [ended(75, said={**WORD, "state": "PREEMPTED"}, uid="p1", ago_s=9), ended(3, said=WORD, uid="p2", ago_s=2)],
        State.FAILED,
        3,
        "ValueError: no",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends(name: str) -> None:
    found, pods, state, code, reason = ENDS[name]
    status = status_of(Seen(found, pods), now=NOW)
    assert (status.state, status.exit_code, status.reason) == (state, code, reason)
    assert status.ended is not None


def test_facts_of_an_end() -> None:
    status = status_of(Seen(job(FAILED), [ended(3, said=WORD)]), now=NOW)
    assert status == Status(
        State.FAILED,
        "Failed/BackoffLimitExceeded",
        "ValueError: no",
        exit_code=3,
        started=NOW - 10,
        ended=NOW - 2,
        node="gpu-1",
        attempt=2,
    )


@pytest.mark.parametrize(
    ("found", "needed"),
    [
        (job(active=1, ready=1), False),
        (job(active=2, ready=1, spec={"parallelism": 2}), True),
        (job(active=1), True),
        (job(spec={"suspend": True}), False),
        (job(("Complete", "", "")), True),
        (job(FAILED), True),
    ],
)
def test_pods_are_looked_at_where_the_job_does_not_say_enough(found: Object, needed: bool) -> None:
    assert needs_pods(found) is needed


LATE = "capacity: it did not start within max_wait, 1m 00s"
NO_IMAGE = waiting("ImagePullBackOff", 'Back-off pulling image "x"')


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (Seen(job(active=1), [pod(NO_IMAGE, startTime=stamp(500))]), ""),
        (
            Seen(job(active=1), [pod(NO_IMAGE, startTime=stamp(700))]),
            'its image can\'t be pulled, for 11m 40s: Back-off pulling image "x"',
        ),
        (Seen(job(active=1), [pod(waiting("ContainerCreating"), startTime=stamp(9000))]), ""),
        (Seen(job(active=1, notes={STOPPED: "cancelled"}), [pod(NO_IMAGE, startTime=stamp(700))]), ""),
        (Seen(job(active=1, notes={MAX_WAIT: "60"}, ago_s=50)), ""),
        (Seen(job(notes={MAX_WAIT: "60"}, ago_s=70)), LATE),
        (Seen(job(notes={MAX_WAIT: "60"}, ago_s=70, spec={"suspend": True})), LATE),
        (Seen(job(active=1, ready=1, notes={MAX_WAIT: "60"}, ago_s=70)), ""),
        (Seen(job(active=1, notes={MAX_WAIT: "60"}, ago_s=70), [pod(RUNNING, phase="Running")]), ""),
        (Seen(job(active=1, notes={MAX_WAIT: "60"}, ago_s=70), [ended(75), pod(NO_IMAGE)]), ""),
        (Seen(None), ""),
    ],
)  # fmt: skip
def test_what_can_never_start_is_given_up(seen: Seen, why: str) -> None:
    assert stuck(seen, now=NOW, patience_s=600) == why
