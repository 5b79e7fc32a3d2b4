"""The objects of the cluster: versions, deletion, garbage collection, selectors, pages."""

from __future__ import annotations

import copy
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.services.kube.answers import already_exists, bad_request
from tests.services.kube.resources import CORE, Resource
from tests.services.kube.times import now, random_suffix, stamp

__all__ = ["Change", "Json", "Key", "Store", "controller_of", "key_of", "labels_match", "parse_selector"]

Json = dict[str, Any]
Key = tuple[str, str, str]
"""(plural, namespace or "", name)"""

Listener = Callable[[str, Key, Json], None]
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


@dataclass(frozen=True)
class Change:
    """kind: ADDED, MODIFIED or DELETED."""

    version: int
    kind: str
    key: Key
    obj: Json


class Store:
    """Objects in it are never changed, only replaced: whoever reads one may keep it. `lock` may be held over several
    calls; it is also the condition that every change notifies. event_names: (uid, reason, message) → event."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.version = 1000
        self.history: deque[Change] = deque(maxlen=20_000)
        self._objects: dict[str, dict[tuple[str, str], Json]] = {name: {} for name in CORE}
        self._dependents: dict[str, set[Key]] = {}
        self._uids: dict[str, Key] = {}
        self._listeners: list[Listener] = []
        self.event_names: dict[tuple[str, str, str], str] = {}

    def listen(self, listener: Listener) -> None:
        """Called at every change with (kind, key, object), with the lock held: it must be quick."""
        self._listeners.append(listener)

    def get(self, key: Key) -> Json | None:
        with self.lock:
            return self._objects[key[0]].get(key[1:])

    def list(self, plural: str, namespace: str = "") -> list[Json]:
        """In the order of names; all namespaces if empty."""
        with self.lock:
            found = [(key, obj) for key, obj in self._objects[plural].items() if not namespace or key[0] == namespace]
        return [obj for _, obj in sorted(found, key=lambda item: item[0])]

    def has_uid(self, uid: str) -> bool:
        return uid in self._uids

    def create(self, resource: Resource, obj: Json) -> Json:
        """Gives it uid, version and time. ApiError 409 if there is one of that name."""
        with self.lock:
            meta = {**obj.get("metadata", {})}
            if not meta.get("name"):
                meta["name"] = meta["generateName"][:58] + random_suffix()
            key = (resource.name, meta.get("namespace", ""), meta["name"])
            if key[1:] in self._objects[resource.name]:
                raise already_exists(resource, meta["name"])
            meta.update(uid=str(uuid.uuid4()), creationTimestamp=now())
            if "spec" in obj:
                meta["generation"] = 1
            for gone in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"):
                meta.pop(gone, None)
            return self._put("ADDED", key, {**obj, "metadata": meta})

    def replace(self, key: Key, obj: Json) -> Json:
        """The new state of an object that is there. Goes at once if its deletion waited only for what is now gone."""
        with self.lock:
            old = self._objects[key[0]][key[1:]]
            if _same(old, obj):
                return old
            meta = {**obj["metadata"]}
            if "generation" in meta and old.get("spec") != obj.get("spec"):
                meta["generation"] += 1
            new = {**obj, "metadata": meta}
            if meta.get("deletionTimestamp") and not meta.get("finalizers") and not _graceful(key, new):
                self._remove(key, new)
                return new
            return self._put("MODIFIED", key, new)

    def change(self, key: Key, mutate: Callable[[Json], None], *, uid: str | None = None) -> Json | None:
        """Replaces it by a copy that `mutate` has changed. None if it is gone (or is another one than `uid`)."""
        with self.lock:
            old = self.get(key)
            if old is None or (uid and old["metadata"]["uid"] != uid):
                return None
            obj = copy.deepcopy(old)
            mutate(obj)
            return self.replace(key, obj)

    def delete(self, key: Key, *, propagation: str = "Background", grace_s: int = 0) -> Json | None:
        """What is left of it: the object with its deletionTimestamp, or None if it is gone.

        grace_s: for a pod that runs: the kubelet removes it when its containers have ended.
        """
        with self.lock:
            obj = self._objects[key[0]].get(key[1:])
            if obj is None:
                return None
            meta = {**obj["metadata"]}
            finalizers = [name for name in meta.get("finalizers", []) if name not in (FOREGROUND, ORPHAN)]
            if propagation == "Orphan":
                self._orphan(meta["uid"])
            if propagation == "Foreground" and self._dependents.get(meta["uid"]):
                finalizers.append(FOREGROUND)
            meta["finalizers"] = finalizers
            if not finalizers:
                meta.pop("finalizers")
            earlier = meta.get("deletionGracePeriodSeconds")
            grace = grace_s if earlier is None else min(grace_s, earlier)
            if "deletionTimestamp" not in meta or grace != earlier:
                meta["deletionTimestamp"] = stamp(time.time() + grace)
                meta["deletionGracePeriodSeconds"] = grace
            if not finalizers and not (key[0] == "pods" and grace):
                self._remove(key, {**obj, "metadata": meta})
                return None
            left = self._put("MODIFIED", key, {**obj, "metadata": meta})
            if propagation == "Foreground":
                self._delete_dependents(meta["uid"], "Foreground")
            return left

    def finish_pod(self, key: Key, uid: str) -> None:
        """The kubelet's word that nothing of a deleted pod runs any more."""
        with self.lock:
            obj = self.get(key)
            if obj and obj["metadata"]["uid"] == uid and obj["metadata"].get("deletionGracePeriodSeconds"):
                self.delete(key, grace_s=0)

    def clear_finalizer(self, key: Key, name: str) -> None:
        def mutate(obj: Json) -> None:
            left = [other for other in obj["metadata"].get("finalizers", []) if other != name]
            obj["metadata"]["finalizers"] = left
            if not left:
                obj["metadata"].pop("finalizers")

        self.change(key, mutate)

    def dependents(self, uid: str) -> list[Key]:
        with self.lock:
            return sorted(self._dependents.get(uid, ()))

    def _put(self, kind: str, key: Key, obj: Json) -> Json:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        if old := self._objects[key[0]].get(key[1:]):
            self._unlink(key, old)
        self._objects[key[0]][key[1:]] = obj
        self._uids[obj["metadata"]["uid"]] = key
        for reference in obj["metadata"].get("ownerReferences", ()):
            self._dependents.setdefault(reference["uid"], set()).add(key)
        self._tell(kind, key, obj)
        return obj

    def _tell(self, kind: str, key: Key, obj: Json) -> None:
        self.history.append(Change(self.version, kind, key, obj))
        for listener in self._listeners:
            listener(kind, key, obj)
        self.lock.notify_all()

    def _unlink(self, key: Key, obj: Json) -> None:
        for reference in obj["metadata"].get("ownerReferences", ()):
            self._dependents.get(reference["uid"], set()).discard(key)

    def _remove(self, key: Key, obj: Json) -> None:
        self._objects[key[0]].pop(key[1:], None)
        self._uids.pop(obj["metadata"]["uid"], None)
        self._unlink(key, obj)
        self.version += 1
        self._tell("DELETED", key, {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}})
        self._delete_dependents(obj["metadata"]["uid"], "Background")
        for reference in obj["metadata"].get("ownerReferences", ()):
            owner = self._uids.get(reference["uid"])
            if owner and not self._dependents.get(reference["uid"]):
                self._end_foreground(owner)

    def _end_foreground(self, key: Key) -> None:
        obj = self._objects[key[0]][key[1:]]
        if FOREGROUND in obj["metadata"].get("finalizers", ()):
            self.clear_finalizer(key, FOREGROUND)

    def _delete_dependents(self, uid: str, propagation: str) -> None:
        for key in sorted(self._dependents.get(uid, ())):
            obj = self.get(key)
            if obj and not any(self.has_uid(r["uid"]) for r in obj["metadata"]["ownerReferences"] if r["uid"] != uid):
                self.delete(key, propagation=propagation, grace_s=grace_of(key, obj))

    def _orphan(self, uid: str) -> None:
        def mutate(obj: Json) -> None:
            meta = obj["metadata"]
            meta["ownerReferences"] = [r for r in meta["ownerReferences"] if r["uid"] != uid]
            if not meta["ownerReferences"]:
                meta.pop("ownerReferences")

        for key in sorted(self._dependents.get(uid, ())):
            self.change(key, mutate)


def grace_of(key: Key, obj: Json, wanted: int | None = None) -> int:
    """Seconds that a deleted object stays for: only pods on a node have any."""
    if key[0] != "pods" or not obj["spec"].get("nodeName") or obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    default: int = obj["spec"].get("terminationGracePeriodSeconds", 30)
    return default if wanted is None else wanted


def key_of(obj: Json, plural: str) -> Key:
    return (plural, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def controller_of(obj: Json) -> Json:
    """Its ownerReference with controller: true; {} if it has none."""
    references: list[Json] = obj["metadata"].get("ownerReferences", [])
    return next((r for r in references if r.get("controller")), {})


def _graceful(key: Key, obj: Json) -> bool:
    return key[0] == "pods" and bool(obj["metadata"].get("deletionGracePeriodSeconds"))


def _same(old: Json, new: Json) -> bool:
    if {k: v for k, v in old.items() if k != "metadata"} != {k: v for k, v in new.items() if k != "metadata"}:
        return False
    without = ("resourceVersion", "generation")
    return {k: v for k, v in old["metadata"].items() if k not in without} == {
        k: v for k, v in new["metadata"].items() if k not in without
    }


_REQUIREMENT = re.compile(
    r"(?P<no>!)?(?P<key>[\w./-]+)\s*(?:(?P<op>==|=|!=)\s*(?P<value>[\w.-]*)|\s(?P<set>in|notin)\s*\((?P<values>[^)]*)\))?"
)

Requirement = Callable[[Mapping[str, str]], bool]


def parse_selector(text: str) -> list[Requirement]:
    """Of labels: `a=b,c!=d,e in (x,y),f,!g`. ApiError 400 if it can't be read."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return [_requirement(part, text) for part in parts]


def _requirement(part: str, text: str) -> Requirement:
    match = _REQUIREMENT.fullmatch(part)
    if not match:
        raise bad_request(f"unable to parse requirement: {text!r}")
    key, value, operator = match["key"], match["value"], match["op"] or match["set"] or ""
    values = {word.strip() for word in (match["values"] or "").split(",")}
    checks: dict[str, Requirement] = {
        "=": lambda labels: labels.get(key) == value,
        "==": lambda labels: labels.get(key) == value,
        "!=": lambda labels: labels.get(key) != value,
        "in": lambda labels: labels.get(key) in values,
        "notin": lambda labels: labels.get(key) not in values,
        "": lambda labels: (key in labels) != bool(match["no"]),
    }
    return checks[operator]


def labels_match(obj: Json, requirements: Iterable[Requirement]) -> bool:
    labels = obj["metadata"].get("labels", {})
    return all(requirement(labels) for requirement in requirements)


def watch_changes(store: Store, since: int) -> Iterator[Change]:
    """Those after that version."""
    with store.lock:
        yield from [change for change in store.history if change.version > since]
