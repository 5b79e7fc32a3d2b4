"""Why Kueue lets a Job wait (https://kueue.sigs.k8s.io/docs/concepts/workload/)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import AuthError, SpecError
from launcher.kube.client import Cluster

__all__ = ["queue_words"]


def queue_words(cluster: Cluster) -> dict[str, str]:
    """By the Job's uid; empty where Workloads are hidden from the user, or there is no Kueue."""
    try:
        workloads = list(cluster.list(cluster.path("workloads")))
    except (AuthError, SpecError):
        return {}
    return {
        owner["uid"]: _reason(workload)
        for workload in workloads
        for owner in workload["metadata"].get("ownerReferences") or ()
    }


def _reason(workload: Mapping[str, Any]) -> str:
    """The condition that says why it is not admitted."""
    found = (workload.get("status") or {}).get("conditions") or ()
    waiting = next((c for c in found if c["type"] in ("QuotaReserved", "Admitted") and c["status"] == "False"), None)
    queue = workload["spec"].get("queueName")
    if not queue:
        return "Kueue holds it back, as it is in no queue"
    return f"it waits in queue {queue}" + (f": {waiting['message']}" if waiting and waiting.get("message") else "")
