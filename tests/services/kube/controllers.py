"""One thread for what the controller manager does: jobs, scheduling, claims, queues, garbage."""

from __future__ import annotations

import hashlib
import heapq
import shutil
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.services.kube.api import QUEUE_LABEL, Api
from tests.services.kube.events import record
from tests.services.kube.jobs import FINALIZER, Jobs
from tests.services.kube.objects import Key, controller_of, grace_of
from tests.services.kube.resources import CORE
from tests.services.kube.scheduler import schedule
from tests.services.kube.times import now

__all__ = ["DEFAULT_CLASS", "Controllers", "workload_name"]

Json = dict[str, Any]

DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_CLUSTER_QUEUE = "cluster-queue"


class Controllers:
    """Wakes at every change of an object that it answers for, and when a time has come.

    volumes: where the folders of persistent volumes are made.
    """

    def __init__(self, api: Api, volumes: Path) -> None:
        self._api, self._store, self._volumes = api, api.store, volumes
        self._jobs = Jobs(api, self._later)
        self._dirty: dict[Key, None] = {}
        self._timers: list[tuple[float, Key]] = []
        self._schedule = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kube-controllers", daemon=True)

    def start(self) -> None:
        self._store.listen(self._heard)
        self._thread.start()

    def close(self) -> None:
        with self._store.lock:
            self._closed = True
            self._store.lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(10)

    def _later(self, key: Key, seconds: float) -> None:
        heapq.heappush(self._timers, (time.monotonic() + max(0.001, seconds), key))

    def _heard(self, kind: str, key: Key, obj: Json) -> None:
        if key[0] in ("jobs", "persistentvolumeclaims", "localqueues", "workloads"):
            self._dirty[key] = None
        if key[0] == "pods":
            owner = controller_of(obj)
            if owner.get("kind") == "Job":
                self._dirty["jobs", key[1], owner["name"]] = None
            self._dirty[key] = None
        if key[0] in ("pods", "nodes", "persistentvolumeclaims"):
            self._schedule = True
        if key[0] == "storageclasses":
            for claim in self._store.list("persistentvolumeclaims"):
                self._dirty["persistentvolumeclaims", claim["metadata"]["namespace"], claim["metadata"]["name"]] = None
        if kind == "ADDED" and obj["metadata"].get("ownerReferences"):
            self._dirty[key] = None

    def _run(self) -> None:
        while True:
            with self._store.lock:
                while not (self._closed or self._dirty or self._schedule):
                    self._store.lock.wait(self._pause())
                    self._ring()
                if self._closed:
                    return
                keys, self._dirty = list(self._dirty), {}
                again, self._schedule = self._schedule, False
            for key in keys:
                self._guarded(key)
            if again:
                schedule(self._store)

    def _pause(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _ring(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._dirty[heapq.heappop(self._timers)[1]] = None

    def _guarded(self, key: Key) -> None:
        try:
            self._sync(key)
        except Exception:
            traceback.print_exc()

    def _sync(self, key: Key) -> None:
        self._collect(key)
        if key[0] == "jobs":
            self._queue(key)
            self._jobs.sync(key)
        elif key[0] == "persistentvolumeclaims":
            self._claim(key)
        elif key[0] == "pods":
            self._pod(key)
        elif key[0] == "localqueues":
            for job in self._store.list("jobs", key[1]):
                self._queue(("jobs", key[1], job["metadata"]["name"]))

    def _collect(self, key: Key) -> None:
        """What belongs to nobody who is still there."""
        with self._store.lock:
            obj = self._store.get(key)
            owners = obj["metadata"].get("ownerReferences", []) if obj else []
            if owners and not any(self._store.has_uid(owner["uid"]) for owner in owners):
                self._store.delete(key, grace_s=grace_of(key, obj))

    def _pod(self, key: Key) -> None:
        """Pods that were deleted before they had a node end as failed, so that their job can count them; pods of a
        node that is gone fail."""
        with self._store.lock:
            pod = self._store.get(key)
            if pod is None or pod["status"].get("phase") in ("Succeeded", "Failed"):
                if (
                    pod
                    and "deletionTimestamp" in pod["metadata"]
                    and FINALIZER in pod["metadata"].get("finalizers", ())
                ):
                    self._drop_stray_finalizer(pod, key)
                return
            if "deletionTimestamp" in pod["metadata"] and not pod["spec"].get("nodeName"):
                self._store.change(key, lambda pod: pod["status"].update(phase="Failed"))

    def _drop_stray_finalizer(self, pod: Json, key: Key) -> None:
        owner = controller_of(pod)
        job = self._store.get(("jobs", key[1], owner.get("name", "")))
        if job is None or job["metadata"]["uid"] != owner.get("uid"):
            self._store.clear_finalizer(key, FINALIZER)

    # -- claims -------------------------------------------------------------------------------------------------------

    def _claim(self, key: Key) -> None:
        with self._store.lock:
            claim = self._store.get(key)
            if claim is None:
                self._reclaim(key)
            if claim is None or claim["status"].get("phase") == "Bound" or "deletionTimestamp" in claim["metadata"]:
                return
            classes = {c["metadata"]["name"]: c for c in self._store.list("storageclasses")}
            name = claim["spec"].get("storageClassName") or next(
                (n for n, c in classes.items() if c["metadata"].get("annotations", {}).get(DEFAULT_CLASS) == "true"), ""
            )
            if name not in classes:
                self._unbound(claim, name)
            elif classes[name]["provisioner"] == "kubernetes.io/no-provisioner":
                message = "waiting for a volume to be created, either by external provisioner or manually"
                record(self._store, claim, "ExternalProvisioning", message, source="persistentvolume-controller")
            else:
                self._bind(key, claim, name)

    def _reclaim(self, key: Key) -> None:
        """A volume goes with its claim, with all that is in it."""
        for volume in self._store.list("persistentvolumes"):
            claim = volume["spec"].get("claimRef", {})
            if (claim.get("namespace"), claim.get("name")) == key[1:]:
                self._store.delete(("persistentvolumes", "", volume["metadata"]["name"]))
                shutil.rmtree(volume["spec"]["hostPath"]["path"], ignore_errors=True)

    def _unbound(self, claim: Json, name: str) -> None:
        message = f'storageclass.storage.k8s.io "{name}" not found'
        if not name:
            message = "no persistent volumes available for this claim and no storage class is set"
        reason = "ProvisioningFailed" if name else "FailedBinding"
        record(self._store, claim, reason, message, warning=bool(name), source="persistentvolume-controller")

    def _bind(self, key: Key, claim: Json, storage_class: str) -> None:
        name = f"pvc-{claim['metadata']['uid']}"
        folder = self._volumes / name
        folder.mkdir(parents=True, exist_ok=True)
        capacity, modes = {"storage": claim["spec"]["resources"]["requests"]["storage"]}, claim["spec"]["accessModes"]
        self._store.create(
            CORE["persistentvolumes"],
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "accessModes": modes,
                    "capacity": capacity,
                    "claimRef": {"kind": "PersistentVolumeClaim", "namespace": key[1], "name": key[2]},
                    "hostPath": {"path": str(folder)},
                    "persistentVolumeReclaimPolicy": "Delete",
                    "storageClassName": storage_class,
                },
                "status": {"phase": "Bound"},
            },
        )

        def mutate(obj: Json) -> None:
            obj["spec"].update(volumeName=name, storageClassName=storage_class)
            obj["status"] = {"phase": "Bound", "accessModes": modes, "capacity": capacity}

        self._store.change(key, mutate)

    # -- queues -------------------------------------------------------------------------------------------------------

    def _queue(self, key: Key) -> None:
        """Kueue's reconciler: a Workload for each job of a queue."""
        with self._store.lock:
            job = self._store.get(key)
            name = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "") if job else ""
            if job is None or not (name or self._api.manages_all):
                return
            known = self._store.get(("localqueues", key[1], name)) is not None
            place = ("workloads", key[1], workload_name(job))
            if self._store.get(place) is None:
                self._new_workload(job, name)
            self._store.change(place, lambda obj: obj["spec"].update(queueName=name))
            message = (
                "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor "
                "default-flavor, 1 more needed"
            )
            reason = "Pending" if known else "Inadmissible"
            if not known:
                message = f"LocalQueue {name} doesn't exist"
            if not job["spec"].get("suspend"):
                return
            self._store.change(place, lambda obj: _wait_in_queue(obj, reason, message))

    def _new_workload(self, job: Json, queue: str) -> None:
        meta = job["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True,
                 "blockOwnerDeletion": True}  # fmt: skip
        self._store.create(
            CORE["workloads"],
            {
                "apiVersion": "kueue.x-k8s.io/v1beta1",
                "kind": "Workload",
                "metadata": {
                    "name": workload_name(job),
                    "namespace": meta["namespace"],
                    "labels": {"kueue.x-k8s.io/job-uid": meta["uid"]},
                    "ownerReferences": [owner],
                },
                "spec": {
                    "active": True,
                    "queueName": queue,
                    "podSets": [
                        {"name": "main", "count": job["spec"]["parallelism"], "template": job["spec"]["template"]}
                    ],
                },
                "status": {},
            },
        )
        text = f"Created Workload: {meta['namespace']}/{workload_name(job)}"
        record(self._store, job, "CreatedWorkload", text, source="batch/job-kueue-controller")


def workload_name(job: Json) -> str:
    meta = job["metadata"]
    digest = hashlib.sha256(f"Job\nbatch\n{meta['name']}\n{meta['uid']}".encode()).hexdigest()[:5]
    return f"job-{meta['name']}-{digest}"


def _wait_in_queue(workload: Json, reason: str, message: str) -> None:
    conditions = workload.setdefault("status", {}).setdefault("conditions", [])
    for condition in conditions:
        if condition["type"] == "QuotaReserved":
            if condition["status"] == "False":
                condition.update(reason=reason, message=message)
            return
    conditions.append(
        {
            "type": "QuotaReserved",
            "status": "False",
            "reason": reason,
            "message": message,
            "lastTransitionTime": now(),
            "observedGeneration": 1,
        }
    )
