"""The kinds that the server knows: one table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_PATH", "CORE", "OPENSHIFT_GROUPS", "RESOURCES", "Resource", "find_resource"]

OPENSHIFT_GROUPS = ("security.openshift.io", "project.openshift.io")


@dataclass(frozen=True)
class Resource:
    """name: plural, as in paths. definition: of its published schema; empty for custom resources, which have none here.
    subresources: with their own paths. stored: false for what is only asked (access reviews)."""

    name: str
    kind: str
    group: str
    versions: tuple[str, ...]
    namespaced: bool = True
    definition: str = ""
    subresources: tuple[str, ...] = ()
    stored: bool = True

    @property
    def api_version(self) -> str:
        return self.with_version(self.versions[0])

    @property
    def qualified(self) -> str:
        return f"{self.name}.{self.group}" if self.group else self.name

    @property
    def custom(self) -> bool:
        return not self.definition

    def with_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version


def _core(name: str, kind: str, *subresources: str, namespaced: bool = True) -> Resource:
    return Resource(name, kind, "", ("v1",), namespaced, f"io.k8s.api.core.v1.{kind}", subresources)


_AUTHORIZATION = "io.k8s.api.authorization.v1"

RESOURCES = (
    _core("namespaces", "Namespace", "status", "finalize", namespaced=False),
    _core("nodes", "Node", "status", namespaced=False),
    _core("persistentvolumes", "PersistentVolume", "status", namespaced=False),
    _core("pods", "Pod", "status", "log", "exec", "attach", "portforward", "eviction"),
    _core("services", "Service", "status"),
    _core("secrets", "Secret"),
    _core("configmaps", "ConfigMap"),
    _core("events", "Event"),
    _core("persistentvolumeclaims", "PersistentVolumeClaim", "status"),
    _core("resourcequotas", "ResourceQuota", "status"),
    _core("limitranges", "LimitRange"),
    _core("serviceaccounts", "ServiceAccount"),
    Resource("jobs", "Job", "batch", ("v1",), True, "io.k8s.api.batch.v1.Job", ("status",)),
    Resource("deployments", "Deployment", "apps", ("v1",), True, "io.k8s.api.apps.v1.Deployment", ("status",)),
    Resource("statefulsets", "StatefulSet", "apps", ("v1",), True, "io.k8s.api.apps.v1.StatefulSet", ("status",)),
    Resource(
        "priorityclasses",
        "PriorityClass",
        "scheduling.k8s.io",
        ("v1",),
        False,
        "io.k8s.api.scheduling.v1.PriorityClass",
    ),
    Resource("storageclasses", "StorageClass", "storage.k8s.io", ("v1",), False, "io.k8s.api.storage.v1.StorageClass"),
    Resource(
        "selfsubjectaccessreviews",
        "SelfSubjectAccessReview",
        "authorization.k8s.io",
        ("v1",),
        False,
        f"{_AUTHORIZATION}.SelfSubjectAccessReview",
        stored=False,
    ),
    Resource(
        "localsubjectaccessreviews",
        "LocalSubjectAccessReview",
        "authorization.k8s.io",
        ("v1",),
        True,
        f"{_AUTHORIZATION}.LocalSubjectAccessReview",
        stored=False,
    ),
    Resource(
        "selfsubjectrulesreviews",
        "SelfSubjectRulesReview",
        "authorization.k8s.io",
        ("v1",),
        False,
        f"{_AUTHORIZATION}.SelfSubjectRulesReview",
        stored=False,
    ),
    Resource("notebooks", "Notebook", "kubeflow.org", ("v1", "v1beta1"), subresources=("status",)),
    Resource("localqueues", "LocalQueue", "kueue.x-k8s.io", ("v1beta1", "v1beta2"), subresources=("status",)),
    Resource("clusterqueues", "ClusterQueue", "kueue.x-k8s.io", ("v1beta1", "v1beta2"), False, "", ("status",)),
    Resource("workloads", "Workload", "kueue.x-k8s.io", ("v1beta1", "v1beta2"), subresources=("status",)),
    Resource("securitycontextconstraints", "SecurityContextConstraints", "security.openshift.io", ("v1",), False),
    Resource("projects", "Project", "project.openshift.io", ("v1",), False),
)

BY_PATH = {(r.group, version, r.name): r for r in RESOURCES for version in r.versions}
"""(group, version, plural) → resource."""

CORE = {r.name: r for r in RESOURCES}
"""Plural → resource: no two groups share one here."""


def find_resource(word: str) -> Resource:
    """By plural or kind, whatever its case: `pods`, `Pod`, `pod`; `pvc`."""
    word = {"pvc": "persistentvolumeclaims", "pv": "persistentvolumes"}.get(word, word)
    for resource in RESOURCES:
        if word.lower() in (resource.name, resource.kind.lower()):
            return resource
    raise KeyError(word)
