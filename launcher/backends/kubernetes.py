"""Kubernetes and OpenShift: one batch/v1 Job a run, which any cluster of version 1.29 or later takes.

A single-node run is one object: job.json travels as an annotation of the pod, so that it is there at once or not at
all. What needs the Job first (a Secret with values of this machine, the headless Service of several nodes) is made
after it and belongs to it, and goes when it goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from launcher import beside
from launcher.backends.base import (
    Adopted,
    BaseTarget,
    Feature,
    Handle,
    Job,
    LogLine,
    Plan,
    Problem,
    Support,
    Transport,
    asked_of_foreign,
)
from launcher.contract import (
    DEFAULT_ROOT,
    OUTPUT_FOLDERS,
    STARTED,
    JobFile,
)
from launcher.errors import AuthError, CapacityError, ConflictError, CvlaunchError, SpecError
from launcher.kube import words
from launcher.kube.client import Cluster, Json
from launcher.kube.gpus import is_gpu, node_requirement
from launcher.kube.helper import HelperSpec
from launcher.kube.logs import run_logs
from launcher.kube.manifest import manifest_context, places, stored_secrets
from launcher.kube.podspecs import parse_quantity
from launcher.kube.queues import queue_words
from launcher.kube.target import KubernetesTarget, OpenShiftTarget
from launcher.kube.volume import open_volume, split_uri
from launcher.kube.words import CONTAINER, Seen
from launcher.plan import dump_yaml
from launcher.quantities import format_size
from launcher.rules import RULES, ContainerRules
from launcher.status import State, Status
from launcher.stores import Store, join_uri, open_store, scheme
from launcher.watch import seldom

__all__ = ["KubernetesBackend", "OpenShiftBackend"]

_IN_PLACE = dict.fromkeys(OUTPUT_FOLDERS, "in_place")
_UPLOADED = dict.fromkeys(OUTPUT_FOLDERS, "runner")
_CHANNELS = {"pvc": "mounted", "s3": "staged", "gs": "staged"}

_AT_ONCE = 8
_TELLING = "type=Warning,reason!=FailedScheduling,reason!=Failed,reason!=BackOff"
"""Events of Jobs and of pods in one call; not those that the pod's own status repeats."""
_NAMES_A_CALL = 100
"""Of runs, in the label selector of one LIST: it travels in the URL."""
_FEW = 1000
"""Up to so many runs a poll also reads events and Kueue's Workloads, and so stays within five requests."""
_GONE_S = 120.0
"""How long an ended Job may take to go, when its run is sent again."""

_OR_SCALES = "or, if nodes come when they are needed, write scales_up: true in the target"

_FOREIGN = {
    "code": "a foreign image (runner: none) has nobody to bring it; build the code into the image",
    "train": "the trainer is started by our runner; write runner: auto",
}
"""Key of the job → why a foreign image can't have it."""


class KubernetesBackend:
    name: ClassVar[str] = "kubernetes"
    Target: ClassVar[type[BaseTarget]] = KubernetesTarget
    template: ClassVar[str] = "kubernetes/job.yaml.j2"
    form: ClassVar[Literal["json", "yaml", "script"]] = "yaml"
    inline_job: ClassVar[bool] = True
    doubt_s: ClassVar[float] = 30.0
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(True),
        Feature.SHM: Support(True),
        Feature.SPOT: Support(True),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(True),
        Feature.SECRETS_CLIENT: Support(True),
        Feature.SECRETS_STORE: Support(True),
        Feature.CONTAINER: Support(True),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(True),
    }
    ignored: ClassVar[Mapping[str, str]] = {}
    placeholders: ClassVar[Mapping[str, str]] = {"output": "s3://REPLACE-ME/runs"}
    transports: ClassVar[Mapping[str, Transport]] = {
        "s3": Transport(_CHANNELS, _UPLOADED),
        "gs": Transport(_CHANNELS, _UPLOADED),
        "pvc": Transport(_CHANNELS, _IN_PLACE),
    }

    def __init__(self, target: KubernetesTarget, target_name: str) -> None:
        self.target = target
        self.target_name = target_name
        self._cluster = Cluster(target.access, target_name)

    @property
    def rules(self) -> ContainerRules:
        return RULES[self.name]

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        return manifest_context(job, run_id, job_file, target=self.target)

    # -- before and at submission -------------------------------------------------------------------------------------

    def check(self, job: Job) -> Iterator[Problem]:
        """What the cluster would take and then never start. The pod itself is tried out at submission."""
        yield from _check_foreign(job)
        if not self._cluster.allowed("create", "jobs"):
            raise AuthError(
                f"you may not create jobs in {self._cluster.where}: correct the target's `namespace`, or ask for the "
                f"Role that `cvlaunch targets policy {self.target_name}` prints"
            )
        yield from self._check_secrets(job)
        yield from self._check_claims(job)
        nodes = self._nodes()
        if nodes is not None:
            yield from self._check_gpus(job, nodes)
            yield from self._check_disk(job, nodes)
        keys = self.target.storage_secret or self.target.service_account
        if not keys and {scheme(place) for place in places(job)} & {"s3", "gs"}:
            message = "the target has neither storage_secret nor service_account, by which pods could reach the store"
            yield Problem("storage_secret", message, fatal=False)

    def _check_secrets(self, job: Job) -> Iterator[Problem]:
        target, stored = self.target, stored_secrets(job.spec.secrets)
        wanted = [("image_pull_secrets", name, "") for name in target.image_pull_secrets]
        wanted += [("storage_secret", target.storage_secret, "")] if target.storage_secret else []
        wanted += [(f"secrets.{variable}", name, entry) for variable, (name, entry) in stored.items()]
        for key, name, entry in wanted:
            try:
                found = self._cluster.get(self._cluster.path("secrets", name))
            except AuthError:  # who may not read Secrets may use them all the same
                continue
            if found is None:
                yield Problem(key, f"there is no Secret {name} in {self._cluster.where}: make it, or correct the name")
            elif entry and entry not in (found.get("data") or {}):
                there = ", ".join(found.get("data") or {}) or "none"
                yield Problem(key, f"the Secret {name} has no key {entry}: correct it; there are {there}")

    def _check_claims(self, job: Job) -> Iterator[Problem]:
        wanted = [*((f"data.{channel.name}", channel.uri) for channel in job.channels), ("output", job.output)]
        claims = {split_uri(uri)[0]: key for key, uri in wanted if scheme(uri) == "pvc"}
        for claim, key in sorted(claims.items()):
            try:
                found = self._cluster.get(self._cluster.path("persistentvolumeclaims", claim))
            except AuthError:
                continue
            if found is None:
                message = f"there is no PersistentVolumeClaim {claim} in {self._cluster.where}"
                yield Problem(key, f"{message}: make it, or correct the name (`cvlaunch targets probe`)")
            elif found.get("status", {}).get("phase") == "Lost":
                yield Problem(key, f"the PersistentVolumeClaim {claim} has lost its volume: use another one")
            else:
                yield from _check_modes(claim, found["spec"]["accessModes"], key, job.spec.resources.nodes)

    def _nodes(self) -> list[Json] | None:
        """None where they are hidden; and where an autoscaler may bring nodes that nobody sees yet."""
        if self.target.scales_up:
            return None
        try:
            return list(self._cluster.list(self._cluster.path("nodes")))
        except AuthError:
            return None

    def _check_gpus(self, job: Job, nodes: Sequence[Json]) -> Iterator[Problem]:
        """Whether some node has them."""
        resources, target = job.spec.resources, self.target
        if not resources.gpus:
            return
        having = {node["metadata"]["name"]: _allocatable(node, target.gpu_resource) for node in nodes}
        most = max(having.values(), default=0)
        if most < resources.gpus:
            kind = target.gpu_resource
            others = sorted({name for node in nodes for name in _resources(node) if is_gpu(name)} - {kind})
            message = f"{resources.gpus} x {kind} on one node wanted, and no node has more than {most}: ask for fewer"
            if not most:
                named = ", ".join(others) or "no GPUs"
                message = f"no node has {kind}: see gpu_resource of the target; there are {named}"
            yield Problem("resources.gpus", f"{message}; {_OR_SCALES}")
            return
        wanted = node_requirement(resources.gpu, target.gpu_label, values=target.gpu_values)
        if wanted is None:
            return
        there = {words.labels_of(node).get(wanted.key, "") for node in nodes if having[node["metadata"]["name"]]}
        if not there & {*wanted.values}:
            found = ", ".join(sorted(filter(None, there)))
            says = f"nodes with GPUs have {wanted.key}: {found}" if found else f"no node has the label {wanted.key}"
            message = f"no node has {', '.join(resources.gpu)} ({says}): see gpu_label and gpu_values of the target"
            yield Problem("resources.gpu", f"{message}; {_OR_SCALES}")

    def _check_disk(self, job: Job, nodes: Sequence[Json]) -> Iterator[Problem]:
        """Whether some node's disk would do, were it empty. A node may not say, and an overlay ask for less."""
        sizes = [parse_quantity(_resources(node).get("ephemeral-storage")) for node in nodes]
        most = max((size for size in sizes if size is not None), default=job.disk)
        if most < job.disk:
            message = (
                f"{format_size(job.disk)} on one node wanted, and no node has more than {format_size(most)} for pods"
            )
            sure = None not in sizes and self.target.overlay is None
            yield Problem("resources.disk", f"{message}: ask for less; {_OR_SCALES}", fatal=sure)

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        job, *others = _documents(plan.text)
        self._check_found_again(job, plan.run_id)
        if attempt > 1:
            self._clear(plan.run_id)
            job["spec"]["template"]["metadata"]["labels"][words.SUBMISSION] = str(attempt)
        with self._blamed():
            self._try_out(job)
            made, is_new = self._create(job)
        documents = [*others, *([_secret(job, secrets)] if secrets else [])]
        try:
            for document in documents:
                self._put(_owned(document, _owner(made)), is_ours=attempt > 1 or not is_new)
        except BaseException:  # Ctrl-C, too: a Job that lacks a part would wait for ever
            if is_new:
                self._cluster.delete(self._job_path(plan.run_id))
            raise
        return self._handle(plan.run_id)

    def _check_found_again(self, job: Json, run_id: str) -> None:
        """SpecError where an overlay or `labels` took away what a run is found by."""
        template = job["spec"]["template"]
        ids = (words.labels_of(obj).get(words.RUN_ID) for obj in (job, template))
        kept = {job["metadata"]["name"], *ids} == {run_id} and words.is_ours(job)
        if not (kept and _inline_job(job) and words.main_of(template)):
            raise SpecError(
                "a run is found by its name, by the labels app.kubernetes.io/managed-by and cvlaunch/run-id of Job and "
                f"pods, and by their annotation {words.JOB_JSON} and container {CONTAINER}: leave them as they are",
                key="labels" if self.target.overlay is None else "overlay",
            )

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Our own manifests are valid: what the cluster objects to was most likely changed by the overlay."""
        try:
            yield
        except SpecError as error:
            if error.key is not None or self.target.overlay is None:
                raise
            raise SpecError(error.message, key="overlay") from error

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        """Several at a time: the API server has no call for many."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda plan: self.submit(plan, secrets, attempt=attempt), plans))

    def _try_out(self, job: Json) -> None:
        """The pod, without making it: what admission refuses would else be an event that nobody reads.

        Quota is no reason to refuse, because it may be free by the time. Who may not create pods finds out later.
        """
        template = job["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"]}, "spec": template["spec"]}
        pod["metadata"]["generateName"] = f"{job['metadata']['name']}-"
        pod["metadata"]["ownerReferences"] = [{**_owner(job), "controller": True}]  # some clusters refuse bare pods
        try:
            self._cluster.create(self._cluster.path("pods"), pod, dryRun="All", **_STRICT)
        except (AuthError, CapacityError):
            return

    def _create(self, job: Json) -> tuple[Json, bool]:
        """The Job as the cluster has it, and whether it is new: one that holds the same job was sent before."""
        run_id = job["metadata"]["name"]
        try:
            return self._cluster.create(self._cluster.path("jobs"), job, **_STRICT), True
        except ConflictError as error:
            there = self._job(run_id)
            if there is None or _inline_job(there) != _inline_job(job):
                raise ConflictError(
                    f"{self._cluster.where} has another Job {run_id}; choose another --run-id, or delete that one"
                ) from error
            return there, False

    def _put(self, document: Json, *, is_ours: bool) -> None:
        """In place of one that an earlier submission of this run left. is_ours: what to believe of one that can't be
        read."""
        kind, name = document["kind"], document["metadata"]["name"]
        path = self._cluster.path(_RESOURCES[kind], name)
        try:
            self._cluster.create(self._cluster.path(_RESOURCES[kind]), document)
        except ConflictError as error:
            with contextlib.suppress(AuthError):
                there = self._cluster.get(path)
                is_ours = there is None or words.labels_of(there).get(words.RUN_ID) == name
            if not is_ours:
                raise ConflictError(
                    f"{self._cluster.where} has another {kind} {name}; choose another --run-id, or delete that one"
                ) from error
            self._cluster.delete(path)
            self._cluster.create(self._cluster.path(_RESOURCES[kind]), document)

    def _clear(self, run_id: str) -> None:
        """Away with the ended Job and what belongs to it, so that its name is free."""
        path = self._job_path(run_id)
        job = self._cluster.get(path)
        if job and not (words.is_over(job) or job["metadata"].get("deletionTimestamp")):
            raise ConflictError(
                f"the Job {run_id} in {self._cluster.where} goes on: somebody else has resumed it; `cvlaunch cancel "
                f"{run_id}` ends it"
            )
        self._cluster.delete(path, propagation="Foreground")
        deadline = time.monotonic() + _GONE_S
        while self._cluster.get(path) is not None:
            if time.monotonic() > deadline:
                raise ConflictError(f"the earlier Job {run_id} in {self._cluster.where} does not go away; delete it")
            time.sleep(0.2)

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        found = {words.labels_of(job)[words.RUN_ID] for job in self._jobs(run_ids)}
        return {run_id: self._handle(run_id) for run_id in run_ids if run_id in found}

    def adopt(self, name: str) -> Adopted:
        """A Job that a colleague, Argo CD or kubectl applied from a rendering."""
        job = self._job(name)
        if job is None:
            raise SpecError(f"there is no Job {name!r} in {self._cluster.where}")
        text = _inline_job(job)
        if text is None:
            raise SpecError(f"Job {name!r} in {self._cluster.where} holds no job of cvlaunch ({words.JOB_JSON})")
        documents = [_as_sent(job)]
        if job["spec"].get("completionMode") == "Indexed":
            service = self._cluster.get(self._cluster.path("services", name))
            documents += [_as_sent(service)] if service else []
        has_runner = words.has_runner(job["spec"]["template"])
        return Adopted(self._handle(name), dump_yaml(documents), JobFile.from_bytes(text.encode()), has_runner)

    # -- what became of it --------------------------------------------------------------------------------------------

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """One LIST of Jobs for all; pods only of those that wait or have just ended. What can never start is ended."""
        run_ids = [handle.native for handle in handles]
        jobs = {job["metadata"]["name"]: job for job in self._jobs(run_ids)}
        now = self._cluster.now
        seen = self._seen({run_id: jobs.get(run_id) for run_id in run_ids}, now)
        given_up = {run_id: why for run_id, found in seen.items() if (why := self._give_up(run_id, found, now))}
        if given_up:
            seen |= self._seen({run_id: self._job(run_id) for run_id in given_up}, now)
        answers = {run_id: words.status_of(found, now=now) for run_id, found in seen.items()}
        for run_id, why in given_up.items():
            if seen[run_id].job is None:  # it was held back by a queue, and is deleted
                answers[run_id] = Status(State.ERROR, "deleted", reason=why)
        return {handle: answers[handle.native] for handle in handles}

    def _give_up(self, run_id: str, found: Seen, now: float) -> str:
        """Ends a run that can never start; why. Empty for all others."""
        why = words.stuck(found, now=now, patience_s=self.target.pull_patience)
        if not why or (why.startswith(words.CAPACITY) and self._has_begun(run_id)):
            return ""
        try:
            self._end(run_id, why)
        except AuthError:  # who may only look leaves it to others
            return ""
        return why

    def _has_begun(self, run_id: str) -> bool:
        """Pods that were evicted leave no trace in the cluster. Nobody knows: it has.

        Asked once: then the Job says no more that it has to begin.
        """
        try:
            store = self._run_folder(run_id)
            if store is not None and store.head(STARTED) is None:
                return False
            change = {"metadata": {"annotations": {words.MAX_WAIT: None}}}
            self._cluster.patch(self._job_path(run_id), change, form="merge")
        except CvlaunchError:
            return True
        return True

    def _seen(self, jobs: Mapping[str, Json | None], now: float) -> dict[str, Seen]:
        there = {run_id: job for run_id, job in jobs.items() if job is not None}
        over = [run_id for run_id, job in there.items() if words.needs_pods(job) and words.is_over(job)]
        waiting = [run_id for run_id, job in there.items() if words.needs_pods(job) and not words.is_over(job)]
        pods = self._pods([*over, *waiting[: _NAMES_A_CALL - len(over) % _NAMES_A_CALL]])
        slow = [pod for found in pods.values() for pod in found if words.slow_to_set_up(pod, now)]
        few = len(jobs) <= _FEW
        warnings = self._warnings() if few and (slow or not pods.keys() >= {*waiting}) else []
        refused, held = _refusals(warnings), _held(warnings, slow, now)
        queued = [job for job in there.values() if job["spec"].get("suspend") and not words.is_over(job)]
        queue = queue_words(self._cluster) if few and queued else {}
        return {
            run_id: Seen(
                job,
                pods=_of_this_job(pods.get(run_id, ()), job),
                refused=refused.get(job["metadata"]["uid"], "") if job else "",
                held=held,
                queue=queue.get(job["metadata"]["uid"], "") if job else "",
            )
            for run_id, job in jobs.items()
        }

    def _jobs(self, run_ids: Sequence[str]) -> Iterator[Json]:
        """Of these runs. More than fit into a selector are looked for among all of ours."""
        path = self._cluster.path("jobs")
        if len(run_ids) > _NAMES_A_CALL:
            wanted = {*run_ids}
            everything = self._cluster.list(path, labels=words.MANAGED)
            yield from (job for job in everything if words.labels_of(job).get(words.RUN_ID) in wanted)
        elif run_ids:
            yield from self._cluster.list(path, labels=_any_of(run_ids))

    def _pods(self, run_ids: Sequence[str]) -> dict[str, list[Json]]:
        """By run, the oldest first."""
        found: dict[str, list[Json]] = {}
        for at in range(0, len(run_ids), _NAMES_A_CALL):
            some = _any_of(run_ids[at : at + _NAMES_A_CALL])
            for pod in self._cluster.list(self._cluster.path("pods"), labels=some):
                found.setdefault(words.labels_of(pod)[words.RUN_ID], []).append(pod)
        for pods in found.values():
            pods.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]))
        return found

    def _warnings(self) -> list[Json]:
        """What controllers and nodes have told lately, the oldest first. Pods say themselves what else there is."""
        try:
            events = list(self._cluster.list(self._cluster.path("events"), fields=_TELLING))
        except AuthError:
            return []
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """From its pods; from the output store what they have no more."""
        run_id = handle.native
        ended = seldom(lambda: self.status([handle])[handle].state.terminal)
        return run_logs(
            self._cluster, run_id, lambda: self._run_folder(run_id), ended=ended if follow else None, since=since
        )

    def _run_folder(self, run_id: str) -> Store | None:
        """None if the Job, which says where it is, is gone."""
        job = self._job(run_id)
        text = _inline_job(job) if job else None
        if text is None:
            return None
        uri = join_uri(JobFile.from_bytes(text.encode()).output, run_id)
        return self.store(uri) or open_store(uri, self.target.storage.options)

    def cancel(self, handle: Handle) -> None:
        self._end(handle.native, "cancelled")

    def _end(self, run_id: str, why: str) -> None:
        """The Job stays, as evidence, and its pods go with their grace. One that Kueue holds back would stay in its
        queue: it has nothing to show and is deleted."""
        job = self._job(run_id)
        if job is None or words.is_over(job):
            return
        if job["spec"].get("suspend"):
            self._cluster.delete(self._job_path(run_id))
            return
        change = {"metadata": {"annotations": {words.STOPPED: why}}, "spec": {"activeDeadlineSeconds": 1}}
        job = self._cluster.patch(self._job_path(run_id), change, form="merge")
        if job and job["spec"].get("suspend"):  # just now: its clock stands still
            self._cluster.delete(self._job_path(run_id))

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        """In the container of the first node, with the command's variables where our runner has started one."""
        from launcher.kube.sockets import exec_in

        run_id = handle.native
        running = [pod for pod in self._pods([run_id]).get(run_id, ()) if "running" in _state(pod)]
        if not running:
            raise SpecError(f"no pod of {run_id} is running; a command runs only beside a run that is going on")
        pod = min(running, key=words.completion_index)
        if words.has_runner(pod):
            script = Path(beside.__file__).read_text(encoding="utf-8")
            command = ["python3", "-c", script, run_id, DEFAULT_ROOT, *command]
        return exec_in(self._cluster, pod["metadata"]["name"], CONTAINER, command, tty=tty)

    def remove(self, handle: Handle) -> None:
        job = self._job(handle.native)
        self._cluster.delete(self._job_path(handle.native))
        if job is None or job["spec"].get("completionMode") == "Indexed":
            self._remove_service(handle.native)

    def _remove_service(self, run_id: str) -> None:
        """One that was applied by hand belongs to no Job, and would stay."""
        path = self._cluster.path("services", run_id)
        with contextlib.suppress(AuthError):
            service = self._cluster.get(path)
            if service and words.labels_of(service).get(words.RUN_ID) == run_id:
                self._cluster.delete(path)

    def store(self, uri: str) -> Store | None:
        if scheme(uri) != "pvc":
            return None
        claim, path = split_uri(uri)
        target = self.target
        spec = HelperSpec(
            claim,
            image=lambda: self._helper_image(path),
            run_as_user=target.run_as_user,
            fs_group=target.fs_group,
            service_account=target.service_account,
            priority_class=target.priority_class,
            pull_secrets=target.image_pull_secrets,
            tolerations=target.tolerations,
            node_selector={} if target.scales_up else target.node_selector,  # no node has to come for it
            labels=target.labels,
            annotations=target.annotations,
            queue=target.queue,
        )
        return open_volume(self._cluster, spec, path, in_place=True)

    def _helper_image(self, path: str) -> str:
        """The nodes have the run's own already."""
        if self.target.helper_image is not None:
            return self.target.helper_image
        job = self._job(path.rpartition("/")[2])
        container = words.main_of(job["spec"]["template"]) if job else {}
        if not container:
            raise SpecError(
                f"target {self.target_name!r} doesn't say which image can read its volumes; add helper_image: an image "
                "with Python 3",
                key="helper_image",
            )
        return str(container["image"])

    # -- parts --------------------------------------------------------------------------------------------------------

    def _handle(self, run_id: str) -> Handle:
        return Handle(self.name, self.target_name, run_id)

    def _job_path(self, run_id: str) -> str:
        return self._cluster.path("jobs", run_id)

    def _job(self, run_id: str) -> Json | None:
        return self._cluster.get(self._job_path(run_id))


class OpenShiftBackend(KubernetesBackend):
    """The same with other values in its target: nothing here but the names."""

    name: ClassVar[str] = "openshift"
    Target: ClassVar[type[BaseTarget]] = OpenShiftTarget


_RESOURCES = {"Secret": "secrets", "Service": "services"}
_STRICT = {"fieldValidation": "Strict"}
"""A field that nobody knows is refused, as kubectl has it; otherwise it would be left out without a word."""


# -- objects ----------------------------------------------------------------------------------------------------------


def _documents(text: str) -> list[Json]:
    return [document for document in yaml.safe_load_all(text) if document]


def _inline_job(job: Json) -> str | None:
    """job.json of a Job that our template made."""
    found = (job["spec"]["template"].get("metadata") or {}).get("annotations") or {}
    return found.get(words.JOB_JSON)


def _owner(job: Json) -> Json:
    """A Job that was not sent has no uid yet."""
    metadata = job["metadata"]
    return {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata.get("uid", _NO_UID)}


_NO_UID = "00000000-0000-0000-0000-000000000000"


def _check_modes(claim: str, modes: Sequence[str], key: str, nodes: int) -> Iterator[Problem]:
    """Whether so many nodes can use a claim for what the job's key asks of it: to read, or to write its output."""
    named, written = ", ".join(modes), key == "output"
    if written and {*modes} == {"ReadOnlyMany"}:
        yield Problem(key, f"claim {claim} is {named}, and results are written: use another")
    elif nodes > 1 and not {"ReadWriteMany", "" if written else "ReadOnlyMany"} & {*modes}:
        message = f"claim {claim} is {named}, and several nodes need ReadWriteMany: use another, or one node"
        yield Problem("resources.nodes", message)


def _owned(document: Json, owner: Json) -> Json:
    return {**document, "metadata": {**document["metadata"], "ownerReferences": [owner]}}


def _secret(job: Json, values: Mapping[str, str]) -> Json:
    name, labels = job["metadata"]["name"], job["metadata"]["labels"]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": labels},
        "stringData": {**values},
    }


def _as_sent(found: Json) -> Json:
    """Without what the cluster has added to it, so that it can be sent again."""
    kept = {
        key: found["metadata"][key]
        for key in ("name", "namespace", "labels", "annotations")
        if key in found["metadata"]
    }
    kept["annotations"] = {k: v for k, v in kept.get("annotations", {}).items() if k not in _NOT_SENT}
    sent = {"apiVersion": found["apiVersion"], "kind": found["kind"], "metadata": kept, "spec": {**found["spec"]}}
    for key in ("selector", "suspend", "manualSelector") if found["kind"] == "Job" else ("clusterIPs",):
        sent["spec"].pop(key, None)
    if found["kind"] == "Job":
        template = sent["spec"]["template"]
        labels = {k: v for k, v in words.labels_of(template).items() if not k.endswith(("controller-uid", "job-name"))}
        sent["spec"]["template"] = {**template, "metadata": {**template["metadata"], "labels": labels}}
    return sent


_NOT_SENT = ("kubectl.kubernetes.io/last-applied-configuration", "batch.kubernetes.io/job-tracking", words.STOPPED)


def _refusals(warnings: Sequence[Json]) -> dict[str, str]:
    """By the Job's uid: what its controller last said of a pod that it could not make."""
    said = [event for event in warnings if event.get("reason") == "FailedCreate"]
    return {event["involvedObject"].get("uid", ""): event.get("message", "") for event in said}


def _held(warnings: Sequence[Json], pods: Sequence[Json], now: float) -> dict[str, str]:
    """By the pod's uid: what its node last said that it lacks."""
    there = {pod["metadata"]["uid"]: pod for pod in pods}
    told = [(uid, event) for event in warnings if (uid := event["involvedObject"].get("uid", "")) in there]
    return {uid: said for uid, event in told if (said := words.held_by(event, there[uid], now))}


def _any_of(run_ids: Sequence[str]) -> str:
    return f"{words.RUN_ID} in ({','.join(run_ids)})"


def _of_this_job(pods: Sequence[Json], job: Json | None) -> tuple[Json, ...]:
    """Not of an earlier Job of the same name, whose pods are still going."""
    uid = job["metadata"]["uid"] if job else None
    return tuple(pod for pod in pods if uid in [owner["uid"] for owner in pod["metadata"].get("ownerReferences") or ()])


def _state(pod: Json) -> Mapping[str, Any]:
    return words.main_container(pod).get("state") or {}


def _resources(node: Json) -> Mapping[str, str]:
    """What pods may have of it."""
    return (node.get("status") or {}).get("allocatable") or {}


def _allocatable(node: Json, resource: str) -> int:
    return int(_resources(node).get(resource, 0))


def _check_foreign(job: Job) -> Iterator[Problem]:
    """What only our runner does."""
    if job.spec.runner != "none":
        return
    yield from (Problem(key, why) for key, why in asked_of_foreign(job, _FOREIGN))
    for channel in job.channels:
        if channel.access != "mounted":
            yield Problem(f"data.{channel.name}", f"{channel.uri} can't be fetched without our runner; give pvc://…")
