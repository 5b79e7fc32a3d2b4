"""The kubelets of all nodes: a thread for each pod that is bound to one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import queue
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.services.kube.containers import (
    ContainerRun,
    Image,
    Launch,
    find_image,
    kill,
    remove_containers,
    start_container,
)
from tests.services.kube.environment import ConfigError, environment_of
from tests.services.kube.events import record
from tests.services.kube.objects import Json, Key, Store, controller_of
from tests.services.kube.times import now, stamp
from tests.services.kube.volumes import MountError, PodFolders, make_volumes

__all__ = ["Kubelet", "PodWorker"]

_RETRY_S = 0.2
_BACK_OFF_S = (0.0, 0.2, 0.5, 1.0)
_SERVED_TRIES = 5
"""For an image that is there for sure."""
_NOT_FOUND: Json = {
    "exitCode": 137,
    "reason": "ContainerStatusUnknown",
    "message": "The container could not be located when the pod was terminated",
    "startedAt": None,
    "finishedAt": None,
}
"""Of a container that never started, when its pod has ended (TerminatePod, pkg/kubelet/status/status_manager.go)."""
_DEADLINE = "Pod was active on the node longer than the specified deadline"


class _Stopped(Exception):  # noqa: N818 nothing is wrong
    """The pod is to end before all of it has started."""


class Kubelet:
    """folder: where those of the pods are made. images: names that stand for others, as a registry's would."""

    def __init__(self, store: Store, folder: PodFolders, *, owner: str, token: Callable[[], str]) -> None:
        self.store, self.folder, self.owner, self.token = store, folder, owner, token
        self.images: dict[str, str] = {}
        self.workers: dict[str, PodWorker] = {}
        self.closed = False
        self._known: dict[str, tuple[float, Image]] = {}
        self._numbers = itertools.count(1)
        self._garbage: queue.Queue[list[str] | None] = queue.Queue()
        self._cleaner = threading.Thread(target=self._clean, name="kube-cleaner", daemon=True)

    def start(self) -> None:
        self.store.listen(self._heard)
        self._cleaner.start()

    def close(self) -> None:
        """Everything ends at once."""
        self.closed = True
        workers = list(self.workers.values())
        for worker in workers:
            worker.lose()
        for worker in workers:
            worker.thread.join(60)
        if self._cleaner.is_alive():
            self._garbage.put(None)
            self._cleaner.join(60)
        self.folder.remove()

    def worker(self, pod: Json) -> PodWorker | None:
        return self.workers.get(pod["metadata"]["uid"])

    def image(self, reference: str) -> Image | None:
        tries = _SERVED_TRIES if reference in self.images else 1
        reference = self.images.get(reference, reference)
        seen, image = self._known.get(reference, (0.0, None))
        if image is None or time.monotonic() - seen > 2:
            image = find_image(reference, tries=tries)
            if image:
                self._known[reference] = (time.monotonic(), image)
        return image

    def number(self) -> int:
        return next(self._numbers)

    def throw_away(self, names: list[str]) -> None:
        self._garbage.put(names)

    def forget(self, uid: str) -> None:
        self.workers.pop(uid, None)

    def _heard(self, kind: str, key: Key, obj: Json) -> None:
        if key[0] == "services":
            for worker in list(self.workers.values()):
                worker.poke()
        if key[0] != "pods" or self.closed:
            return
        uid = obj["metadata"]["uid"]
        known = self.workers.get(uid)
        if known:
            known.poke(gone=kind == "DELETED")
        elif kind != "DELETED" and obj["spec"].get("nodeName") and obj["status"].get("phase") == "Pending":
            self.workers[uid] = PodWorker(self, key, obj)
            self.workers[uid].thread.start()
        if obj["spec"].get("subdomain"):
            for other in list(self.workers.values()):
                if other is not known and other.key[1] == key[1]:
                    other.poke()

    def _clean(self) -> None:
        """Removes what pods leave, some at a time, when nobody waits for it."""
        while (names := self._garbage.get()) is not None:
            more = []
            with contextlib.suppress(queue.Empty):
                while (extra := self._garbage.get_nowait()) is not None:
                    more += extra
                self._garbage.put(None)
            remove_containers([*names, *more])


@dataclass
class _Slot:
    """A container of the pod: what runs, and what ran before. given_up: its pod ended before it had started."""

    spec: Json
    run: ContainerRun | None = None
    previous: ContainerRun | None = None
    restarts: int = 0
    waiting: Json = field(default_factory=lambda: {"reason": "ContainerCreating"})
    again_at: float | None = None
    image_id: str = ""
    given_up: bool = False

    @property
    def name(self) -> str:
        return str(self.spec["name"])


class PodWorker:
    def __init__(self, kubelet: Kubelet, key: Key, pod: Json) -> None:
        self.kubelet, self.store, self.key, self.pod = kubelet, kubelet.store, key, pod
        self.uid = pod["metadata"]["uid"]
        self.folders = PodFolders(kubelet.folder.memory / self.uid, kubelet.folder.disk / self.uid)
        self.slots = [_Slot(spec) for spec in pod["spec"]["containers"]]
        self.inits = [_Slot(spec) for spec in pod["spec"].get("initContainers", ())]
        self.reason = self.message = ""
        self.names: list[str] = []
        self.thread = threading.Thread(target=self._run, name=f"pod-{key[2]}", daemon=True)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._waking = threading.Lock()
        self._lost = self._gone = self._deadline = False
        self._volumes: dict[str, Path] = {}
        self._told: set[str] = set()
        self._started = 0.0

    # -- hands --------------------------------------------------------------------------------------------------------

    def poke(self, *, gone: bool = False) -> None:
        self._gone = self._gone or gone
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def lose(self) -> None:
        """Its node is gone, and all that ran on it."""
        self._lost = True
        for slot in [*self.inits, *self.slots]:
            if slot.run:
                kill(slot.run, "lost")
        self.poke()

    def slot(self, name: str) -> _Slot | None:
        return next((slot for slot in [*self.slots, *self.inits] if slot.name == name), None)

    def kill_container(self, name: str, why: str) -> None:
        slot = self.slot(name)
        assert slot and slot.run, f"container {name} does not run"
        kill(slot.run, why)

    # -- its life -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except Exception:
            if not self.kubelet.closed:
                traceback.print_exc()
        finally:
            self._end()

    def _live(self) -> None:
        self.folders.make()
        self._started = time.time()
        self._status(startTime=now(), podIP=self._address(), hostIP="127.0.0.1")
        try:
            self._volumes = self._patiently(self._mount, MountError, "FailedMount")
            self._write_hosts()
            for slot in self.inits:
                self._run_to_end([slot], init=True)
                if slot.run is None or slot.run.terminated.get("exitCode") != 0:
                    self._finish("Failed")
                    return
            self._run_to_end(self.slots)
        except _Stopped:
            self._give_up()
            self._finish("Failed")
            return
        codes = [slot.run.terminated.get("exitCode", 1) if slot.run else 1 for slot in self.slots]
        self._finish("Failed" if self.reason or any(codes) else "Succeeded")

    def _give_up(self) -> None:
        """Of the containers, or of the first init container. The kubelet of a lost node says nothing any more."""
        initialized = all(slot.run and slot.run.terminated.get("exitCode") == 0 for slot in self.inits)
        begun = any(slot.run for slot in self.inits)
        for slot in self.slots if initialized else self.inits[: 0 if begun else 1]:
            slot.given_up = slot.run is None and not self._lost

    def _patiently(self, attempt: Callable[[], Any], error: type[Exception], reason: str) -> Any:
        """Again and again until it works. _Stopped if the pod is to end meanwhile."""
        while True:
            self._stop_if_told()
            try:
                return attempt()
            except error as failure:
                self._tell(reason, str(failure), warning=True)
            self._rest(_RETRY_S)

    def _mount(self) -> dict[str, Path]:
        return make_volumes(self.store, self._now(), self.folders, token=self.kubelet.token())

    def _run_to_end(self, slots: list[_Slot], *, init: bool = False) -> None:
        """Until all have ended for good. Stops them when the pod is to end: TERM, then KILL after its grace."""
        kill_at: float | None = None
        for slot in slots:
            self._start(slot)
        while True:
            for slot in slots:
                self._look_after(slot, stopping=kill_at is not None, init=init)
            if all(self._over(slot) for slot in slots):
                return
            if (grace := self._told_to_stop()) is not None:
                deadline = time.monotonic() + grace
                if kill_at is None:
                    self._signal(slots, signal.SIGTERM)
                    self._tell("Killing", f"Stopping container {slots[0].name}")
                    kill_at = deadline
                kill_at = min(kill_at, deadline)
                if time.monotonic() >= kill_at:
                    self._signal(slots, signal.SIGKILL)
            self._rest(self._pause(slots, kill_at), slots)
            self._write_hosts()

    def _pause(self, slots: list[_Slot], kill_at: float | None) -> float:
        times = [kill_at] if kill_at else []
        times += [slot.again_at for slot in slots if slot.again_at]
        limit = self.pod["spec"].get("activeDeadlineSeconds")
        left = [max(0.02, at - time.monotonic()) for at in times]
        if limit and not kill_at:
            left.append(max(0.02, self._started + limit - time.time()))
        return min(left, default=30.0)

    def _rest(self, seconds: float, slots: list[_Slot] | None = None) -> None:
        """Until something happens."""
        watched = [slot.run.watched for slot in slots or () if slot.run and slot.run.watched >= 0]
        ready, _, _ = select.select([self._wake, *watched], [], [], seconds)
        if self._wake in ready:
            os.eventfd_read(self._wake)

    def _over(self, slot: _Slot) -> bool:
        return slot.run is not None and bool(slot.run.terminated) and slot.again_at is None

    def _look_after(self, slot: _Slot, *, stopping: bool, init: bool) -> None:
        run = slot.run
        if run and not run.terminated and run.ended():
            run.finish()
            if self._restarts(run, init=init) and not stopping and self._told_to_stop() is None:
                pause = _BACK_OFF_S[min(slot.restarts, len(_BACK_OFF_S) - 1)]
                slot.again_at = time.monotonic() + pause
                words = (
                    f"back-off {max(10, round(pause * 10))}s restarting failed container={slot.name} pod={self.key[2]}"
                )
                slot.waiting = {"reason": "CrashLoopBackOff", "message": words}
            self._status()
        if slot.again_at and stopping:
            slot.again_at = None
        elif slot.again_at and time.monotonic() >= slot.again_at:
            slot.previous, slot.run, slot.again_at = run, None, None
            slot.restarts += 1
            self._start(slot)

    def _restarts(self, run: ContainerRun, *, init: bool) -> bool:
        policy = self.pod["spec"]["restartPolicy"]
        failed = run.terminated["exitCode"] != 0
        return (policy == "Always" and not init) or (policy != "Never" and failed)

    def _signal(self, slots: list[_Slot], number: signal.Signals) -> None:
        for slot in slots:
            if slot.run and number == signal.SIGKILL:
                kill(slot.run, slot.run.killed or "grace")
            elif slot.run:
                slot.run.signal(number)

    def _told_to_stop(self) -> float | None:
        """Seconds of grace, which begin when the kubelet sees it, if the pod is to end."""
        pod = self._now()
        if self._lost or self._gone or self.kubelet.closed:
            return 0.0
        meta, spec = pod["metadata"], pod["spec"]
        if "deletionTimestamp" in meta:
            return float(meta["deletionGracePeriodSeconds"])
        limit = spec.get("activeDeadlineSeconds")
        if self._deadline or (limit and time.time() >= self._started + limit):
            self._deadline = True
            self.reason, self.message = "DeadlineExceeded", _DEADLINE
        if self.reason:
            return float(spec["terminationGracePeriodSeconds"])
        return None

    def _stop_if_told(self) -> None:
        if self._told_to_stop() is not None:
            raise _Stopped

    def _now(self) -> Json:
        found = self.store.get(self.key)
        if found and found["metadata"]["uid"] == self.uid:
            self.pod = found
        else:
            self._gone = True
        return self.pod

    # -- a container --------------------------------------------------------------------------------------------------

    def _start(self, slot: _Slot) -> None:
        image = self._patiently_image(slot)
        environment = self._configured(slot)
        user_problem = _runs_as_root(self.pod, slot.spec, image)
        while user_problem:
            self._wait_with(
                slot, "CreateContainerConfigError", user_problem.format(pod=self._described(), name=slot.name)
            )
        while any(map(_is_taken, slot.spec.get("ports", ()))):
            self._wait_with(slot, "ContainerCreating", "")
        name = f"cvk-{self.kubelet.owner}-{self.kubelet.number()}-{slot.name}"
        launch = Launch(
            pod=self.pod,
            container=slot.spec,
            image=image,
            environment=environment,
            volumes=self._volumes,
            hosts=self.folders.memory / "hosts",
            message=self.folders.memory / f"{slot.name}.{slot.restarts}.message",
            log=self.folders.disk / "logs" / slot.name / f"{slot.restarts}.log",
            pids=self.folders.memory / f"{slot.name}.{slot.restarts}",
            name=name,
            hostname=self._hostname(),
            owner=self.kubelet.owner,
        )
        self.names.append(name)
        self._tell("Created", f"Created container: {slot.name}")
        run = start_container(launch, slot.restarts)
        slot.image_id = image.id
        if run.failure:
            self._failed_to_start(slot, run)
        else:
            slot.run = run
            self._tell("Started", f"Started container {slot.name}")
            if self._lost:
                kill(run, "lost")
        self._status()

    def _failed_to_start(self, slot: _Slot, run: ContainerRun) -> None:
        message = (
            f"failed to create containerd task: failed to create shim task: OCI runtime create failed: {run.failure}"
        )
        run.terminated = {
            "exitCode": 128,
            "reason": "StartError",
            "message": message,
            "startedAt": "1970-01-01T00:00:00Z",
            "finishedAt": now(),
        }
        slot.run = run
        self._tell("Failed", f"Error: {message}", warning=True)

    def _described(self) -> str:
        return f"{self.key[2]}_{self.key[1]}({self.uid})"

    def _hostname(self) -> str:
        return str(self.pod["spec"].get("hostname") or self.key[2])[:63].rstrip("-.")

    def _wait_with(self, slot: _Slot, reason: str, message: str) -> None:
        """_Stopped if the pod is to end."""
        if slot.waiting.get("reason") != reason:
            slot.waiting = {"reason": reason, "message": message}
            self._status()
        self._stop_if_told()
        self._rest(_RETRY_S)
        self._stop_if_told()

    def _patiently_image(self, slot: _Slot) -> Image:
        reference, policy = slot.spec["image"], slot.spec["imagePullPolicy"]
        turn = 0
        while True:
            if _bad_reference(reference):
                why = f'couldn\'t parse image name "{reference}": invalid reference format'
                words = f'Failed to apply default image tag "{reference}": {why}'
                self._tell("InspectFailed", words, warning=True)
                self._wait_with(slot, "InvalidImageName", words)
                continue
            self._stop_if_told()
            if image := self.kubelet.image(reference):
                self._tell("Pulled", f'Container image "{reference}" already present on machine')
                return image
            if policy == "Never":
                words = f'Container image "{reference}" is not present with pull policy of Never'
                self._tell("ErrImageNeverPull", words, warning=True)
                self._wait_with(slot, "ErrImageNeverPull", words)
                continue
            self._not_pulled(slot, reference, turn)
            turn += 1

    def _not_pulled(self, slot: _Slot, reference: str, turn: int) -> None:
        pull = (
            f'failed to pull and unpack image "{reference}": failed to resolve reference "{reference}": {reference}: '
            "not found"
        )
        back_off = f'Back-off pulling image "{reference}"'
        self._tell("Pulling", f'Pulling image "{reference}"')
        self._tell(
            "Failed", f'Failed to pull image "{reference}": rpc error: code = NotFound desc = {pull}', warning=True
        )
        if turn == 0:
            self._tell("Failed", "Error: ErrImagePull", warning=True)
            self._wait_with(slot, "ErrImagePull", f"rpc error: code = NotFound desc = {pull}")
        else:
            self._tell("BackOff", back_off)
            self._tell("Failed", "Error: ImagePullBackOff", warning=True)
            words = f"{back_off}: ErrImagePull: rpc error: code = NotFound desc = {pull}"
            self._wait_with(slot, "ImagePullBackOff", words)

    def _configured(self, slot: _Slot) -> Any:
        while True:
            try:
                return environment_of(self.store, self._now(), slot.spec)
            except ConfigError as error:
                self._tell("Failed", f"Error: {error}", warning=True)
                self._wait_with(slot, "CreateContainerConfigError", str(error))

    # -- names --------------------------------------------------------------------------------------------------------

    def _address(self) -> str:
        """Of 127/8: where the pod listens on all addresses, it is reached there. The same for each pod of an index."""
        index = self.pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index")
        owner = controller_of(self.pod).get("uid", "") if index is not None else self.uid
        digest = hashlib.sha256(owner.encode()).digest()
        last = 2 + int(index) % 250 if index is not None else 2 + digest[2] % 250
        return f"127.{64 + digest[0] % 64}.{digest[1]}.{last}"

    def _write_hosts(self) -> None:
        """Names appear when their service and pods do; none is taken away, so that nobody reads half a file."""
        file = self.folders.memory / "hosts"
        if not file.exists():
            first = ["# Kubernetes-managed hosts file.", "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost"]
            file.write_text("\n".join([*first, f"{self._address()}\t{self._hostname()}"]) + "\n")
            file.chmod(0o644)
        lines = [line for line in _service_names(self.store, self.key[1]) if line not in self._told]
        if lines:
            with file.open("a") as out:
                out.write("\n".join(lines) + "\n")
            self._told |= set(lines)

    # -- what it reports ----------------------------------------------------------------------------------------------

    def _tell(self, reason: str, message: str, *, warning: bool = False) -> None:
        record(self.store, self.pod, reason, message, warning=warning, source="kubelet")

    def _status(self, phase: str = "", **fields: str) -> None:
        def mutate(pod: Json) -> None:
            status = pod["status"]
            status.update(fields)
            if "podIP" in fields:
                status["podIPs"], status["hostIPs"] = [{"ip": fields["podIP"]}], [{"ip": fields["hostIP"]}]
            status["phase"] = phase or self._phase(status)
            by_name = sorted(self.slots, key=lambda slot: slot.name)
            status["containerStatuses"] = [_slot_status(slot) for slot in by_name]
            if self.inits:
                status["initContainerStatuses"] = [_slot_status(slot) for slot in self.inits]
            self._conditions(status)
            if phase == "Failed" and self.reason:
                status.update(reason=self.reason, message=self.message)

        self.store.change(self.key, mutate, uid=self.uid)

    def _phase(self, status: Json) -> str:
        started = any(slot.run or slot.previous for slot in self.slots)
        return "Running" if started or status.get("phase") == "Running" else "Pending"

    def _conditions(self, status: Json) -> None:
        ended = status["phase"] in ("Succeeded", "Failed")
        unready = [slot.name for slot in self.slots if not _running(slot)]
        ready: Json = {"status": "False" if ended or unready else "True"}
        if status["phase"] == "Succeeded":
            ready.update(reason="PodCompleted")
        elif ended:
            ready.update(reason="PodFailed")
        elif unready:
            ready.update(reason="ContainersNotReady", message=f"containers with unready status: [{' '.join(unready)}]")
        begun = any(slot.run for slot in [*self.slots, *self.inits])
        initialized = all(slot.run and slot.run.terminated.get("exitCode") == 0 for slot in self.inits)
        for kind, wanted in (
            ("PodReadyToStartContainers", {"status": "True" if begun and not ended else "False"}),
            ("Initialized", {"status": "True" if initialized else "False"}),
            ("Ready", ready),
            ("ContainersReady", ready),
        ):
            _set_condition(status, kind, wanted)

    def _finish(self, phase: str) -> None:
        if self._lost and not self.kubelet.closed:
            phase = "Failed"
        self._status(phase)

    def _end(self) -> None:
        """Nothing runs any more: what may go, goes."""
        for slot in [*self.slots, *self.inits]:
            for run in (slot.run, slot.previous):
                if run and not run.terminated:
                    kill(run, "end")
                if run:
                    run.forget()
        self._wait_for_removal()

    def _wait_for_removal(self) -> None:
        """The object stays as long as it likes; folders and containers stay with it, for its logs."""
        while not (self._gone or self.kubelet.closed):
            pod = self._now()
            if self._gone:
                break
            if pod["metadata"].get("deletionGracePeriodSeconds"):
                self.store.finish_pod(self.key, self.uid)
            else:
                self._rest(60.0)
        self.kubelet.throw_away(self.names)
        self.folders.remove()
        self.kubelet.forget(self.uid)
        with self._waking:
            os.close(self._wake)
            self._wake = -1


def _runs_as_root(pod: Json, container: Json, image: Image) -> str:
    """Why it may not start, with places for {pod} and {name}; empty if it may."""
    own, common = container.get("securityContext", {}), pod["spec"]["securityContext"]
    if not own.get("runAsNonRoot", common.get("runAsNonRoot")):
        return ""
    user = own.get("runAsUser", common.get("runAsUser"))
    named = image.user.partition(":")[0]
    if user == 0:
        return 'container\'s runAsUser breaks non-root policy (pod: "{pod}", container: {name})'
    if user is None and named and not named.isdigit():
        words = f"container has runAsNonRoot and image has non-numeric user ({named}), cannot verify user is non-root"
        return words + ' (pod: "{pod}", container: {name})'
    if user is None and int(named or 0) == 0:
        return 'container has runAsNonRoot and image will run as root (pod: "{pod}", container: {name})'
    return ""


def _is_taken(port: Json) -> bool:
    """Whether another pod listens there: all of this machine have one network."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port["containerPort"]))
        except OSError:
            return True
    return False


def _bad_reference(reference: str) -> bool:
    name = reference.partition("@")[0]
    return any(letter.isspace() for letter in reference) or (name != name.lower() and ":" not in name) or "//" in name


def _running(slot: _Slot) -> bool:
    return slot.run is not None and not slot.run.terminated


def _slot_status(slot: _Slot) -> Json:
    run, state = slot.run, {"terminated": _NOT_FOUND} if slot.given_up else {"waiting": slot.waiting}
    if run and run.terminated and slot.again_at is None:
        state = {"terminated": run.terminated}
    elif run and not run.terminated:
        state = {"running": {"startedAt": now() if not run.started else stamp(run.started)}}
    last = (
        run.terminated
        if run and run.terminated and slot.again_at
        else (slot.previous.terminated if slot.previous else {})
    )
    return {
        "name": slot.name,
        "state": state,
        "lastState": {"terminated": last} if last else {},
        "ready": _running(slot),
        "started": _running(slot),
        "restartCount": slot.restarts,
        "image": slot.spec["image"],
        "imageID": f"sha256:{slot.image_id}" if slot.image_id else "",
        **({"containerID": f"containerd://{run.id}"} if run and run.id else {}),
    }


def _set_condition(status: Json, kind: str, wanted: Json) -> None:
    conditions = status.setdefault("conditions", [])
    old = next((c for c in conditions if c["type"] == kind), None)
    kept = ("lastTransitionTime", "lastProbeTime", "type")
    if old and {k: v for k, v in old.items() if k not in kept} == wanted:
        return
    changed = now() if not old or old["status"] != wanted["status"] else old["lastTransitionTime"]
    new = {"type": kind, **wanted, "lastProbeTime": None, "lastTransitionTime": changed}
    status["conditions"] = [*(c for c in conditions if c["type"] != kind), new]


def _service_names(store: Store, namespace: str) -> Iterator[str]:
    """Lines of /etc/hosts for the pods behind headless services."""
    for service in store.list("services", namespace):
        spec, name = service["spec"], service["metadata"]["name"]
        selector = spec.get("selector", {})
        for pod in store.list("pods", namespace) if selector and spec.get("clusterIP") == "None" else ():
            labels, status = pod["metadata"].get("labels", {}), pod["status"]
            if any(labels.get(key) != value for key, value in selector.items()) or "podIP" not in status:
                continue
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
            if not (ready or spec.get("publishNotReadyAddresses")):
                continue
            suffixes = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
            words = [f"{name}{suffix}" for suffix in suffixes]
            if pod["spec"].get("subdomain") == name and pod["spec"].get("hostname"):
                words = [f"{pod['spec']['hostname']}.{word}" for word in words] + words
            yield f"{status['podIP']}\t{' '.join(words)}"
