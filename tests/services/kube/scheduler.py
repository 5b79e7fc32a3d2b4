"""Which node a pod goes to, or the scheduler's own words for why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from tests.services.kube.admission import pod_requests
from tests.services.kube.events import record
from tests.services.kube.objects import Key, Store
from tests.services.kube.times import now, parse_quantity

__all__ = ["schedule"]

Json = dict[str, Any]
Usage = dict[str, dict[str, Decimal]]
"""Node → resource → how much of it is taken."""


def schedule(store: Store) -> None:
    """All pods that wait, the oldest first."""
    with store.lock:
        waiting = [pod for pod in store.list("pods") if _waits(pod)]
        used = _used(store) if waiting else {}
        for pod in sorted(waiting, key=lambda pod: pod["metadata"]["creationTimestamp"]):
            _schedule(store, pod, used)


def _waits(pod: Json) -> bool:
    return (
        not pod["spec"].get("nodeName")
        and pod["status"].get("phase") == "Pending"
        and "deletionTimestamp" not in pod["metadata"]
    )


def _schedule(store: Store, pod: Json, used: Usage) -> None:
    key = ("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
    if pod["spec"].get("schedulingGates"):
        _mark(store, key, "False", "SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates")
        return
    nodes = store.list("nodes")
    claims = _claims(store, pod)
    verdicts = {node["metadata"]["name"]: list(_objections(node, pod, used)) for node in nodes}
    free = [node for node in nodes if not verdicts[node["metadata"]["name"]]]
    if claims or not free:
        message = (claims and _claims_message(len(nodes), claims)) or _message(verdicts)
        _mark(store, key, "False", "Unschedulable", message)
        record(store, pod, "FailedScheduling", message, warning=True, source="default-scheduler")
        return
    chosen = min(free, key=_devices)["metadata"]["name"]
    _bind(store, key, chosen)
    _add(used, chosen, pod)


def _devices(node: Json) -> int:
    """Whoever needs none leaves them to others."""
    return sum("/" in name for name in node["status"]["allocatable"])


def _bind(store: Store, key: Key, node: str) -> None:
    def mutate(pod: Json) -> None:
        pod["spec"]["nodeName"] = node
        _set(pod["status"], {"type": "PodScheduled", "status": "True"})

    bound = store.change(key, mutate)
    assert bound is not None
    text = f"Successfully assigned {key[1]}/{key[2]} to {node}"
    record(store, bound, "Scheduled", text, source="default-scheduler")


def _mark(store: Store, key: Key, status: str, reason: str, message: str) -> None:
    def mutate(pod: Json) -> None:
        _set(pod["status"], {"type": "PodScheduled", "status": status, "reason": reason, "message": message})

    store.change(key, mutate)


def _set(status: Json, condition: Json) -> None:
    old: Json = next((c for c in status.get("conditions", ()) if c["type"] == condition["type"]), {})
    if {k: v for k, v in old.items() if k not in ("lastProbeTime", "lastTransitionTime")} == condition:
        return
    others = [c for c in status.get("conditions", ()) if c["type"] != condition["type"]]
    status["conditions"] = [*others, {**condition, "lastProbeTime": None, "lastTransitionTime": now()}]


def _claims(store: Store, pod: Json) -> str:
    for volume in pod["spec"].get("volumes", ()):
        if name := volume.get("persistentVolumeClaim", {}).get("claimName"):
            claim = store.get(("persistentvolumeclaims", pod["metadata"]["namespace"], name))
            if claim is None:
                return f'persistentvolumeclaim "{name}" not found'
            if claim.get("status", {}).get("phase") != "Bound":
                return "pod has unbound immediate PersistentVolumeClaims"
    return ""


def _claims_message(nodes: int, why: str) -> str:
    end = f"0/{nodes} nodes are available: {nodes} Preemption is not helpful for scheduling."
    return f"0/{nodes} nodes are available: {why}. preemption: {end}"


def _message(verdicts: dict[str, list[str]]) -> str:
    total = len(verdicts)
    if not total:
        return "no nodes available to schedule pods"
    counts = Counter(reason for reasons in verdicts.values() for reason in reasons)
    told = ", ".join(sorted(f"{count} {reason}" for reason, count in counts.items()))
    helpless = sum(any(reason.startswith("node(s)") for reason in reasons) for reasons in verdicts.values())
    ends = []
    if total - helpless:
        ends.append(f"{total - helpless} No preemption victims found for incoming pod")
    if helpless:
        ends.append(f"{helpless} Preemption is not helpful for scheduling")
    end = ", ".join(sorted(ends))
    return f"0/{total} nodes are available: {told}. preemption: 0/{total} nodes are available: {end}."


def _objections(node: Json, pod: Json, used: Usage) -> Iterator[str]:
    """Of the first filter that has any, as the scheduler asks them."""
    spec = node.get("spec", {})
    if spec.get("unschedulable"):
        yield "node(s) were unschedulable"
        return
    for taint in spec.get("taints", ()):
        if taint["effect"] in ("NoSchedule", "NoExecute") and not _tolerated(taint, pod["spec"]):
            yield f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
            return
    if not _chosen(node, pod["spec"]):
        yield "node(s) didn't match Pod's node affinity/selector"
        return
    taken, room = used.get(node["metadata"]["name"], {}), node["status"]["allocatable"]
    if taken.get("pods", 0) + 1 > parse_quantity(room.get("pods", "110")):
        yield "Too many pods"
    for name, value in pod_requests(pod["spec"]).items():
        if value and taken.get(name, Decimal(0)) + value > parse_quantity(room.get(name, "0")):
            yield f"Insufficient {name}"


def _tolerated(taint: Json, spec: Json) -> bool:
    return any(
        toleration.get("key", taint["key"]) == taint["key"]
        and toleration.get("effect", taint["effect"]) in ("", taint["effect"])
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))
        for toleration in spec.get("tolerations", ())
    )


def _chosen(node: Json, spec: Json) -> bool:
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in spec.get("nodeSelector", {}).items()):
        return False
    required = (
        spec.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    terms = required.get("nodeSelectorTerms", ())
    fields = {"metadata.name": node["metadata"]["name"]}
    return not terms or any(
        all(_meets(labels, rule) for rule in term.get("matchExpressions", ()))
        and all(_meets(fields, rule) for rule in term.get("matchFields", ()))
        for term in terms
    )


def _meets(labels: Json, rule: Json) -> bool:
    value, values = labels.get(rule["key"]), rule.get("values", [])
    match rule["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case _:
            return value is not None and int(value) < int(values[0])


def _used(store: Store) -> Usage:
    used: Usage = {}
    for pod in store.list("pods"):
        node = pod["spec"].get("nodeName")
        if node and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            _add(used, node, pod)
    return used


def _add(used: Usage, node: str, pod: Json) -> None:
    taken = used.setdefault(node, {})
    for name, value in {**pod_requests(pod["spec"]), "pods": Decimal(1)}.items():
        taken[name] = taken.get(name, Decimal(0)) + value
