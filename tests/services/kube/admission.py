"""What stands between a pod that is well-formed and its creation: service account, pod security, OpenShift's
constraints, limits and quotas, each with the words of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from tests.services.kube.answers import forbidden
from tests.services.kube.objects import Store
from tests.services.kube.resources import CORE
from tests.services.kube.times import parse_quantity, random_suffix, whole

__all__ = ["UID_RANGE", "admit_pod", "check_count_quota", "pod_requests", "quality_of_service", "violations"]

Json = dict[str, Any]

UID_RANGE = "openshift.io/sa.scc.uid-range"
"""Annotation of an OpenShift namespace: `1000650000/10000`."""

_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
_ACCOUNT_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def admit_pod(store: Store, pod: Json) -> Json:
    """The pod as it is stored. ApiError 403."""
    namespace = store.get(("namespaces", "", pod["metadata"]["namespace"]))
    assert namespace is not None
    _service_account(store, pod)
    _priority(store, pod)
    _limit_ranges(store, pod)
    if UID_RANGE in namespace["metadata"].get("annotations", {}):
        _scc(namespace, pod)
    _pod_security(namespace, pod)
    _pod_quota(store, pod)
    return pod


def _name(pod: Json) -> str:
    name: str = pod["metadata"].get("name") or pod["metadata"]["generateName"]
    return name


def _no(pod: Json, why: str) -> Exception:
    return forbidden(CORE["pods"], _name(pod), why)


def _service_account(store: Store, pod: Json) -> None:
    spec, namespace = pod["spec"], pod["metadata"]["namespace"]
    name = spec.setdefault("serviceAccountName", "default")
    spec["serviceAccount"] = name
    account = store.get(("serviceaccounts", namespace, name))
    if account is None:
        raise _no(pod, f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found')
    automount = spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
    mounted = {m["mountPath"] for c in spec["containers"] for m in c.get("volumeMounts", ())}
    if automount and _ACCOUNT_FOLDER not in mounted:
        _mount_token(spec)


def _mount_token(spec: Json) -> None:
    name = f"kube-api-access-{random_suffix()}"
    sources = [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]
            }
        },
    ]
    spec["volumes"] = [*spec.get("volumes", ()), {"name": name, "projected": {"defaultMode": 420, "sources": sources}}]
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        mount = {"name": name, "readOnly": True, "mountPath": _ACCOUNT_FOLDER}
        container["volumeMounts"] = [*container.get("volumeMounts", ()), mount]


def _priority(store: Store, pod: Json) -> None:
    name = pod["spec"].get("priorityClassName")
    if not name:
        pod["spec"].setdefault("priority", 0)
        return
    found = store.get(("priorityclasses", "", name))
    if found is None:
        raise _no(pod, f"no PriorityClass with name {name} was found")
    pod["spec"]["priority"] = found["value"]


def _limit_ranges(store: Store, pod: Json) -> None:
    for limits in store.list("limitranges", pod["metadata"]["namespace"]):
        for limit in limits["spec"]["limits"]:
            for container in pod["spec"]["containers"] if limit["type"] == "Container" else ():
                _limit(pod, container, limit)


def _limit(pod: Json, container: Json, limit: Json) -> None:
    resources = container["resources"]
    resources["limits"] = {**limit.get("default", {}), **resources.get("limits", {})}
    requests = {**limit.get("default", {}), **limit.get("defaultRequest", {}), **resources.get("requests", {})}
    resources["requests"] = requests
    for name, most in limit.get("max", {}).items():
        value = resources["limits"].get(name)
        if value is not None and parse_quantity(value) > parse_quantity(most):
            raise _no(pod, f"maximum {name} usage per Container is {most}, but limit is {value}")


# -- pod security -----------------------------------------------------------------------------------------------------


def _pod_security(namespace: Json, pod: Json) -> None:
    level = namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce", "privileged")
    if level != "privileged" and (found := violations(pod["spec"], level)):
        raise _no(pod, f'violates PodSecurity "{level}:latest": {", ".join(found)}')


def violations(spec: Json, level: str) -> list[str]:
    """Of the Pod Security Standards `baseline` or `restricted`."""
    found = list(_baseline(spec))
    if level == "restricted":
        found += _restricted(spec)
    return found


def _containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def _named(names: list[str]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"container{'s' if len(names) > 1 else ''} {quoted}"


def _baseline(spec: Json) -> Iterator[str]:
    hosts = [f"{field}=true" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    if hosts:
        yield f"host namespaces ({', '.join(hosts)})"
    paths = [volume["name"] for volume in spec.get("volumes", ()) if "hostPath" in volume]
    if paths:
        names = ", ".join(f'"{name}"' for name in paths)
        yield f"hostPath volumes (volume{'s' if len(paths) > 1 else ''} {names})"
    privileged = [c["name"] for c in _containers(spec) if c.get("securityContext", {}).get("privileged")]
    if privileged:
        yield f"privileged ({_named(privileged)} must not set securityContext.privileged=true)"


def _restricted(spec: Json) -> Iterator[str]:
    pod, containers = spec.get("securityContext", {}), _containers(spec)
    contexts = {c["name"]: c.get("securityContext", {}) for c in containers}
    if names := [n for n, c in contexts.items() if c.get("allowPrivilegeEscalation") is not False]:
        yield (
            "allowPrivilegeEscalation != false "
            f"({_named(names)} must set securityContext.allowPrivilegeEscalation=false)"
        )
    if names := [n for n, c in contexts.items() if "ALL" not in c.get("capabilities", {}).get("drop", [])]:
        yield f'unrestricted capabilities ({_named(names)} must set securityContext.capabilities.drop=["ALL"])'
    wrong = [v["name"] for v in spec.get("volumes", ()) if not any(kind in v for kind in _VOLUMES)]
    if wrong:
        yield f"restricted volume types (volumes {wrong} use restricted volume types)"
    if names := [n for n, c in contexts.items() if c.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True]:
        yield f"runAsNonRoot != true (pod or {_named(names)} must set securityContext.runAsNonRoot=true)"
    roots = [n for n, c in contexts.items() if c.get("runAsUser") == 0]
    if pod.get("runAsUser") == 0:
        yield "runAsUser=0 (pod must not set runAsUser=0)"
    elif roots:
        yield f"runAsUser=0 ({_named(roots)} must not set runAsUser=0)"
    profiles = {n: c.get("seccompProfile", pod.get("seccompProfile", {})).get("type") for n, c in contexts.items()}
    if names := [n for n, kind in profiles.items() if kind not in ("RuntimeDefault", "Localhost")]:
        words = 'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        yield f"seccompProfile (pod or {_named(names)} must set {words})"


def _scc(namespace: Json, pod: Json) -> None:
    """restricted-v2: gives what the pod leaves out, and refuses what is outside of the namespace's range."""
    first, _, count = namespace["metadata"]["annotations"][UID_RANGE].partition("/")
    low, high = int(first), int(first) + int(count) - 1
    spec, problems = pod["spec"], list(_scc_problems(pod["spec"], low, high))
    if problems:
        told = ", ".join(f"provider restricted-v2: {problem}" for problem in problems)
        first_words = 'provider "anyuid": Forbidden: not usable by user or serviceaccount'
        last = 'provider "privileged": Forbidden: not usable by user or serviceaccount'
        raise _no(pod, f"unable to validate against any security context constraint: [{first_words}, {told}, {last}]")
    context = spec["securityContext"]
    context.setdefault("fsGroup", low)
    context.setdefault("seLinuxOptions", {"level": "s0:c26,c5"})
    context.setdefault("seccompProfile", {"type": "RuntimeDefault"})
    for container in _containers(spec):
        own = container.setdefault("securityContext", {})
        own.setdefault("runAsUser", context.get("runAsUser", low))
        own.setdefault("allowPrivilegeEscalation", False)
        own.setdefault("runAsNonRoot", True)
        capabilities = own.setdefault("capabilities", {})
        capabilities["drop"] = capabilities.get("drop") or ["ALL"]
    annotations = pod["metadata"].setdefault("annotations", {})
    annotations["openshift.io/scc"] = "restricted-v2"
    annotations.setdefault("seccomp.security.alpha.kubernetes.io/pod", "runtime/default")


def _scc_problems(spec: Json, low: int, high: int) -> Iterator[str]:
    group = spec["securityContext"].get("fsGroup", low)
    if group != low:
        yield f".spec.securityContext.fsGroup: Invalid value: []int64{{{group}}}: {group} is not an allowed group"
    kinds = [(v["name"], kind) for v in spec.get("volumes", ()) for kind in v if kind != "name"]
    for index, (_, kind) in enumerate(kinds):
        if kind not in _VOLUMES:
            yield f'spec.volumes[{index}]: Invalid value: "{kind}": {kind} volumes are not allowed to be used'
    for index, container in enumerate(spec["containers"]):
        own = container.get("securityContext", {})
        user = own.get("runAsUser", spec["securityContext"].get("runAsUser", low))
        if not low <= user <= high:
            yield f".containers[{index}].runAsUser: Invalid value: {user}: must be in the ranges: [{low}, {high}]"
        if own.get("privileged"):
            yield f".containers[{index}].privileged: Invalid value: true: Privileged containers are not allowed"
        for capability in own.get("capabilities", {}).get("add", ()):
            if capability != "NET_BIND_SERVICE":
                at = f".containers[{index}].capabilities.add"
                yield f'{at}: Invalid value: "{capability}": capability may not be added'


# -- quota ------------------------------------------------------------------------------------------------------------


def pod_requests(spec: Json) -> dict[str, Decimal]:
    """What the pod asks a node for, by resource."""
    found: dict[str, Decimal] = {}
    for container in spec["containers"]:
        for name, value in container["resources"].get("requests", {}).items():
            found[name] = found.get(name, Decimal(0)) + parse_quantity(value)
    return found


def quality_of_service(spec: Json) -> str:
    asked = [container["resources"] for container in spec["containers"]]
    if not any(resources.get("limits") or resources.get("requests") for resources in asked):
        return "BestEffort"
    both = all(
        name in resources.get("limits", {}) and resources["requests"].get(name) == resources["limits"][name]
        for resources in asked
        for name in ("cpu", "memory")
    )
    return "Guaranteed" if both else "Burstable"


def _usage(spec: Json) -> dict[str, Decimal]:
    """As quotas count it."""
    found = {"pods": Decimal(1), "count/pods": Decimal(1)}
    for name, value in pod_requests(spec).items():
        found[f"requests.{name}"] = value
        if "/" not in name:
            found[name] = value
    for container in spec["containers"]:
        for name, value in container["resources"].get("limits", {}).items():
            key = f"limits.{name}"
            found[key] = found.get(key, Decimal(0)) + parse_quantity(value)
    return found


def _alive(pod: Json) -> bool:
    return pod["status"].get("phase") not in ("Succeeded", "Failed")


def _pod_quota(store: Store, pod: Json) -> None:
    asked = _usage(pod["spec"])
    others = [_usage(p["spec"]) for p in store.list("pods", pod["metadata"]["namespace"]) if _alive(p)]
    for quota in store.list("resourcequotas", pod["metadata"]["namespace"]):
        hard = quota["spec"].get("hard", {})
        _must_specify(quota, pod, hard)
        over = []
        for name in hard:
            used = sum((other.get(name, Decimal(0)) for other in others), Decimal(0))
            if name in asked and used + asked[name] > parse_quantity(hard[name]):
                over.append((name, asked[name], used, hard[name]))
        _exceeded(quota, pod, over)


def _must_specify(quota: Json, pod: Json, hard: Json) -> None:
    missing: dict[str, list[str]] = {}
    for name in hard:
        kind, _, resource = (
            name.rpartition(".") if name.startswith(("limits.", "requests.")) else ("requests", "", name)
        )
        if resource not in ("cpu", "memory") or "/" in name:
            continue
        lacking = [c["name"] for c in pod["spec"]["containers"] if resource not in c["resources"].get(kind, {})]
        if lacking:
            missing[name] = lacking
    if missing:
        told = "; ".join(f"{name} for: {','.join(names)}" for name, names in sorted(missing.items()))
        raise _no(pod, f"failed quota: {quota['metadata']['name']}: must specify {told}")


def _exceeded(quota: Json, obj: Json, over: list[tuple[str, Decimal, Decimal, str]], plural: str = "pods") -> None:
    if not over:
        return
    requested = ",".join(f"{name}={_shown(name, value)}" for name, value, _, _ in over)
    used = ",".join(f"{name}={_shown(name, value)}" for name, _, value, _ in over)
    limited = ",".join(f"{name}={value}" for name, _, _, value in over)
    why = f"exceeded quota: {quota['metadata']['name']}, requested: {requested}, used: {used}, limited: {limited}"
    raise forbidden(CORE[plural], _name(obj), why)


def _shown(name: str, value: Decimal) -> str:
    if name.endswith("memory") and value % 2**20 == 0 and value:
        mebibytes = int(value / 2**20)
        return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"
    return str(int(value)) if value % 1 == 0 else f"{whole(value * 1000)}m"


def check_count_quota(store: Store, plural: str, obj: Json) -> None:
    """Quotas on the number of objects: `count/jobs.batch`, `secrets`."""
    namespace = obj["metadata"]["namespace"]
    for quota in store.list("resourcequotas", namespace):
        for name in (f"count/{CORE[plural].qualified}", plural):
            most = quota["spec"].get("hard", {}).get(name)
            used = Decimal(len(store.list(plural, namespace)))
            if most is not None and used + 1 > parse_quantity(most):
                _exceeded(quota, obj, [(name, Decimal(1), used, most)], plural)
