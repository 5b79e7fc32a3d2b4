"""The verbs of the API server, without HTTP: what is decoded, defaulted, checked, admitted and stored."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.services.kube.admission import admit_pod, check_count_quota, quality_of_service, violations
from tests.services.kube.answers import ApiError, Causes, bad_request, conflict, invalid, not_found
from tests.services.kube.defaults import apply_defaults, pod_template_of
from tests.services.kube.objects import Json, Key, Store, grace_of, labels_match, parse_selector
from tests.services.kube.patches import patched
from tests.services.kube.resources import CORE, Resource
from tests.services.kube.rules import check_object, check_update
from tests.services.kube.schema import decode, required_fields

__all__ = ["QUEUE_LABEL", "Api", "Denial", "Query", "field_selector"]

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_ORPHANED = (
    "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set "
    "propagationPolicy=Orphan to suppress this warning"
)
Query = Mapping[str, str]
_NO_QUERY: Query = {}


@dataclass
class Denial:
    """An admission webhook's no. times: how often it is still said; None: for ever."""

    message: str
    plural: str
    webhook: str
    code: int
    times: int | None = None


@dataclass
class Api:
    """sidecars: containers that a service mesh puts before those of pods. manages_all: Kueue takes Jobs that ask for no
    queue, too (manageJobsWithoutQueueName)."""

    store: Store
    posted: dict[Key, Json] = field(default_factory=dict)
    denials: list[Denial] = field(default_factory=list)
    sidecars: list[Json] = field(default_factory=list)
    manages_all: bool = False

    # -- create -------------------------------------------------------------------------------------------------------

    def create(
        self, resource: Resource, namespace: str, body: Any, *, version: str = "", query: Query = _NO_QUERY
    ) -> tuple[Json, list[str]]:
        """(the object, warnings). ApiError."""
        strict = query.get("fieldValidation", "Warn") == "Strict"
        obj, warnings = decode(resource, version or resource.versions[0], body, strict=strict)
        obj = copy.deepcopy(obj)
        meta = obj.setdefault("metadata", {})
        if resource.namespaced:
            self._namespace(resource, meta, namespace)
        if resource.name != "namespaces":
            obj.pop("status", None)
        if resource.name == "jobs" and "spec" in obj:
            self._ask_kueue(obj)
        if resource.name == "pods" and obj.get("spec", {}).get("containers"):
            self._inject(obj)
        with self.store.lock:
            obj = self._admitted(resource, obj)
            if query.get("dryRun"):
                return obj, warnings
            if resource.namespaced and not meta.get("name"):
                obj["metadata"].pop("name", None)
            made = self.store.create(resource, self._completed(resource, obj))
            key = (resource.name, meta.get("namespace", ""), made["metadata"]["name"])
            self.posted[key] = copy.deepcopy(body)
            if resource.name == "jobs":
                made = self._job_labels(key, made)
            if resource.name == "namespaces":
                self._furnish(key[2])
        return made, [*warnings, *self._security_warnings(resource, made)]

    def _namespace(self, resource: Resource, meta: Json, namespace: str) -> None:
        if meta.setdefault("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")

    def _ask_kueue(self, job: Json) -> None:
        """Its webhook: a LocalQueue `default` is that of all Jobs of the namespace that name none."""
        meta = job["metadata"]
        if QUEUE_LABEL not in meta.get("labels", {}) and self.store.get(("localqueues", meta["namespace"], "default")):
            meta.setdefault("labels", {})[QUEUE_LABEL] = "default"
        if QUEUE_LABEL in meta.get("labels", {}) or self.manages_all:
            job["spec"]["suspend"] = True

    def _inject(self, pod: Json) -> None:
        """As Istio's webhook, which labels of the pod keep out; the sidecar is the first, as with
        holdApplicationUntilProxyStarts."""
        if pod["metadata"].get("labels", {}).get("sidecar.istio.io/inject") != "false":
            pod["spec"]["containers"] = [*copy.deepcopy(self.sidecars), *pod["spec"]["containers"]]

    def _admitted(self, resource: Resource, obj: Json) -> Json:
        namespace = obj["metadata"].get("namespace", "")
        name = obj["metadata"].get("name", "")
        self._check_namespace(resource, namespace, name)
        self._complete(resource, obj, None)
        self._ask_webhooks(resource, obj)
        if resource.namespaced and resource.name != "events":
            if resource.name == "pods":
                obj = admit_pod(self.store, obj)
                self._complete(resource, obj, None)  # a LimitRange may have made it wrong
            check_count_quota(self.store, resource.name, obj)
        return obj

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        found = self.store.get(("namespaces", "", namespace))
        if found is None:
            raise not_found(CORE["namespaces"], namespace)
        if "deletionTimestamp" in found["metadata"]:
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            message = f'{resource.qualified} "{name}" is forbidden: {why}'
            raise ApiError(403, "Forbidden", message, {"name": name, "kind": resource.name})

    def _complete(self, resource: Resource, obj: Json, old: Json | None) -> None:
        """Defaults, then all that can be wrong. ApiError 422."""
        name, causes = obj["metadata"].get("name", ""), Causes()
        required_fields(resource, obj, causes)
        if causes.found:
            raise invalid(resource, name, causes)
        apply_defaults(resource.name, obj)
        check_object(resource.name, obj, causes)
        if old is not None:
            check_update(resource.name, old, obj, causes)
        if causes.found:
            raise invalid(resource, name, causes)

    def _ask_webhooks(self, resource: Resource, obj: Json) -> None:
        for denial in self.denials:
            if denial.plural == resource.name and denial.times != 0:
                denial.times = None if denial.times is None else denial.times - 1
                message = f'admission webhook "{denial.webhook}" denied the request: {denial.message}'
                raise ApiError(denial.code, "Forbidden" if denial.code == 403 else "BadRequest", message)

    def _completed(self, resource: Resource, obj: Json) -> Json:
        first_status: dict[str, Json] = {
            "pods": {"phase": "Pending"},
            "jobs": {},
            "namespaces": {"phase": "Active"},
            "persistentvolumeclaims": {"phase": "Pending"},
            "services": {"loadBalancer": {}},
        }
        if resource.name in first_status:
            obj.setdefault("status", first_status[resource.name])
        if resource.name == "pods":
            obj["status"]["qosClass"] = quality_of_service(obj["spec"])
        return obj

    def _furnish(self, namespace: str) -> None:
        """What controllers put into each namespace."""
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": namespace},
        }
        self.store.create(CORE["serviceaccounts"], account)
        meta = {"name": "kube-root-ca.crt", "namespace": namespace}
        authority = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"ca.crt": ""}}
        self.store.create(CORE["configmaps"], authority)

    def _job_labels(self, key: Key, job: Json) -> Json:
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]

        def mutate(obj: Json) -> None:
            labels = obj["spec"]["template"]["metadata"].setdefault("labels", {})
            for prefix in ("", "batch.kubernetes.io/"):
                labels[f"{prefix}controller-uid"], labels[f"{prefix}job-name"] = uid, name
            obj["spec"].setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})

        made = self.store.change(key, mutate)
        assert made is not None
        made["metadata"]["generation"] = 1
        return made

    def _security_warnings(self, resource: Resource, obj: Json) -> list[str]:
        template = pod_template_of(resource.name, obj)
        namespace = self.store.get(("namespaces", "", obj["metadata"].get("namespace", "")))
        level = (namespace or {"metadata": {}})["metadata"].get("labels", {}).get("pod-security.kubernetes.io/warn")
        found = violations(template["spec"], level) if level and template else []
        return [f'would violate PodSecurity "{level}:latest": {", ".join(found)}'] if found else []

    # -- read ---------------------------------------------------------------------------------------------------------

    def get(self, resource: Resource, namespace: str, name: str) -> Json:
        found = self.store.get((resource.name, namespace, name))
        if found is None:
            raise not_found(resource, name)
        return found

    def list(self, resource: Resource, namespace: str, query: Query) -> tuple[list[Json], Json]:
        """(objects, the list's metadata)."""
        found = self.selected(resource, namespace, query)
        meta: Json = {"resourceVersion": str(self.store.version)}
        if token := query.get("continue"):
            after = _opened(token)
            found = [obj for obj in found if _place(obj) > after]
        limit = int(query.get("limit") or 0)
        if limit and len(found) > limit:
            meta["continue"] = _sealed(_place(found[limit - 1]), self.store.version)
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                meta["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        return found, meta

    def selected(self, resource: Resource, namespace: str, query: Query) -> list[Json]:
        keep = self.selection(resource, query)
        return [obj for obj in self.store.list(resource.name, namespace) if keep(obj)]

    def selection(self, resource: Resource, query: Query) -> Callable[[Json], bool]:
        labels = parse_selector(query.get("labelSelector", ""))
        fields = field_selector(resource, query.get("fieldSelector", ""))
        return lambda obj: labels_match(obj, labels) and fields(obj)

    # -- change -------------------------------------------------------------------------------------------------------

    def replace(
        self, resource: Resource, key: Key, body: Any, *, version: str = "", sub: str = "", query: Query = _NO_QUERY
    ) -> tuple[Json, list[str]]:
        strict = query.get("fieldValidation", "Warn") == "Strict"
        with self.store.lock:
            old = self.get(resource, key[1], key[2])
            new, warnings = decode(resource, version or resource.versions[0], body, strict=strict)
            return self._store_update(resource, key, old, copy.deepcopy(new), sub), warnings

    def patch(
        self, resource: Resource, key: Key, form: str, body: bytes, *, sub: str = "", query: Query = _NO_QUERY
    ) -> tuple[Json, list[str]]:
        strict = query.get("fieldValidation", "Warn") == "Strict"
        with self.store.lock:
            old = self.store.get(key)
            if old is None and form == "application/apply-patch+yaml":
                return self.create(resource, key[1], json.loads(body), query=query)
            old = self.get(resource, key[1], key[2])
            new = patched(resource, old, form, body)
            new, warnings = decode(resource, resource.versions[0], new, strict=strict)
            return self._store_update(resource, key, old, copy.deepcopy(new), sub), warnings

    def _store_update(self, resource: Resource, key: Key, old: Json, new: Json, sub: str) -> Json:
        meta = new.setdefault("metadata", {})
        sent = meta.get("resourceVersion")
        if sent and sent != old["metadata"]["resourceVersion"]:
            raise conflict(resource, key[2])
        if meta.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            raise conflict(resource, key[2], "Precondition failed: UID in precondition")
        if meta.get("name", key[2]) != key[2]:
            raise bad_request(f"the name of the object ({meta['name']}) does not match the name on the URL ({key[2]})")
        for name in ("namespace", "name", "uid", "creationTimestamp", "generation", "deletionTimestamp",
                     "deletionGracePeriodSeconds", "generateName"):  # fmt: skip
            meta.pop(name, None)
            if name in old["metadata"]:
                meta[name] = old["metadata"][name]
        if sub == "status":
            return self.store.replace(key, {**old, "status": new.get("status", {})})
        if "status" in resource.subresources:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]
        self._complete(resource, new, old)
        return self.store.replace(key, new)

    # -- delete -------------------------------------------------------------------------------------------------------

    def delete(
        self, resource: Resource, namespace: str, name: str, *, options: Json, query: Query
    ) -> tuple[Json | None, list[str]]:
        """(what is left of it, or None; warnings)."""
        with self.store.lock:
            old = self.get(resource, namespace, name)
            _check_preconditions(resource, old, options.get("preconditions", {}))
            policy = options.get("propagationPolicy") or query.get("propagationPolicy")
            if policy not in (None, "Background", "Foreground", "Orphan"):
                raise bad_request(f'DeleteOptions is invalid: propagationPolicy: Unsupported value: "{policy}"')
            warnings = [_ORPHANED] if resource.name == "jobs" and not policy else []
            policy = policy or ("Orphan" if resource.name == "jobs" else "Background")
            wanted = options.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
            key = (resource.name, namespace, name)
            if resource.name in ("namespaces", "projects"):
                return self.delete_namespace(name), warnings
            grace = grace_of(key, old, None if wanted is None else int(wanted))
            return self.store.delete(key, propagation=policy, grace_s=grace), warnings

    def delete_namespace(self, name: str, *, force: bool = False) -> Json | None:
        """With all that is in it."""
        with self.store.lock:
            for plural, resource in CORE.items():
                for obj in self.store.list(plural, name) if resource.namespaced else ():
                    key = (plural, name, obj["metadata"]["name"])
                    left = self.store.delete(key, grace_s=0 if force else grace_of(key, obj))
                    if left and force:
                        for finalizer in left["metadata"].get("finalizers", ()):
                            self.store.clear_finalizer(key, finalizer)
            return self.store.delete(("namespaces", "", name))


def _check_preconditions(resource: Resource, old: Json, wanted: Json) -> None:
    for name in ("uid", "resourceVersion"):
        if name in wanted and wanted[name] != old["metadata"][name]:
            there = old["metadata"][name]
            why = f"Precondition failed: {name} in precondition: {wanted[name]}, {name} in object meta: {there}"
            raise conflict(resource, old["metadata"]["name"], why)


_FIELDS = {
    "pods": ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "status.phase",
             "status.podIP", "status.nominatedNodeName"),
    "jobs": ("status.successful",),
    "events": ("involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
               "involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
               "reportingComponent", "source", "type"),
    "namespaces": ("status.phase",),
    "nodes": ("spec.unschedulable",),
    "secrets": ("type",),
}  # fmt: skip


def field_selector(resource: Resource, text: str) -> Callable[[Json], bool]:
    """ApiError 400 for a field that the server has no index of."""
    wanted = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([\w.]+)(==|=|!=)(.*)", part.strip())
        if not match:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{part}'")
        if match[1] not in ("metadata.name", "metadata.namespace", *_FIELDS.get(resource.name, ())):
            raise bad_request(f"field label not supported: {match[1]}")
        wanted.append((match[1], match[2] != "!=", match[3]))
    return lambda obj: all((_field(obj, path) == value) == equal for path, equal, value in wanted)


def _field(obj: Json, path: str) -> str:
    if path == "source":
        path = "source.component"
    value: Any = obj
    for key in path.split("."):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return "" if value == {} else str(value)


def _place(obj: Json) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _sealed(place: tuple[str, str], version: int) -> str:
    return base64.urlsafe_b64encode(
        json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": place}).encode()
    ).decode()


def _opened(token: str) -> tuple[str, str]:
    try:
        namespace, name = json.loads(base64.urlsafe_b64decode(token))["start"]
    except (ValueError, KeyError, binascii.Error):
        raise bad_request("continue key is not valid: unknown") from None
    return namespace, name
