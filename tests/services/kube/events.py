"""Events, as controllers and kubelets write them: what happens again is counted, not written again."""

from __future__ import annotations

from typing import Any

from tests.services.kube.objects import Store
from tests.services.kube.resources import CORE, find_resource
from tests.services.kube.times import now

__all__ = ["record"]

Json = dict[str, Any]


def record(store: Store, about: Json, reason: str, message: str, *, warning: bool = False, source: str = "") -> None:
    """about: the object that it happened to."""
    meta, resource = about["metadata"], find_resource(about["kind"])
    namespace = meta.get("namespace", "default")
    with store.lock:
        known = (meta["uid"], reason, message)
        if store.change(("events", namespace, store.event_names.get(known, "")), _again):
            return
        if store.get(("namespaces", "", namespace)) is None:
            return
        involved = {
            "kind": about["kind"],
            "namespace": namespace,
            "name": meta["name"],
            "uid": meta["uid"],
            "apiVersion": resource.api_version,
            "resourceVersion": meta.get("resourceVersion", ""),
        }
        made = store.create(
            CORE["events"],
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{meta['name'][:200]}.{store.version:016x}", "namespace": namespace},
                "involvedObject": involved,
                "reason": reason,
                "message": message,
                "type": "Warning" if warning else "Normal",
                "source": {"component": source},
                "reportingComponent": source,
                "reportingInstance": "",
                "firstTimestamp": now(),
                "lastTimestamp": now(),
                "eventTime": None,
                "count": 1,
            },
        )
        store.event_names[known] = made["metadata"]["name"]


def _again(event: Json) -> None:
    event["count"] += 1
    event["lastTimestamp"] = now()
