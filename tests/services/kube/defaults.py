"""What the API server writes into objects that leave it out (pkg/apis/*/v1/defaults.go)."""

from __future__ import annotations

import base64
from typing import Any

__all__ = ["apply_defaults", "pod_template_of"]

Json = dict[str, Any]


def apply_defaults(plural: str, obj: Json) -> None:
    """In place."""
    if plural == "jobs":
        _job(obj)
    elif plural == "pods":
        _pod_spec(obj["spec"])
        _pod_requests(obj["spec"])
        obj["spec"].setdefault("enableServiceLinks", True)
    elif plural in ("deployments", "statefulsets"):
        obj["spec"].setdefault("replicas", 1)
        _template(obj["spec"])
    elif plural == "services":
        _service(obj["spec"])
    elif plural == "secrets":
        _secret(obj)
    elif plural == "persistentvolumeclaims":
        obj["spec"].setdefault("volumeMode", "Filesystem")


def pod_template_of(plural: str, obj: Json) -> Json:
    """{} for what has none."""
    template: Json = obj.get("spec", {}).get("template", {}) if plural in TEMPLATED else {}
    return template


TEMPLATED = ("jobs", "deployments", "statefulsets")


def _job(obj: Json) -> None:
    spec = obj["spec"]
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("completionMode", "NonIndexed")
    if "backoffLimit" not in spec:
        spec["backoffLimit"] = 2**31 - 1 if "backoffLimitPerIndex" in spec else 6
    spec.setdefault("suspend", False)
    spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
        for condition in rule.get("onPodConditions", ()):
            condition.setdefault("status", "True")
    _template(spec)


def _template(spec: Json) -> None:
    spec.setdefault("template", {}).setdefault("metadata", {})
    _pod_spec(spec["template"].setdefault("spec", {}))


def _pod_spec(spec: Json) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("securityContext", {})
    spec.setdefault("schedulerName", "default-scheduler")
    if "serviceAccountName" in spec:
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in [*spec.get("containers", ()), *spec.get("initContainers", ())]:
        _container(container)
    for volume in spec.get("volumes", ()):
        _volume(volume)


def _container(container: Json) -> None:
    name = container.get("image", "").rpartition("/")[2]
    newest = "@" not in name and (":" not in name or name.endswith(":latest"))
    container.setdefault("imagePullPolicy", "Always" if newest else "IfNotPresent")
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    container.setdefault("resources", {})
    for port in container.get("ports", ()):
        port.setdefault("protocol", "TCP")
    for variable in container.get("env", ()):
        if "fieldRef" in variable.get("valueFrom", {}):
            variable["valueFrom"]["fieldRef"].setdefault("apiVersion", "v1")


def _volume(volume: Json) -> None:
    for kind in ("secret", "configMap", "downwardAPI", "projected"):
        if kind in volume:
            volume[kind].setdefault("defaultMode", 0o644)
    sources = volume.get("projected", {}).get("sources", [])
    for items in [volume.get("downwardAPI", {}), *(source.get("downwardAPI", {}) for source in sources)]:
        for item in items.get("items", ()):
            if "fieldRef" in item:
                item["fieldRef"].setdefault("apiVersion", "v1")


def _pod_requests(spec: Json) -> None:
    for container in [*spec.get("containers", ()), *spec.get("initContainers", ())]:
        resources = container["resources"]
        if "limits" in resources:
            resources["requests"] = {**resources["limits"], **resources.get("requests", {})}


def _service(spec: Json) -> None:
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    spec.setdefault("internalTrafficPolicy", "Cluster")
    spec.setdefault("ipFamilies", ["IPv4"])
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    spec.setdefault("clusterIP", "10.96.17.5")
    spec.setdefault("clusterIPs", [spec["clusterIP"]])
    for port in spec.get("ports", ()):
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port.get("port"))


def _secret(obj: Json) -> None:
    obj.setdefault("type", "Opaque")
    if texts := obj.pop("stringData", None):
        data = obj.setdefault("data", {})
        data.update({key: base64.b64encode(text.encode()).decode() for key, text in texts.items()})
