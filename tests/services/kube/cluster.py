"""Starting, ending and disturbing the cluster."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.services.kube.admission import UID_RANGE
from tests.services.kube.api import Api, Denial
from tests.services.kube.containers import LABEL, remove_containers
from tests.services.kube.controllers import DEFAULT_CLASS, Controllers, workload_name
from tests.services.kube.kubelet import Kubelet
from tests.services.kube.objects import Json, Key, Store
from tests.services.kube.resources import CORE, OPENSHIFT_GROUPS, find_resource
from tests.services.kube.server import Fault, Forbidden, Request, Server, Settings, evict
from tests.services.kube.streams import Cut
from tests.services.kube.times import now
from tests.services.kube.volumes import PodFolders
from tests.services.podman import configure, podman

__all__ = ["NODES", "KubeCluster", "NodeSpec", "kube_cluster"]

_MEMORY = Path("/dev/shm")
_PREFIX = "cvlaunch-test-kube-"
_PRODUCT = "NVIDIA-A100-SXM4-40GB"
_GFD = {
    "nvidia.com/gpu.present": "true",
    "nvidia.com/gpu.product": _PRODUCT,
    "nvidia.com/gpu.family": "ampere",
    "nvidia.com/gpu.memory": "40960",
    "nvidia.com/gpu.machine": "DGX-A100",
    "nvidia.com/gpu.compute.major": "8",
    "nvidia.com/gpu.compute.minor": "0",
    "nvidia.com/cuda.driver.major": "550",
}
_RUN_AS = {"anyuid": "RunAsAny", "privileged": "RunAsAny", "restricted-v2": "MustRunAsRange"}
_USUAL = {"cpu": "16", "memory": "64Gi", "ephemeral-storage": "500Gi", "pods": "110"}


@dataclass(frozen=True)
class NodeSpec:
    """allocatable: beside the usual 16 CPUs, 64 GiB of memory, 500 GiB of disk and 110 pods."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()


NODES = (
    NodeSpec("plain"),
    NodeSpec(
        "a100", {**_GFD, "nvidia.com/gpu.count": "2", "nvidia.com/mig.strategy": "single"}, {"nvidia.com/gpu": "2"}
    ),
    NodeSpec(
        "mig",
        {**_GFD, "nvidia.com/gpu.count": "1", "nvidia.com/mig.strategy": "mixed", "nvidia.com/mig-1g.5gb.count": "7"},
        {"nvidia.com/mig-1g.5gb": "7"},
    ),
)
"""One without GPUs, one with two A100, one with an A100 in seven parts."""


class KubeCluster:
    """An API server on 127.0.0.1 with controllers, a scheduler and kubelets that run pods with podman.

    Its kubeconfig has the contexts `test` (the current one: a token in the file), `exec` (a plug-in prints the token),
    `stale` (a token that has expired) and `gone` (nobody listens there). OpenShift's API groups are served once a
    namespace is made with openshift=True.
    """

    def __init__(self, folder: Path, memory: Path, owner: str) -> None:
        self._folder, self._owner = folder, owner
        self._token = _new_token()
        self._settings = Settings({self._token})
        self.store = Store()
        self.api = Api(self.store)
        places = PodFolders(memory, folder / "pods")
        self.kubelet = Kubelet(self.store, places, owner=owner, token=lambda: self._token)
        self.controllers = Controllers(self.api, folder / "volumes")
        self.server = Server(self.api, self.kubelet, self._settings)
        self._first: dict[Key, Json] = {}

    # -- ways in ------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def kubeconfig(self) -> Path:
        return self._folder / "kubeconfig"

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self.kubeconfig)}

    @property
    def requests(self) -> list[Request]:
        """Those that the server got since the last `clear`."""
        return self._settings.requests

    @property
    def user(self) -> str:
        return self._settings.user

    # -- what there is ------------------------------------------------------------------------------------------------

    def namespace(
        self,
        name: str | None = None,
        *,
        pod_security: str | None = None,
        quota: Mapping[str, str] | None = None,
        openshift: bool = False,
    ) -> str:
        """A fresh one. pod_security: `restricted` or `baseline`, enforced and warned of. quota: `hard` of a
        ResourceQuota named `quota`. openshift: pods get a user id of the range 1000650000/10000, by restricted-v2."""
        name = name or f"test-{secrets.token_hex(4)}"
        labels = {f"pod-security.kubernetes.io/{mode}": pod_security for mode in ("enforce", "warn") if pod_security}
        annotations = {}
        if openshift:
            self._settings.hidden -= set(OPENSHIFT_GROUPS)
            annotations = {
                UID_RANGE: "1000650000/10000",
                "openshift.io/sa.scc.supplemental-groups": "1000650000/10000",
                "openshift.io/sa.scc.mcs": "s0:c26,c5",
            }
        self.create("Namespace", "", {"metadata": {"name": name, "labels": labels, "annotations": annotations}})
        if quota:
            self.create("ResourceQuota", name, {"metadata": {"name": "quota"}, "spec": {"hard": dict(quota)}})
        return name

    def remove_namespace(self, name: str) -> None:
        """At once, with all that is in it."""
        self.api.delete_namespace(name, force=True)

    def add_node(
        self,
        name: str,
        labels: Mapping[str, str] = {},
        allocatable: Mapping[str, str] = {},
        taints: Sequence[Mapping[str, str]] = (),
    ) -> None:
        resources = {**_USUAL, **allocatable}
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "kubelet is posting ready status",
        }
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {
                    "name": name,
                    "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels},
                },
                "spec": {"taints": [dict(taint) for taint in taints]} if taints else {},
                "status": {"capacity": resources, "allocatable": resources, "conditions": [ready]},
            }
        )

    def objects(self, kind: str, namespace: str = "") -> list[Json]:
        """kind: or its plural. All namespaces if none is named."""
        return copy.deepcopy(self.store.list(find_resource(kind).name, namespace))

    def get(self, kind: str, namespace: str, name: str) -> Json | None:
        found = self.store.get((find_resource(kind).name, namespace, name))
        return copy.deepcopy(found)

    def put(self, obj: Json) -> Json:
        """As it stands, whatever the API server would say of it."""
        resource = find_resource(obj["kind"])
        meta = obj["metadata"]
        key = (resource.name, meta.get("namespace", ""), meta["name"])
        with self.store.lock:
            old = self.store.get(key)
            if old is None:
                return copy.deepcopy(self.store.create(resource, copy.deepcopy(obj)))
            kept = {name: old["metadata"][name] for name in ("uid", "creationTimestamp", "resourceVersion")}
            return copy.deepcopy(self.store.replace(key, {**copy.deepcopy(obj), "metadata": {**meta, **kept}}))

    def create(self, kind: str, namespace: str, body: Json) -> Json:
        """As if it were POSTed, but no request is counted. ApiError."""
        made, _ = self.api.create(find_resource(kind), namespace, body)
        return copy.deepcopy(made)

    def posted(self, kind: str, namespace: str, name: str) -> Json:
        """The body by which it was created, also if it is gone."""
        return copy.deepcopy(self.api.posted[find_resource(kind).name, namespace, name])

    def pods(self, namespace: str, job: str | None = None) -> list[Json]:
        found = self.objects("pods", namespace)
        return [p for p in found if job in (None, p["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name"))]

    def events(self, namespace: str, name: str = "") -> list[tuple[str, str]]:
        """(reason, message) of what happened to the object of that name, or to any."""
        found = self.store.list("events", namespace)
        return [(e["reason"], e["message"]) for e in found if name in ("", e["involvedObject"]["name"])]

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """What `condition` returns once that is true; it is asked at every change, and now and then.
        AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            seen = self.store.version
            if found := condition():
                return found
            assert time.monotonic() < end, f"it did not happen in {seconds:g} s; there are {self._told()}"
            with self.store.lock:
                if self.store.version == seen:
                    self.store.lock.wait(0.05)

    def wait_for(
        self, kind: str, namespace: str, name: str, condition: Callable[[Json], Any], seconds: float = 120
    ) -> Json:
        """The object, once it is there and meets the condition."""

        def met() -> Json | None:
            found = self.get(kind, namespace, name)
            return found if found and condition(found) else None

        result: Json = self.wait(met, seconds)
        return result

    def volume_folder(self, namespace: str, claim: str) -> Path:
        """Where this machine has what is in a claim; waits until it is bound."""
        found = self.wait_for("pvc", namespace, claim, lambda obj: obj["status"].get("phase") == "Bound")
        volume = self.get("PersistentVolume", "", found["spec"]["volumeName"])
        assert volume
        return Path(volume["spec"]["hostPath"]["path"])

    def _told(self) -> str:
        pods = [(p["metadata"]["name"], p["status"]) for p in self.store.list("pods")]
        jobs = [(j["metadata"]["name"], j.get("status")) for j in self.store.list("jobs")]
        return json.dumps({"pods": pods, "jobs": jobs}, indent=1)

    # -- hands --------------------------------------------------------------------------------------------------------

    def evict(self, namespace: str, pod: str, *, grace_s: int | None = None) -> None:
        """As `kubectl drain` does: DisruptionTarget by the eviction API, TERM, the grace period."""
        evict(self.api, ("pods", namespace, pod), grace_s)

    def delete_pod(self, namespace: str, pod: str, *, grace_s: int | None = None) -> None:
        options = {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        self.api.delete(CORE["pods"], namespace, pod, options=options, query={})

    def kill_container(
        self, namespace: str, pod: str, container: str | None = None, *, reason: str = "OOMKilled"
    ) -> None:
        """SIGKILL to all of its processes: exit code 137. The first container if none is named."""
        found = self.store.get(("pods", namespace, pod))
        worker = self.kubelet.worker(found) if found else None
        assert found and worker, f"pod {pod} does not run"
        worker.kill_container(container or found["spec"]["containers"][0]["name"], reason)

    def lose_node(self, name: str) -> None:
        """It is gone with all that ran on it, as a spot machine: its pods fail as disrupted and are deleted."""
        with self.store.lock:
            self.store.delete(("nodes", "", name))
            for pod in self.store.list("pods"):
                if pod["spec"].get("nodeName") == name and pod["status"].get("phase") in ("Pending", "Running"):
                    self._lose(pod)

    def _lose(self, pod: Json) -> None:
        key = ("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                     "message": "PodGC: node no longer exists", "lastTransitionTime": now()}  # fmt: skip

        def mutate(obj: Json) -> None:
            obj["status"]["phase"] = "Failed"
            obj["status"].setdefault("conditions", []).append(condition)

        worker = self.kubelet.worker(pod)
        self.store.change(key, mutate)
        if worker:
            worker.lose()
        self.store.delete(key)

    def node_pressure(self, namespace: str, pod: str, *, resource: str = "memory") -> None:
        """The kubelet evicts the pod: phase Failed, reason Evicted; the object stays."""
        found = self.store.get(("pods", namespace, pod))
        worker = self.kubelet.worker(found) if found else None
        assert worker, f"pod {pod} does not run"
        words = f"The node was low on resource: {resource}. Threshold quantity: 100Mi, available: 92Mi. "
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet",
                     "message": words, "lastTransitionTime": now()}  # fmt: skip
        self.store.change(
            ("pods", namespace, pod), lambda obj: obj["status"].setdefault("conditions", []).append(condition)
        )
        worker.reason, worker.message = "Evicted", words
        worker.poke()

    def admit(self, namespace: str, job: str) -> None:
        """Kueue lets the job start, once no pod of it is active any more."""
        found = self.wait_for("Job", namespace, job, _is_at_rest)
        conditions = [
            {"type": kind, "status": "True", "reason": kind, "message": words, "lastTransitionTime": now()}
            for kind, words in (
                ("QuotaReserved", "Quota reserved in ClusterQueue cluster-queue"),
                ("Admitted", "The workload is admitted"),
            )
        ]
        place = ("workloads", namespace, workload_name(found))
        self.wait(lambda: self.store.get(place))
        self.store.change(place, lambda obj: obj.update(status={"conditions": conditions}))
        self.store.change(("jobs", namespace, job), lambda obj: obj["spec"].update(suspend=False))

    def preempt_workload(self, namespace: str, job: str) -> None:
        """Kueue takes the job's place for another: it is suspended again."""
        found = self.get("Job", namespace, job)
        assert found, f"no job {job}"
        words = "Preempted to accommodate a workload in the ClusterQueue due to prioritization"
        conditions = [
            {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": words},
            {"type": "Evicted", "status": "True", "reason": "Preempted", "message": words},
        ]
        self.store.change(
            ("workloads", namespace, workload_name(found)), lambda obj: obj.update(status={"conditions": conditions})
        )
        self.store.change(("jobs", namespace, job), lambda obj: obj["spec"].update(suspend=True))

    def manage_all_jobs(self) -> None:
        """Kueue suspends Jobs that ask for no queue, too (manageJobsWithoutQueueName)."""
        self.api.manages_all = True

    def inject(self, name: str, *, image: str, args: Sequence[str]) -> None:
        """A service mesh puts this container before those of each new pod, unless a label
        `sidecar.istio.io/inject: "false"` keeps it out."""
        own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
        own |= {"runAsUser": 1337, "seccompProfile": {"type": "RuntimeDefault"}}
        sidecar = {"name": name, "image": image, "args": [*args], "securityContext": own}
        self.api.sidecars.append(sidecar)

    def deny(
        self, message: str, *, kind: str = "pods", webhook: str = "policy.example.com", code: int = 403,
        times: int | None = None,
    ) -> None:  # fmt: skip
        """An admission webhook refuses new objects of that kind."""
        self.api.denials.append(Denial(message, find_resource(kind).name, webhook, code, times))

    def allow(self) -> None:
        """No webhook and no rule refuses anything any more."""
        self.api.denials.clear()
        self._settings.forbidden.clear()

    def forbid(self, verb: str, resource: str, namespace: str | None = None) -> None:
        """RBAC: the user may not. `*` is any verb or resource; subresources as `pods/log`."""
        self._settings.forbidden.append(Forbidden(verb, resource, namespace))

    def hide_api(self, *groups: str) -> None:
        """As if it were not installed: `kueue.x-k8s.io`, `kubeflow.org`."""
        self._settings.hidden |= set(groups)

    def show_api(self, *groups: str) -> None:
        self._settings.hidden -= set(groups)

    def serve_image(self, name: str, *, image: str) -> None:
        """From now on the kubelets get podman's `image` by this name, as if somebody had pushed it."""
        self.kubelet.images[name] = image

    # -- faults -------------------------------------------------------------------------------------------------------

    def fail(
        self, status: int, *, path: str = "", method: str = "", times: int | None = 1,
        headers: Mapping[str, str] = {}, body: Json | str | None = None,
    ) -> None:  # fmt: skip
        """The next `times` requests (None: all) whose path with query has a match for `path` get this instead."""
        self._settings.faults.append(Fault(status, path, method, times, headers, body))

    def drop(self, *, path: str = "", method: str = "", times: int | None = 1, late: bool = True) -> None:
        """Closes the connection without an answer; late: after the request has been carried out."""
        self._settings.faults.append(Fault(0, path, method, times, {}, None, late))

    def throttle(self, *, times: int = 1, path: str = "", retry_after: int = 1) -> None:
        self.fail(429, path=path, times=times, headers={"Retry-After": str(retry_after)})

    def expire_continue(self, *, times: int = 1) -> None:
        """The next requests for a further page get 410."""
        self.fail(410, path=r"[?&]continue=", times=times)

    def cut_logs(self, *, after: int, times: int = 1, clean: bool = False) -> None:
        """The next streams of logs end after so many lines: as if a proxy had closed the connection, or, clean, as if
        that were all."""
        self._settings.cuts.append(Cut(after, times, clean))

    def expire_tokens(self, *, renew: bool = True) -> str:
        """No token in use is good any more. renew: kubeconfig and plug-in have the new one (which is returned)."""
        self._token = _new_token()
        self._settings.tokens.clear()
        self._settings.tokens.add(self._token)
        if renew:
            self.write_kubeconfig()
        return self._token

    def heal(self) -> None:
        """No faults any more."""
        self._settings.faults.clear()
        self._settings.cuts.clear()

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def write_kubeconfig(self) -> None:
        credential = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"token": self._token},
        }
        _write_private(self._folder / "credential.json", json.dumps(credential))
        plugin, script = self._folder / "token-plugin", self._folder / "token-plugin.sh"
        script.write_text(f"cat '{self._folder / 'credential.json'}'\n")
        if not plugin.exists():  # "Text file busy" for who starts it while a process that another thread makes has it
            plugin.write_text(f"#!/bin/sh\n. '{script}'\n")
            plugin.chmod(0o700)
        _write_private(self.kubeconfig, yaml.safe_dump(self._configuration(plugin)))

    def _configuration(self, plugin: Path) -> Json:
        run = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
        users = {"token": {"token": self._token}, "exec": {"exec": run}, "stale": {"token": "expired-" + "x" * 20}}
        clusters = {"test": self.url, "gone": "http://127.0.0.1:1"}
        contexts = {
            "test": ("test", "token"), "exec": ("test", "exec"), "stale": ("test", "stale"), "gone": ("gone", "token"),
        }  # fmt: skip
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": name, "cluster": {"server": url}} for name, url in clusters.items()],
            "users": [{"name": name, "user": user} for name, user in users.items()],
            "contexts": [
                {"name": name, "context": {"cluster": cluster, "user": user}}
                for name, (cluster, user) in contexts.items()
            ],
        }

    def start(self, nodes: Sequence[NodeSpec], *, alive: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.server.start()
        self.write_kubeconfig()
        if alive:
            self.kubelet.start()
            self.controllers.start()
        for name in ("default", "kube-system"):
            self.create("Namespace", "", {"metadata": {"name": name}})
        for node in nodes:
            self.add_node(node.name, node.labels, node.allocatable, node.taints)
        self._add_classes()
        self._first = {
            (plural, "", obj["metadata"]["name"]): obj
            for plural in ("nodes", "storageclasses", "priorityclasses")
            for obj in self.store.list(plural)
        }

    def _add_classes(self) -> None:
        for name, provisioner in (("standard", "csi.example.com"), ("manual", "kubernetes.io/no-provisioner")):
            default = {DEFAULT_CLASS: "true"} if name == "standard" else {}
            body = {"metadata": {"name": name, "annotations": default}, "provisioner": provisioner}
            self.create("StorageClass", "", {**body, "reclaimPolicy": "Delete", "volumeBindingMode": "Immediate"})
        self.create("PriorityClass", "", {"metadata": {"name": "high"}, "value": 1000})
        for name in ("anyuid", "privileged", "restricted-v2"):
            body = {"allowPrivilegedContainer": name == "privileged", "runAsUser": {"type": _RUN_AS[name]}}
            self.create("SecurityContextConstraints", "", {"metadata": {"name": name}, **body})

    def clear(self) -> None:
        """As new for the next test: no namespaces of its own, no faults, the first nodes and classes."""
        self.heal()
        self.api.denials.clear()
        self.api.sidecars.clear()
        self.api.manages_all = False
        self.api.posted.clear()
        settings = self._settings
        settings.forbidden.clear()
        settings.requests.clear()
        settings.hidden = set(OPENSHIFT_GROUPS)
        self.kubelet.images.clear()
        with self.store.lock:
            workers = list(self.kubelet.workers.values())
            for namespace in self.store.list("namespaces"):
                if (name := namespace["metadata"]["name"]) not in ("default", "kube-system"):
                    self.remove_namespace(name)
            for obj in [
                *self.store.list("nodes"),
                *self.store.list("storageclasses"),
                *self.store.list("priorityclasses"),
            ]:
                key = (find_resource(obj["kind"]).name, "", obj["metadata"]["name"])
                if key not in self._first:
                    self.store.delete(key)
            for volume in self.store.list("persistentvolumes"):
                self.store.delete(("persistentvolumes", "", volume["metadata"]["name"]))
            for obj in self._first.values():
                self.put(obj)
        for worker in workers:
            worker.thread.join(60)
        shutil.rmtree(self._folder / "volumes", ignore_errors=True)
        self.write_kubeconfig()

    def close(self) -> None:
        self.server.close()
        self.controllers.close()
        self.kubelet.close()
        _remove_by_owner(self._owner)


@contextlib.contextmanager
def kube_cluster(folder: Path, *, nodes: Sequence[NodeSpec] = NODES, alive: bool = True) -> Iterator[KubeCluster]:
    """All of it below `folder`, which is made, and in memory; ended, whatever happens, with all pods.

    alive: or else objects stay as they are put: no controller and no kubelet does anything with them.
    """
    configure()
    _sweep()
    owner = f"{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(3)}"
    memory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{owner}-", dir=_MEMORY))
    cluster = KubeCluster(folder, memory, owner)
    try:
        cluster.start(nodes, alive=alive)
        yield cluster
    finally:
        cluster.close()


def _is_at_rest(job: Json) -> bool:
    """Suspended, and seen to be so by its controller."""
    conditions = {c["type"]: c["status"] for c in job["status"].get("conditions", ())}
    return conditions.get("Suspended") == "True" and not job["status"].get("active")


def _new_token() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(24)).decode()


def _write_private(path: Path, text: str) -> None:
    """By rename, so that nobody reads half of it."""
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def _containers() -> list[tuple[str, str]]:
    """(id, owner)"""
    if not shutil.which("podman"):
        return []
    template = f'{{{{.ID}}}} {{{{index .Labels "{LABEL}"}}}}'
    found = podman("ps", "--all", "--filter", f"label={LABEL}", "--format", template, check=False)
    return [(line.split()[0], line.split()[1]) for line in found.splitlines()]


def _remove_by_owner(owner: str) -> None:
    remove_containers([identity for identity, other in _containers() if other == owner])


def _sweep() -> None:
    """What a cluster left whose process was killed."""
    dead = [identity for identity, owner in _containers() if not _lives(owner)]
    remove_containers(dead)
    for folder in _MEMORY.glob(f"{_PREFIX}*"):
        if not _lives(folder.name.removeprefix(_PREFIX)):
            with contextlib.suppress(FileNotFoundError):  # another cluster that starts now sweeps, too
                for inner in folder.iterdir():
                    PodFolders(inner, inner).remove()
            shutil.rmtree(folder, ignore_errors=True)


def _lives(owner: str) -> bool:
    pid, started, *_ = owner.split("-")
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When, in clock ticks since boot (proc(5)); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[19]
    except OSError:
        return ""
