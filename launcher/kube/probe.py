"""Looking at a cluster as a user of one namespace, and what such a user needs: the Role.

Most of what is looked at belongs to the cluster and may be hidden from a user of a namespace; that is said (`hidden`),
it is no error. Rights are asked for one by one (SelfSubjectAccessReview), which everybody may do.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launcher.errors import AuthError, CvlaunchError, UnsupportedError
from launcher.kube.client import Cluster, Json
from launcher.kube.gpus import WAYS, Found, found_on, is_gpu, toleration_key

__all__ = [
    "ROLE",
    "Claim",
    "Limit",
    "LocalQueue",
    "Need",
    "Node",
    "Priority",
    "Probe",
    "Quota",
    "Right",
    "StorageClass",
    "Subject",
    "as_target",
    "policy",
    "probe",
]


@dataclass(frozen=True)
class Need:
    """A rule of a Role: verbs on resources (`pods/log`: a part of one), and what for. needed: runs need it."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    purpose: str
    needed: bool = False


_RBAC = "rbac.authorization.k8s.io"
_READ = ("get", "list")
ROLE: Sequence[Need] = (
    Need("batch", ("jobs",), ("get", "list", "create", "patch", "delete"), "runs: submit, status, cancel, rm", True),
    Need("", ("pods",), _READ, "what a run waits for, and its nodes", True),
    Need("", ("pods/log",), ("get",), "logs while a run goes on", True),
    Need("", ("events",), ("list",), "why no pod comes: quota, policies", True),
    Need("", ("pods",), ("create",), "dry runs: a pod is tried out before its run is sent"),
    Need("", ("secrets",), ("create", "delete"), "values of secrets that are on the client"),
    Need("", ("services",), ("get", "create", "delete"), "runs on several nodes"),
    Need("", ("pods/exec", "pods/portforward"), ("get", "create"), "cvlaunch exec, and results in a volume (pvc://)"),
    Need("", ("persistentvolumeclaims",), _READ, "whether a volume is there"),
    Need("kueue.x-k8s.io", ("workloads",), ("list",), "why a run waits in a queue of Kueue"),
    Need("kueue.x-k8s.io", ("localqueues",), ("list",), "cvlaunch targets probe"),
    Need("", ("resourcequotas", "limitranges"), ("list",), "cvlaunch targets probe"),
    Need("apps", ("deployments", "statefulsets", "daemonsets", "replicasets"), (*_READ, "patch"), "cvlaunch shm"),
    Need("batch", ("cronjobs",), (*_READ, "patch"), "cvlaunch shm"),
    Need("kubeflow.org", ("notebooks",), (*_READ, "patch"), "cvlaunch shm"),
)
"""The least that a user needs, in one namespace; nothing of the whole cluster."""

_OPTIONAL_GROUPS = ("kueue.x-k8s.io", "kubeflow.org")
"""Not asked about where the cluster doesn't have them."""
_AT_ONCE = 8
_SCCS = ("restricted-v2", "restricted", "nonroot-v2", "nonroot", "anyuid", "hostmount-anyuid", "privileged")
"""OpenShift's own security context constraints, the strictest first."""

_BY_GROUP = {
    "security.openshift.io": "OpenShift",
    "kube.cloud.ovh.com": "OVH Managed Kubernetes",
    "compute.coreweave.com": "CoreWeave",
}
_BY_VERSION = {"-gke.": "GKE", "-eks-": "EKS", "+k3s": "K3s", "+rke2": "RKE2", "-aliyun": "Alibaba ACK"}
_BY_LABEL = {
    "node.k8s.ovh/": "OVH Managed Kubernetes",
    "cloud.google.com/gke-": "GKE",
    "eks.amazonaws.com/": "EKS",
    "kubernetes.azure.com/": "AKS",
    "nebius.com/": "Nebius",
    "minikube.k8s.io/": "minikube",
}
"""What tells a distribution: an API group, a part of the version's name, the beginning of a node's label."""


@dataclass(frozen=True)
class Right:
    """allowed: whether the user may `verb` it in the namespace."""

    verb: str
    resource: str
    purpose: str
    needed: bool
    allowed: bool


@dataclass(frozen=True)
class Node:
    """One kind of GPU on one node. product: value of its label. free: None where pods of others are hidden.

    cpus, memory: as the API writes them. taints: `key=value:effect`, those that a job with GPUs tolerates left out.
    """

    name: str
    ready: bool
    resource: str
    way: str
    product: str
    model: str
    count: int
    free: int | None
    cpus: str
    memory: str
    taints: tuple[str, ...]


@dataclass(frozen=True)
class Quota:
    name: str
    resource: str
    used: str
    hard: str


@dataclass(frozen=True)
class Limit:
    """Of a LimitRange; kind: Container, Pod, PersistentVolumeClaim. default: limit of who says none."""

    name: str
    kind: str
    resource: str
    least: str
    most: str
    default: str


@dataclass(frozen=True)
class LocalQueue:
    name: str
    cluster_queue: str
    pending: int
    admitted: int


@dataclass(frozen=True)
class Priority:
    """of: `pods`, or `Kueue`."""

    name: str
    value: int
    of: str
    default: bool
    preempts: bool


@dataclass(frozen=True)
class StorageClass:
    name: str
    provisioner: str
    default: bool
    binding: str


@dataclass(frozen=True)
class Claim:
    name: str
    phase: str
    modes: tuple[str, ...]
    size: str
    storage_class: str

    @property
    def shared(self) -> bool:
        """Pods of several nodes may write."""
        return "ReadWriteMany" in self.modes


@dataclass(frozen=True)
class Probe:
    """user: None where the cluster doesn't say. level: of Pod Security, enforced in the namespace; None: it has none.

    hidden: resources that the user may not list. sccs: OpenShift's that pods of `account` may use; those that the user
    may, where only that can be asked and `account` is None.
    """

    where: str
    version: str
    distribution: str
    user: str | None
    namespace: str
    exists: bool | None
    level: str | None
    rights: tuple[Right, ...]
    nodes: tuple[Node, ...] = ()
    quotas: tuple[Quota, ...] = ()
    limits: tuple[Limit, ...] = ()
    queues: tuple[LocalQueue, ...] = ()
    priorities: tuple[Priority, ...] = ()
    storage_classes: tuple[StorageClass, ...] = ()
    claims: tuple[Claim, ...] = ()
    sccs: tuple[str, ...] = ()
    account: str | None = None
    hidden: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Right, ...]:
        return tuple(right for right in self.rights if not right.allowed)

    @property
    def openshift(self) -> bool:
        return self.distribution == "OpenShift"


def probe(cluster: Cluster, *, service_account: str | None = None) -> Probe:
    """What its user can see. AuthError without an identity, UnreachableError without an answer.

    service_account: of the pods; None is `default`.
    """
    groups = _groups(cluster)
    rights = tuple(_rights(cluster, groups))
    look = _Look(cluster)
    version = str((cluster.get("/version") or {}).get("gitVersion", ""))
    nodes = look.list("nodes")
    kueue = "kueue.x-k8s.io" in groups
    exists, level = _namespace(cluster, look)
    account, sccs = _sccs(cluster, service_account or "default") if "security.openshift.io" in groups else (None, ())
    return Probe(
        where=cluster.where,
        version=version,
        distribution=_distribution(version, groups, nodes),
        user=_user(cluster),
        namespace=cluster.namespace,
        exists=exists,
        level=level,
        rights=rights,
        nodes=tuple(_nodes(nodes, look)),
        quotas=tuple(_quotas(look.list("resourcequotas"))),
        limits=tuple(_limits(look.list("limitranges"))),
        queues=tuple(map(_queue, look.list("localqueues") if kueue else ())),
        priorities=tuple(_priorities(look, kueue=kueue)),
        storage_classes=tuple(map(_storage_class, look.list("storageclasses"))),
        claims=tuple(map(_claim, look.list("persistentvolumeclaims"))),
        sccs=sccs,
        account=account,
        hidden=tuple(look.hidden),
    )


class _Look:
    """Lists, and notes what is hidden."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.hidden: list[str] = []

    def list(self, resource: str, *, everywhere: bool = False, fields: str = "") -> list[Json]:
        try:
            path = self._cluster.path(resource, namespace="" if everywhere else None)
            return list(self._cluster.list(path, fields=fields))
        except AuthError:
            self.hidden.append(f"{resource} of other namespaces" if everywhere else resource)
        except UnsupportedError:  # an older operator has less
            pass
        return []


# ---- the cluster and its user


def _groups(cluster: Cluster) -> frozenset[str]:
    found = cluster.get("/apis") or {}
    return frozenset(str(group["name"]) for group in found.get("groups") or ())


def _rights(cluster: Cluster, groups: frozenset[str]) -> Iterator[Right]:
    there = [need for need in ROLE if need.group not in _OPTIONAL_GROUPS or need.group in groups]
    asked = [(need, verb, resource) for need in there for resource in need.resources for verb in need.verbs]

    def ask(one: tuple[Need, str, str]) -> Right:
        need, verb, resource = one
        name, _, sub = resource.partition("/")
        return Right(verb, resource, need.purpose, need.needed, cluster.allowed(verb, name, sub=sub))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(ask, asked)


def _user(cluster: Cluster) -> str | None:
    """By SelfSubjectReview, which clusters have since 1.28."""
    body: Json = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    with contextlib.suppress(CvlaunchError):
        found = cluster.create("/apis/authentication.k8s.io/v1/selfsubjectreviews", body)
        return str(found["status"]["userInfo"]["username"])
    return None


def _namespace(cluster: Cluster, look: _Look) -> tuple[bool | None, str | None]:
    """(is it there, None where that is hidden; the level of Pod Security)."""
    try:
        found = cluster.get(cluster.path("namespaces", cluster.namespace))
    except AuthError:
        look.hidden.append(f"namespace {cluster.namespace}")
        return None, None
    if found is None:
        return False, None
    return True, (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")


def _distribution(version: str, groups: frozenset[str], nodes: Sequence[Json]) -> str:
    labels = {label for node in nodes for label in node["metadata"].get("labels") or ()}
    signs = (
        *(name for group, name in _BY_GROUP.items() if group in groups),
        *(name for part, name in _BY_VERSION.items() if part in version),
        *(name for start, name in _BY_LABEL.items() if any(label.startswith(start) for label in labels)),
    )
    return signs[0] if signs else "Kubernetes"


def _sccs(cluster: Cluster, account: str) -> tuple[str | None, tuple[str, ...]]:
    """(the service account, what its pods may use), or (None, what we may) for who may not ask about others."""

    def usable(name: str, by: str | None) -> bool:
        resource, space = "securitycontextconstraints", cluster.namespace
        return cluster.allowed("use", resource, name=name, namespace=space, service_account=by)

    try:
        return account, tuple(name for name in _SCCS if usable(name, account))
    except AuthError:
        return None, tuple(name for name in _SCCS if usable(name, None))


# ---- GPUs


def _nodes(nodes: Sequence[Json], look: _Look) -> Iterator[Node]:
    with_gpus = [node for node in nodes if dict(_gpus(_room(node)))]
    taken = _taken(look) if with_gpus else None
    for node in with_gpus:
        name, room = str(node["metadata"]["name"]), _room(node)
        found = found_on(node["metadata"].get("labels") or {}) or Found("", "", None)
        for resource, count in _gpus(room):
            yield Node(
                name=name,
                ready=_ready(node),
                resource=resource,
                way=found.way,
                product=found.value,
                model=found.model or "",
                count=count,
                free=None if taken is None else max(count - taken[name, resource], 0),
                cpus=str(room.get("cpu", "")),
                memory=str(room.get("memory", "")),
                taints=tuple(_taints(node, resource)),
            )


def _room(node: Json) -> Json:
    found: Json = (node.get("status") or {}).get("allocatable") or {}
    return found


def _gpus(amounts: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    for resource, amount in amounts.items():
        if is_gpu(resource) and str(amount).isdecimal() and int(str(amount)):
            yield resource, int(str(amount))


def _ready(node: Json) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions") or ()}
    return conditions.get("Ready") == "True" and not node.get("spec", {}).get("unschedulable")


def _taints(node: Json, resource: str) -> Iterator[str]:
    for taint in node.get("spec", {}).get("taints") or ():
        if taint["key"] != toleration_key(resource) and taint["key"] != "node.kubernetes.io/unschedulable":
            value = f"={taint['value']}" if taint.get("value") else ""
            yield f"{taint['key']}{value}:{taint['effect']}"


def _taken(look: _Look) -> Counter[tuple[str, str]] | None:
    """(node, resource) → how many pods have; None where pods of other namespaces are hidden."""
    before = len(look.hidden)
    pods = look.list("pods", everywhere=True, fields="status.phase!=Succeeded,status.phase!=Failed")
    if len(look.hidden) > before:
        return None
    taken: Counter[tuple[str, str]] = Counter()
    for pod in pods:
        node = pod["spec"].get("nodeName")
        if node:
            taken.update({(node, resource): number for resource, number in _requested(pod).items()})
    return taken


def _requested(pod: Json) -> Counter[str]:
    """GPUs of a pod: of all its containers together, or of one that starts before them, if that wants more."""
    main: Counter[str] = Counter()
    for container in pod["spec"].get("containers") or ():
        main.update(_of_container(container))
    for container in pod["spec"].get("initContainers") or ():
        main |= _of_container(container)
    return main


def _of_container(container: Json) -> Counter[str]:
    resources = container.get("resources") or {}
    return Counter(dict(_gpus({**(resources.get("limits") or {}), **(resources.get("requests") or {})})))


# ---- the namespace


def _quotas(found: Iterable[Json]) -> Iterator[Quota]:
    for quota in found:
        status = quota.get("status") or {}
        hard = status.get("hard") or quota.get("spec", {}).get("hard") or {}
        for resource, amount in hard.items():
            yield Quota(
                quota["metadata"]["name"], resource, str((status.get("used") or {}).get(resource, "")), str(amount)
            )


def _limits(found: Iterable[Json]) -> Iterator[Limit]:
    for limit_range in found:
        for item in limit_range["spec"].get("limits") or ():
            kinds = {key: item.get(key) or {} for key in ("min", "max", "default")}
            for resource in sorted({name for amounts in kinds.values() for name in amounts}):
                least, most, default = (str(amounts.get(resource, "")) for amounts in kinds.values())
                yield Limit(limit_range["metadata"]["name"], item["type"], resource, least, most, default)


def _queue(queue: Json) -> LocalQueue:
    status = queue.get("status") or {}
    return LocalQueue(
        name=queue["metadata"]["name"],
        cluster_queue=queue["spec"].get("clusterQueue", ""),
        pending=status.get("pendingWorkloads", 0),
        admitted=status.get("admittedWorkloads", 0),
    )


def _priorities(look: _Look, *, kueue: bool) -> Iterator[Priority]:
    for found in look.list("priorityclasses"):
        name = found["metadata"]["name"]
        if not name.startswith("system-"):
            preempts = found.get("preemptionPolicy") != "Never"
            yield Priority(name, found["value"], "pods", bool(found.get("globalDefault")), preempts)
    for found in look.list("workloadpriorityclasses") if kueue else ():
        yield Priority(found["metadata"]["name"], found["value"], "Kueue", default=False, preempts=True)


def _storage_class(found: Json) -> StorageClass:
    annotations = found["metadata"].get("annotations") or {}
    return StorageClass(
        name=found["metadata"]["name"],
        provisioner=found["provisioner"],
        default=annotations.get("storageclass.kubernetes.io/is-default-class") == "true",
        binding=found.get("volumeBindingMode", "Immediate"),
    )


def _claim(found: Json) -> Claim:
    status = found.get("status") or {}
    asked = found["spec"].get("resources", {}).get("requests", {}).get("storage", "")
    return Claim(
        name=found["metadata"]["name"],
        phase=status.get("phase", ""),
        modes=tuple(status.get("accessModes") or found["spec"].get("accessModes") or ()),
        size=(status.get("capacity") or {}).get("storage", asked),
        storage_class=found["spec"].get("storageClassName") or "",
    )


# ---- what follows


def as_target(found: Probe, *, context: str | None = None, kubeconfig: str | None = None) -> dict[str, object]:
    """Keys of a target for it; `output` only where a volume for it is there."""
    volume = next((claim.name for claim in found.claims if claim.shared and claim.phase == "Bound"), None)
    keys = {
        "backend": "openshift" if found.openshift else "kubernetes",
        "context": context,
        "kubeconfig": kubeconfig,
        "namespace": found.namespace,
        "output": f"pvc://{volume}/runs" if volume else None,
        "queue": found.queues[0].name if len(found.queues) == 1 else None,
        **_of_nodes(found.nodes),
    }
    return {key: value for key, value in keys.items() if value}


def _of_nodes(nodes: Sequence[Node]) -> dict[str, object]:
    """From those that most GPUs are on; slices, of which a GPU has up to seven, only where there are no whole ones."""
    gpus: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        gpus[node.resource, node.way] += node.count
    if not gpus:
        return {}
    resource, way = max(gpus, key=lambda found: ("/mig-" not in found[0], gpus[found]))
    chosen = [node for node in nodes if (node.resource, node.way) == (resource, way)]
    taints = [taint for taint in chosen[0].taints if all(taint in node.taints for node in chosen)]
    return {
        "gpu_resource": resource if resource != "nvidia.com/gpu" else None,
        "gpu_label": way if way != WAYS[0] else None,
        "tolerations": list(map(_toleration, taints)),
    }


def _toleration(taint: str) -> dict[str, str]:
    left, _, effect = taint.rpartition(":")
    key, equal, value = left.partition("=")
    return {"key": key, **({"value": value} if equal else {"operator": "Exists"}), "effect": effect}


@dataclass(frozen=True)
class Subject:
    """Who a Role is for. kind: User, Group, ServiceAccount."""

    kind: str
    name: str


def policy(namespace: str, subject: Subject) -> str:
    """YAML for `kubectl apply`: a Role with the least rights, and the binding that gives it to somebody."""
    account = f"namespace: {json.dumps(namespace)}" if subject.kind == "ServiceAccount" else f"apiGroup: {_RBAC}"
    rules = "".join(map(_rule, ROLE))
    return f"""\
apiVersion: {_RBAC}/v1
kind: Role
metadata: {{name: cvlaunch, namespace: {json.dumps(namespace)}}}
rules:
{rules}---
apiVersion: {_RBAC}/v1
kind: RoleBinding
metadata: {{name: cvlaunch, namespace: {json.dumps(namespace)}}}
roleRef: {{apiGroup: {_RBAC}, kind: Role, name: cvlaunch}}
subjects:
  - {{kind: {subject.kind}, name: {json.dumps(subject.name)}, {account}}}
"""


def _rule(need: Need) -> str:
    group = need.group or '""'
    resources, verbs = ", ".join(need.resources), ", ".join(need.verbs)
    return f"  # {need.purpose}\n  - {{apiGroups: [{group}], resources: [{resources}], verbs: [{verbs}]}}\n"
