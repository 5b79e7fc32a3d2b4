"""Kubernetes as its users meet it: what a cluster refuses, what happens to pods, and what a run says of it all.

The promises that every backend keeps are in the conformance suite; trainings in test_kube_training.py.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import ConflictError, Run, SpecError, State, attach, render, runs, submit
from launcher.backends.base import Backend, Handle
from launcher.backends.kubernetes import KubernetesBackend
from launcher.errors import AuthError, CapacityError, CvlaunchError, UnreachableError, UnsupportedError
from launcher.kube.target import KubernetesTarget
from launcher.kube.words import RUN_ID, SUBMISSION
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.status import Status
from launcher.submission import backend_of
from launcher.testing.conformance import text_of
from tests.cli_tool import cli
from tests.services.kube import KubeCluster, kube_cluster
from tests.services.kube.resources import find_resource
from tests.services.s3 import S3Server
from tests.worlds.kubernetes import KubernetesWorld, kubernetes_world

pytestmark = pytest.mark.needs("podman", "debootstrap")

NEVER = "registry.example.com/team/never:1"
"""An image that no registry has: the pod waits, and no container is started."""
Json = dict[str, Any]
Prepare = Callable[[KubeCluster, str], object]


@dataclasses.dataclass(frozen=True)
class Site:
    """A user's folder with a target `there`, a namespace. target: its keys, of which a test changes some."""

    project: Path
    cluster: KubeCluster
    namespace: str
    target: Mapping[str, Any]
    job: Mapping[str, Any]

    def write(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}) -> Path:
        keys = {**self.target, **target}
        (self.project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"there": keys}}, sort_keys=False))
        (self.project / "job.yaml").write_text(yaml.safe_dump({**self.job, **job}, sort_keys=False))
        return self.project / "job.yaml"

    def send(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}, **options: Any) -> Run:
        return submit(self.write(target, job), target="there", **options)

    def refused(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}, **options: Any) -> CvlaunchError:
        with pytest.raises(CvlaunchError) as caught:
            self.send(target, job, **options)
        return caught.value

    def run(self, script: str, target: Mapping[str, Any] = {}, **job: Any) -> Run:
        """A run of Python, which is under way or waits for something."""
        return self.send(target, {"command": ["/opt/venv/bin/python", "-c", script], **job})

    def left(self) -> dict[str, list[str]]:
        """Names of what a run makes in the cluster, by kind."""
        found = {kind: self.cluster.objects(kind, self.namespace) for kind in ("jobs", "pods", "services", "secrets")}
        return {
            kind: names for kind, objs in found.items() if (names := [o["metadata"]["name"] for o in objs if ours(o)])
        }

    def pods(self, run: Run) -> list[Json]:
        return self.cluster.pods(self.namespace, run.id)

    def pod(self, run: Run, phase: str = "Running") -> str:
        """The name of its pod in that phase; waits for it."""

        def there() -> list[str]:
            return [p["metadata"]["name"] for p in self.pods(run) if p["status"].get("phase") == phase]

        (name,) = self.cluster.wait(there)
        return name


def ours(obj: Json) -> bool:
    return RUN_ID in (obj["metadata"].get("labels") or {})


@pytest.fixture
def site(kube: KubeCluster, moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Nothing runs there: the image never comes."""
    namespace = kube.namespace()
    moto_s3.make_bucket(namespace)
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    storage = {"endpoint": moto_s3.endpoint, "region": "us-east-1"}
    target = {"backend": "kubernetes", "namespace": namespace, "output": f"s3://{namespace}/runs", "storage": storage}
    return Site(tmp_path, kube, namespace, target, {"name": "wrong", "image": NEVER, "command": ["true"]})


@pytest.fixture(scope="session", params=["kubernetes"])
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], KubernetesWorld]:
    return kubernetes_world(request, request.param)


@pytest.fixture
def live(
    kube: KubeCluster, make_world: Callable[[Path], KubernetesWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Site:
    """Pods run there, with results in S3, or on a claim of OpenShift."""
    world = make_world(tmp_path)
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    job = {"name": "life", "image": world.settings[0].removeprefix("image=")}
    return Site(tmp_path, kube, world.namespace, world.target, job)


on_openshift = pytest.mark.parametrize("make_world", ["openshift"], indirect=True)
on_both = pytest.mark.parametrize("make_world", ["kubernetes", "openshift"], indirect=True)


def until(met: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 180
    while not (found := met()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def until_status(run: Run, wanted: Callable[[Status], bool]) -> Status:
    seen: list[Status] = []

    def met() -> Status | None:
        seen.append(run.status())
        return seen[-1] if wanted(seen[-1]) else None

    try:
        return until(met)
    except AssertionError:
        raise AssertionError(f"last seen: {seen[-1]}") from None


def until_state(run: Run, *states: State) -> Status:
    return until_status(run, lambda status: status.state in states)


def end_of(run: Run) -> Status:
    return until_status(run, lambda status: status.state.terminal)


def resources(**keys: object) -> dict[str, object]:
    return {"resources": keys}


# -- the way to the cluster -------------------------------------------------------------------------------------------


def no_kubeconfig(site: Site, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setenv("KUBECONFIG", str(site.project / "nowhere"))
    return {}


def expired(site: Site, patch: pytest.MonkeyPatch) -> dict[str, str]:
    site.cluster.expire_tokens(renew=False)
    return {}


def broken_plugin(site: Site, patch: pytest.MonkeyPatch) -> dict[str, str]:
    script = site.cluster.kubeconfig.parent / "token-plugin.sh"
    script.write_text("echo 'Error: your session has ended' >&2\nexit 3\n")
    return {"context": "exec"}


def missing_plugin(site: Site, patch: pytest.MonkeyPatch) -> dict[str, str]:
    (site.cluster.kubeconfig.parent / "token-plugin").unlink()
    return {"context": "exec"}


FILE, KEY = "{project}/targets.yaml:", ": targets.there."
WAYS: dict[str, tuple[Callable[..., Mapping[str, str]], type[CvlaunchError], list[str]]] = {
    "no kubeconfig": (no_kubeconfig, SpecError, [FILE, KEY + "kubeconfig: ", "/nowhere nor a service account"]),
    "no such file": (lambda *_: {"kubeconfig": "/no/such"}, SpecError, [FILE, "there is no file /no/such: correct it"]),
    "context": (lambda *_: {"context": "tset"}, SpecError, [FILE, KEY + "context: ", "did you mean 'test'?", "stale"]),
    "gone": (lambda *_: {"context": "gone"}, UnreachableError, ["context gone (http://127.0.0.1:1): it does not"]),
    "stale": (lambda *_: {"context": "stale"}, AuthError, ["context stale (", "Unauthorized", ": log in again, or"]),
    "expired": (expired, AuthError, ["context test (", "Unauthorized", ": log in again, or renew the token"]),
    "plugin": (broken_plugin, AuthError, ["context exec (", "token-plugin' gave no token: Error: your session has"]),
    "no plugin": (missing_plugin, AuthError, ["token-plugin' can't be run (No such file or directory): install it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_a_cluster_that_can_t_be_reached(site: Site, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    prepare, kind, words = WAYS[name]
    error = site.refused(prepare(site, monkeypatch))
    assert isinstance(error, kind), repr(error)
    assert [w for w in words if w.format(project=site.project) not in str(error)] == [], str(error)
    assert "\n" not in str(error) and runs() == [] and site.left() == {}


# -- what is seen before anything is sent -----------------------------------------------------------------------------


def nothing(cluster: KubeCluster, namespace: str) -> None:
    pass


def claim(mode: str = "ReadWriteOnce", **spec: object) -> Prepare:
    def make(cluster: KubeCluster, namespace: str) -> None:
        body = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}, **spec}
        cluster.create("PersistentVolumeClaim", namespace, {"metadata": {"name": "runs"}, "spec": body})

    return make


def secret(cluster: KubeCluster, namespace: str) -> None:
    cluster.create("Secret", namespace, {"metadata": {"name": "keys"}, "stringData": {"one": "1", "two": "2"}})


def disks(size: str | None) -> Prepare:
    """Of all nodes: EKS' own have 20 GiB, of which the machine has a part, and write the rest in bytes."""

    def make(cluster: KubeCluster, _: str) -> None:
        for node in cluster.objects("nodes"):
            node["status"]["allocatable"].pop("ephemeral-storage")
            node["status"]["allocatable"] |= {"ephemeral-storage": size} if size else {}
            cluster.put(node)

    return make


ON_CLAIM = {"output": "pvc://runs/vision", "helper_image": NEVER}
SCALES = "; or, if nodes come when they are needed, write scales_up: true in the target"
PRODUCT = "nvidia.com/gpu.product"

Case = tuple[Prepare, Mapping[str, Any], Mapping[str, Any], str]
SEEN: dict[str, Case] = {
    "gpus": (nothing, {}, resources(gpus=3),
             "resources.gpus: 3 x nvidia.com/gpu on one node wanted, and no node has more than 2: ask for fewer"
             f"{SCALES}"),
    "gpu model": (nothing, {}, resources(gpus=1, gpu="H100"),
                  f"resources.gpu: no node has H100 (nodes with GPUs have {PRODUCT}: NVIDIA-A100-SXM4-40GB): see"),
    "gpu label": (nothing, {"gpu_label": "gke"}, resources(gpus=1, gpu="A100"),
                  "resources.gpu: no node has A100 (no node has the label cloud.google.com/gke-accelerator): see"),
    "gpu resource": (nothing, {"gpu_resource": "amd.com/gpu"}, resources(gpus=1),
                     "no node has amd.com/gpu: see gpu_resource of the target; there are nvidia.com/gpu,"),
    "gpu part": (nothing, {"gpu_resource": "nvidia.com/mig-1g.5gb"}, resources(gpus=8), "and no node has more than 7"),
    "disk": (disks("18242267924"), {}, {},
             "resources.disk: 20.0 GiB on one node wanted, and no node has more than 17.0 GiB for pods: ask for less"
             f"{SCALES}"),
    "no gpu": (nothing, {"gpu_resource": "gpu"}, {}, "gpu_resource: expected a resource such as nvidia.com/gpu or"),
    "claim": (nothing, ON_CLAIM, {}, "there.output: there is no PersistentVolumeClaim runs in context test ("),
    "claim of data": (claim(), ON_CLAIM, {"data": {"train": "pvc://data/x"}}, "data.train: context test ("),
    "nodes": (claim(), ON_CLAIM, resources(nodes=2),
              "resources.nodes: claim runs is ReadWriteOnce, and several nodes need ReadWriteMany: use another, or"),
    "a claim that is only read": (claim("ReadOnlyMany"), ON_CLAIM, {},
                                   "there.output: claim runs is ReadOnlyMany, and results are written: use another"),
    "pull secret": (nothing, {"image_pull_secrets": ["quay"]}, {}, "image_pull_secrets: there is no Secret quay in"),
    "storage secret": (nothing, {"storage_secret": "s3"}, {}, "storage_secret: there is no Secret s3 in context test"),
    "secret": (nothing, {}, {"secrets": {"TOKEN": "store:keys/one"}}, "secrets.TOKEN: there is no Secret keys in"),
    "key": (secret, {}, {"secrets": {"A": "store:keys/three", "B": "store:keys/one"}},
            "secrets.A: the Secret keys has no key three: correct it; there are one, two"),
    "no key": (nothing, {}, {"secrets": {"A": "store:keys"}}, "secrets.A: 'store:keys' names no key of a Secret; it"),
    "memory": (nothing, {}, resources(memory="1GiB", shm="1GiB"),
               "resources.memory: 1.0 GiB is less than 1.5 GiB: 1.0 GiB of shared memory, which counts as memory, and "
               "512.0 MiB for the processes; write memory: 1536Mi or more, or less shm"),
    "spot": (nothing, {}, resources(spot=True), "resources.spot: the target doesn't say which nodes are spot; add"),
    "image": (nothing, {}, {"image": "Team/My image"}, "image: 'Team/My image' is no image; an image looks like"),
    "foreign": (nothing, {}, {"runner": "none", "code": {"root": "."}}, "code: a foreign image (runner: none) has"),
    "large": (nothing, {}, {"env": {"LONG": "x" * 200_000}}, "the job has more than 200000 bytes; put long values"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_before_anything_is_sent(site: Site, name: str) -> None:
    prepare, target, job, words = SEEN[name]
    prepare(site.cluster, site.namespace)
    error = site.refused(target, job)
    assert isinstance(error, SpecError) and words in str(error), str(error)
    assert name == "large" or str(error).startswith((f"{site.project}/targets.yaml:", f"{site.project}/job.yaml:"))
    assert runs() == [] and site.left() == {}


def test_disk_that_may_be_enough_is_not_refused(site: Site) -> None:
    """Nodes may come, an overlay may ask for less, and a node that says nothing of its disk may have it."""
    less = overlay(f"{POD}/containers/0/resources/requests/ephemeral-storage", "1Gi", "replace")
    words = "20.0 GiB on one node wanted, and no node has more than 15.0 GiB for pods: ask for less"
    disks("15Gi")(site.cluster, site.namespace)
    site.write(less)
    done = cli("render", "job.yaml", "--target", "there", "--check", cwd=site.project)
    assert done.returncode == 0 and f"warning: resources.disk: {words}" in done.stderr
    assert site.send(less).cancel() and site.send({"scales_up": True}).cancel()
    disks(None)(site.cluster, site.namespace)
    site.cluster.add_node("small", allocatable={"ephemeral-storage": "15Gi"})
    assert site.send().cancel()


def test_who_may_not_look_may_send_all_the_same(site: Site) -> None:
    """Secrets, claims, nodes and pods are looked at to help; the least Role has none of it."""
    for resource in ("secrets", "persistentvolumeclaims", "nodes"):
        site.cluster.forbid("*", resource)
    site.cluster.forbid("create", "pods")
    target = {"image_pull_secrets": ["quay"], "storage_secret": "s3"}
    run = site.send(target, {"secrets": {"A": "store:keys/three"}, **resources(gpus=3)})
    assert run.status().state is State.QUEUED


# -- what the cluster refuses -----------------------------------------------------------------------------------------


def denied(kind: str, code: int = 403) -> Prepare:
    return lambda cluster, _: cluster.deny("the label team is missing", kind=kind, code=code)


def quota(resource: str, most: str) -> Prepare:
    hard = {"metadata": {"name": "small"}, "spec": {"hard": {resource: most}}}
    return lambda cluster, namespace: cluster.create("ResourceQuota", namespace, hard)


def limits(**default: str) -> Prepare:
    limited = {"metadata": {"name": "usual"}, "spec": {"limits": [{"type": "Container", "default": default}]}}
    return lambda cluster, namespace: cluster.create("LimitRange", namespace, limited)


def restricted(cluster: KubeCluster, namespace: str) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.put({**(cluster.get("Namespace", "", namespace) or {}), "metadata": {"name": namespace, "labels": label}})


def overlay(path: str, value: object, op: str = "add") -> dict[str, object]:
    return {"overlay": [{"op": op, "path": path, "value": value}]}


FROM_HERE = {"secrets": {"TOKEN": "env:HOME"}}
WEBHOOK = (
    'admission webhook "policy.example.com" denied the request: the label team is missing: change what it objects to'
)
POD = "/spec/template/spec"
KEPT = "a run is found by its name, by the labels app.kubernetes.io/managed-by and cvlaunch/run-id of Job and pods, and"

REFUSED: dict[str, tuple[Prepare, Mapping[str, Any], Mapping[str, Any], type[CvlaunchError], str]] = {
    "role": (lambda cluster, _: cluster.forbid("create", "secrets"), {}, FROM_HERE, AuthError,
             'User "dev" cannot create resource "secrets" in API group "" in the namespace'),
    "namespace": (nothing, {"namespace": "nowhere"}, {}, SpecError,
                  'there.namespace: context test ({url}), namespace nowhere: namespaces "nowhere" not found (POST'),
    "no name": (nothing, {"namespace": "No Where"}, {}, SpecError, "there.namespace: context test ("),
    "quota of jobs": (quota("count/jobs.batch", "0"), {}, {}, CapacityError,
                      "exceeded quota: small, requested: count/jobs.batch=1, used: count/jobs.batch=0, limited: "
                      "count/jobs.batch=0: wait until runs have ended"),
    "quota of secrets": (quota("secrets", "0"), {}, FROM_HERE, CapacityError, "exceeded quota: small, requested:"),
    "quota of cores": (quota("requests.cpu", "8"), {}, {}, SpecError,
                       "resources: context test ({url}), namespace {ns}: pods"),
    "limit of cores": (limits(cpu="500m"), {}, resources(cpus=8), SpecError,
                       "must be less than or equal to cpu limit of 500m: a LimitRange of the namespace has set that"),
    "limit of memory": (limits(memory="512Mi"), {}, {}, SpecError,
                        "must be less than or equal to memory limit of 512Mi: a LimitRange of the namespace has set"),
    "webhook of jobs": (denied("jobs"), {}, {}, SpecError, WEBHOOK),
    "webhook of jobs, 400": (denied("jobs", 400), {}, {}, SpecError, WEBHOOK),
    "webhook of pods": (denied("pods"), {}, {}, SpecError, WEBHOOK),
    "webhook of secrets": (denied("secrets"), {}, FROM_HERE, SpecError, WEBHOOK),
    "pod security": (restricted, overlay(f"{POD}/securityContext", {"runAsUser": 0}, "replace"), {}, SpecError,
                     'there.overlay: context test ({url}), namespace {ns}: pods "'),
    "account": (nothing, {"service_account": "nope"}, {}, SpecError, 'there.service_account: context test ('),
    "priority": (nothing, {"priority_class": "nope"}, {}, SpecError, 'there.priority_class: context test ('),
    "unknown field": (nothing, overlay("/spec/backofLimit", 3), {}, SpecError,
                      'strict decoding error: unknown field "spec.backofLimit": correct what it names (`cvlaunch'),
    "type": (nothing, overlay("/spec/backoffLimit", "many"), {}, SpecError, "spec.backoffLimit of type int32"),
    "value": (nothing, overlay("/spec/backoffLimit", -1), {}, SpecError,
              "there.overlay: context test ({url}), namespace {ns}: spec.backoffLimit: Invalid value: -1: must be"),
    "two values": (nothing, {"overlay": {"spec": {"backoffLimit": -1, "completions": -2}}}, {}, SpecError,
                   "spec.completions: Invalid value: -2"),
    "restart policy": (nothing, overlay(f"{POD}/restartPolicy", "Always"), {}, SpecError,
                       'spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never": correct'),
    "mount": (nothing, overlay(f"{POD}/containers/0/volumeMounts/-", {"name": "no", "mountPath": "/x"}), {}, SpecError,
              '.name: Not found: "no": correct what it names (`cvlaunch render` shows what is sent)'),
    "toleration": (nothing, {"tolerations": [{"key": "a", "operator": "Maybe"}]}, {}, SpecError,
                   'spec.tolerations[0].operator: Unsupported value: "Maybe": supported values: "Equal", "Exists":'),
    "label": (nothing, {"labels": {"team": "my team"}}, {}, SpecError, 'metadata.labels: Invalid value: "my team":'),
    "other name": (nothing, overlay("/metadata/name", "mine"), {}, SpecError, f"there.overlay: {KEPT}"),
    "no labels": (nothing, {"overlay": {"metadata": {"labels": None}}}, {}, SpecError, f"there.overlay: {KEPT}"),
    "our label": (nothing, {"labels": {"app.kubernetes.io/managed-by": "Helm"}}, {}, SpecError,
                  f"there.labels: {KEPT}"),
    "other namespace": (nothing, overlay("/metadata/namespace", "other"), {}, SpecError,
                        "the namespace of the provided object does not match the namespace sent on the request:"),
    "old cluster": (lambda cluster, _: cluster.fail(404, path="/jobs", method="POST", body="404 page not found"), {},
                    {}, UnsupportedError, "the cluster is too old for it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cluster_refuses(site: Site, name: str) -> None:
    prepare, target, job, kind, words = REFUSED[name]
    prepare(site.cluster, site.namespace)
    error = site.refused(target, job)
    text = str(error)
    assert type(error) is kind, repr(error)
    assert words.format(url=site.cluster.url, ns=site.namespace) in text, text
    assert ("\n" not in text and "context test (" in text) or KEPT in text
    (run,) = runs()
    assert (run.record.state, run.handle) == (State.NOT_SUBMITTED, None)
    until(lambda: site.left() == {})


def test_openshift_s_constraint_names_the_backend_that_meets_it(kube: KubeCluster, site: Site) -> None:
    project = dataclasses.replace(site, target={**site.target, "namespace": kube.namespace(openshift=True)})
    error = project.refused()
    assert "must be in the ranges: [1000650000, 1000659999]" in str(error)
    assert "with `backend: openshift` the project chooses user and group" in str(error)
    assert project.send({"backend": "openshift"}).status().state in (State.QUEUED, State.STARTING)


def test_a_role_that_is_missing(site: Site) -> None:
    site.cluster.forbid("create", "jobs")
    error = site.refused()
    assert isinstance(error, AuthError) and runs() == []
    assert str(error) == (
        f"you may not create jobs in context test ({site.cluster.url}), namespace {site.namespace}: "
        "correct the target's `namespace`, or ask for the Role that `cvlaunch targets policy there` prints"
    )


def test_a_name_that_is_somebody_else_s(site: Site) -> None:
    container = {"name": "x", "image": NEVER}
    spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    site.cluster.create("Job", site.namespace, {"metadata": {"name": "taken-1"}, "spec": spec})
    error = site.refused(run_id="taken-1")
    assert isinstance(error, ConflictError)
    assert str(error).endswith(" has another Job taken-1; choose another --run-id, or delete that one")
    assert runs()[0].record.state is State.NOT_SUBMITTED
    assert site.cluster.get("Job", site.namespace, "taken-1") is not None


def test_messages_as_they_are_printed(site: Site) -> None:
    where = f"context test ({site.cluster.url}), namespace {site.namespace}"
    site.write(overlay("/spec/backoffLimit", -1))
    done = cli("submit", "job.yaml", "--target", "there", cwd=site.project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"cvlaunch: {site.project}/targets.yaml:9: targets.there.overlay: {where}: "
        "spec.backoffLimit: Invalid value: -1: must be greater than or equal to 0: "
        "correct what it names (`cvlaunch render` shows what is sent)\n"
    )
    run = site.send()
    site.cluster.forbid("list", "pods")
    done = cli("status", run.id, cwd=site.project)
    assert 'User "dev" cannot list resource "pods" in API group "" in the namespace' in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# -- what waits, and why ----------------------------------------------------------------------------------------------

PENDING: dict[str, tuple[Prepare, Mapping[str, Any], Mapping[str, Any], State, str, str]] = {
    "quota": (quota("pods", "0"), {}, {}, State.QUEUED, "FailedCreate",
              "the cluster makes no pod for it: Error creating: pods \"{run}-"),
    "gpus": (nothing, {"scales_up": True}, resources(gpus=3), State.QUEUED, "Pending/Unschedulable",
             "no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are"),
    "disk": (disks("18242267924"), {"scales_up": True}, {}, State.QUEUED, "Pending/Unschedulable",
             "no node takes it: 0/3 nodes are available: 3 Insufficient ephemeral-storage. preemption: 0/3 nodes are "
             "available: 3 No preemption victims found for incoming pod. It asks for 20Gi of disk: set resources.disk "
             "to less, or take larger disks"),
    "model": (nothing, {"scales_up": True}, resources(gpus=1, gpu="H100"), State.QUEUED, "Pending/Unschedulable",
              "no node takes it: 0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."),
    "claim": (claim(storageClassName="manual"), ON_CLAIM, {}, State.QUEUED, "Pending/Unschedulable",
              "no node takes it: 0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
    "image": (nothing, {}, {}, State.STARTING, "Pending/ImagePullBackOff",
              f'its image can\'t be pulled: Back-off pulling image "{NEVER}": ErrImagePull: rpc error: code ='),
    "queue": (nothing, {"queue": "nope"}, {}, State.QUEUED, "Suspended",
              "it waits in queue nope: LocalQueue nope doesn't exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", PENDING)
def test_what_waits_says_why(site: Site, name: str) -> None:
    prepare, target, job, state, native, words = PENDING[name]
    prepare(site.cluster, site.namespace)
    run = site.send(target, job)
    begin = words.format(run=run.id)
    status = until_status(run, lambda found: found.native == native and found.reason.startswith(begin))
    assert status.state is state
    if target is ON_CLAIM:  # a cancellation would wait for a place to leave its mark
        return
    assert run.cancel().state in (State.STOPPING, State.CANCELLED)
    assert end_of(run).state is State.CANCELLED
    until(lambda: not [pod for pod in site.pods(run) if pod["status"]["phase"] in ("Pending", "Running")])


def test_a_volume_that_can_t_be_mounted(site: Site) -> None:
    """In the first seconds that means nothing: our own Secret comes after the Job."""
    site.cluster.forbid("get", "secrets")  # so that nobody could look before
    run = site.send({}, {"secrets": {"TOKEN": "store:nope/token"}})
    site.cluster.wait(lambda: "FailedMount" in dict(site.cluster.events(site.namespace)))
    assert run.status().reason == ""
    pod = site.pods(run)[0]["metadata"]["name"]
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 30))
    site.cluster.store.change(("pods", site.namespace, pod), lambda found: found["status"].update(startTime=since))
    status = until(lambda: (found := run.status()).reason and found)
    assert status.state is State.STARTING
    assert status.reason == (
        "its node can't set it up: FailedMount: "
        'MountVolume.SetUp failed for volume "secrets" : secret "nope" not found'
    )


IMPATIENT = {"pull_patience": "1s"}


@pytest.mark.parametrize("image", [NEVER, "Registry.Example.com/x"])
def test_an_image_that_never_comes_ends_the_run(site: Site, image: str) -> None:
    target = {**IMPATIENT, **overlay(f"{POD}/containers/0/image", image, "replace")}
    run = site.send(target)
    status = end_of(run)
    assert status.state is State.ERROR
    assert status.reason.startswith("its image can't be pulled, for "), status
    assert image in status.reason
    assert not [pod for pod in site.pods(run) if pod["status"]["phase"] in ("Pending", "Running")]
    job = site.cluster.get("Job", site.namespace, run.id)
    assert job and job["spec"]["activeDeadlineSeconds"] == 1


def test_a_container_that_can_t_be_set_up_ends_the_run(live: Site) -> None:
    live.cluster.forbid("get", "secrets")  # so that nobody could look before
    run = live.run("print('never')", {**IMPATIENT, "storage_secret": "nope"})
    status = end_of(run)
    assert status.state is State.ERROR
    assert (
        status.reason.startswith("its container can't be set up, for ") and 'secret "nope" not found' in status.reason
    )


# -- the life of a run ------------------------------------------------------------------------------------------------

STEADY = """
import os, signal, sys, time
from launcher.contract import Layout, complete_checkpoint, newest_checkpoint
signal.signal(signal.SIGTERM, lambda *_: None)  # the file says what to do
layout = Layout.from_environment()
newest = newest_checkpoint(layout.checkpoints)
print("starts from", newest.name if newest else None, flush=True)
if newest:
    sys.exit(0)
step = layout.checkpoints / "1"
step.mkdir(parents=True)
(step / "state").write_text("half way")
complete_checkpoint(step, step=1)
print("goes on", flush=True)
while not layout.stop.exists():
    time.sleep(0.02)
sys.exit(75)
"""
"""Goes on until it is stopped; a second start ends at once."""


def steady(site: Site, target: Mapping[str, Any] = {}, **job: Any) -> Run:
    """A run that is under way and has a checkpoint, which may not be in its store yet."""
    run = site.run(STEADY, target, **job)
    until(lambda: "goes on" in text_of(run))
    return run


def starts(run: Run) -> list[str]:
    return [line.removeprefix("starts from ") for line in text_of(run).splitlines() if line.startswith("starts from")]


@on_openshift  # where what is saved is in its place at once
def test_a_pod_without_memory(live: Site) -> None:
    run = steady(live)
    live.cluster.kill_container(live.namespace, live.pod(run))
    status = end_of(run)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert status.reason.startswith(
        "out of memory: it used more than resources.memory, of which shared memory is a part"
    )
    again = run.resume()
    assert (again.id, again.handle) == (run.id, run.handle)
    assert end_of(again).state is State.SUCCEEDED
    assert starts(again)[-1] == "1", "its checkpoint was kept"
    (pod,) = live.pods(run)
    assert pod["metadata"]["labels"][SUBMISSION] == "2"


def test_a_runner_that_is_killed(live: Site) -> None:
    run = steady(live)
    live.cluster.kill_container(live.namespace, live.pod(run), reason="Error")
    status = end_of(run)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert status.reason == "the runner was killed by signal 9 (Killed)"


TAKEN: dict[str, Callable[[KubeCluster, str, str], None]] = {
    "node lost": lambda cluster, ns, pod: cluster.lose_node(_node(cluster, ns, pod)),
    "node pressure": lambda cluster, ns, pod: cluster.node_pressure(ns, pod),
    "drained": lambda cluster, ns, pod: cluster.evict(ns, pod),
    "deleted by hand": lambda cluster, ns, pod: cluster.delete_pod(ns, pod),
}


def _node(cluster: KubeCluster, namespace: str, pod: str) -> str:
    found = cluster.get("Pod", namespace, pod)
    assert found
    return str(found["spec"]["nodeName"])


@pytest.mark.parametrize(
    ("make_world", "how"),
    [("openshift" if how == "node lost" else "kubernetes", how) for how in TAKEN],
    indirect=["make_world"],
)
def test_a_pod_that_is_taken_away_comes_back(live: Site, how: str) -> None:
    """With its checkpoint, which is uploaded in the grace of a pod, or is in its place already."""
    run = steady(live)
    TAKEN[how](live.cluster, live.namespace, live.pod(run))
    status = end_of(run)
    assert (status.state, status.exit_code) == (State.SUCCEEDED, 0), status
    assert starts(run)[-1] == "1"


@pytest.mark.parametrize("how", ["drained", "deleted by hand"])
def test_a_pod_that_is_taken_away_before_it_has_a_checkpoint_comes_back(live: Site, how: str) -> None:
    """Its command dies of the TERM; only an eviction is marked as one."""
    script = """
import os, time
print("attempt", os.environ["CVLAUNCH_ATTEMPT"], flush=True)
time.sleep(0 if os.environ["CVLAUNCH_ATTEMPT"] == "2" else 600)
"""
    run = live.run(script)
    until(lambda: "attempt 1" in text_of(run))
    TAKEN[how](live.cluster, live.namespace, live.pod(run))
    status = end_of(run)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), status
    assert "attempt 2" in text_of(run)


def test_a_pod_that_is_deleted_without_grace(live: Site) -> None:
    run = steady(live)
    live.cluster.delete_pod(live.namespace, live.pod(run), grace_s=0)
    status = end_of(run)
    assert status.state is State.FAILED
    assert status.reason.startswith("its pod failed and is gone: Container train for pod "), status


def test_a_job_that_is_deleted_while_it_runs(live: Site) -> None:
    """What it left in its output store tells of it, once nothing is heard of it for ten minutes."""
    run, cancelled = steady(live), steady(live)
    cancelled.store().write("control/cancel", b"cancelled\n")
    for one in run, cancelled:
        delete_job(live, one)
    assert run.status().native == "gone"
    until(lambda: run.store().head("output/result.json") is not None)
    assert end_of(cancelled).state is State.CANCELLED
    assert run.status().state is State.UNKNOWN, "it left a checkpoint, and was to go on"
    refresh([run.record], ledger=Ledger(), now=lambda: time.time() + 601)
    assert Run(run.id).record.state is State.LOST
    assert end_of(run.resume()).state is State.SUCCEEDED
    delete_job(live, run)
    assert run.handle and backend_of(run.record).status([run.handle])[run.handle].native == "gone"
    assert Run(run.id).status().state is State.SUCCEEDED
    assert starts(run)[-1] == "1", "its log is in the output store"


def delete_job(site: Site, run: Run) -> None:
    options = {"propagationPolicy": "Background"}
    site.cluster.api.delete(find_resource("jobs"), site.namespace, run.id, options=options, query={})


def foreign(site: Site, base_image: str, script: str, target: Mapping[str, Any] = {}, **job: Any) -> Run:
    site.cluster.serve_image("registry.example.com/debian:12", image=base_image)
    command = ["/bin/sh", "-c", script]
    return site.send(target, {"runner": "none", "image": "registry.example.com/debian:12", "command": command, **job})


def test_a_pod_whose_time_is_used_up(live: Site, base_image: str) -> None:
    run = foreign(live, base_image, "sleep 60", **resources(timeout="1s", grace="1s"))
    status = end_of(run)
    assert status.state is State.TIMED_OUT
    assert status.reason == (
        "its time on the platform is used up: Pod was active on the node longer than the specified deadline"
    )


def test_a_foreign_image(live: Site, base_image: str) -> None:
    """Submit, logs, exit code, retries by the platform, secrets; nothing of ours is in it."""
    tries = 'echo "$GREETING $TOKEN"; ls /opt/ml 2>/dev/null; id -u; exit 3'
    secrets = {"TOKEN": "env:CANARY"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", "very-secret")
        run = foreign(live, base_image, tries, env={"GREETING": "$(HOME) it's"}, secrets=secrets, retries=1)
    status = end_of(run)
    assert (status.state, status.exit_code) == (State.FAILED, 3), status
    assert text_of(run).splitlines() == ["$(HOME) it's very-secret", "1000"] * 2
    assert len(live.pods(run)) == 2
    assert "very-secret" not in run.record.plan["text"]
    good = foreign(live, base_image, "echo done")
    assert (end_of(good).state, text_of(good)) == (State.SUCCEEDED, "done")


# -- queues -----------------------------------------------------------------------------------------------------------


def with_queue(site: Site) -> dict[str, str]:
    site.cluster.create("LocalQueue", site.namespace, {"metadata": {"name": "team"}, "spec": {"clusterQueue": "all"}})
    return {"queue": "team"}


def test_a_queue_admits_and_preempts(live: Site) -> None:
    run = live.run(STEADY, with_queue(live))
    status = until_status(run, lambda found: found.reason != "it waits in queue team")  # Kueue has looked at it
    assert (status.state, status.native) == (State.QUEUED, "Suspended")
    assert status.reason == (
        "it waits in queue team: couldn't assign flavors to pod set main: insufficient unused quota for "
        "nvidia.com/gpu in flavor default-flavor, 1 more needed"
    )
    assert live.pods(run) == []
    live.cluster.admit(live.namespace, run.id)
    until(lambda: "goes on" in text_of(run))
    live.cluster.preempt_workload(live.namespace, run.id)
    assert until_state(run, State.QUEUED).reason.startswith("it waits in queue team: ")
    live.cluster.admit(live.namespace, run.id)
    assert end_of(run).state is State.SUCCEEDED
    assert starts(run) == ["None", "1"]


def test_a_preempted_run_is_cancelled_in_its_queue(live: Site) -> None:
    run = live.run(STEADY, with_queue(live))
    live.cluster.admit(live.namespace, run.id)
    until(lambda: "goes on" in text_of(run))
    live.cluster.preempt_workload(live.namespace, run.id)
    until_state(run, State.QUEUED)
    until(lambda: run.store().head("output/result.json") is not None)
    run.cancel()
    assert end_of(run).state is State.CANCELLED
    until(lambda: live.left() == {})


def test_a_run_that_waits_in_a_queue_is_cancelled(site: Site) -> None:
    run = site.send(with_queue(site))
    assert run.status().native == "Suspended"
    assert run.cancel().state is State.CANCELLED
    until(lambda: site.left() == {})


def cordon(cluster: KubeCluster, *, again_open: bool = False) -> None:
    """No node takes a new pod."""
    for node in cluster.objects("nodes"):
        key = ("nodes", "", node["metadata"]["name"])
        cluster.store.change(key, lambda found: found["spec"].update(unschedulable=not again_open))


def test_max_wait(site: Site) -> None:
    waits = {"scales_up": True}
    run = site.send(waits, resources(gpus=3, max_wait="1s"))
    status = end_of(run)
    assert status.state is State.ERROR
    assert status.reason == "capacity: it did not start within max_wait, 1s"
    assert until(lambda: not [p for p in site.pods(run) if p["status"]["phase"] == "Pending"])
    queued = site.send(with_queue(site), resources(max_wait="1s"))
    assert end_of(queued).state is State.ERROR


def test_max_wait_is_not_for_a_run_that_had_begun(live: Site) -> None:
    run = steady(live, **resources(max_wait="1h"))
    cordon(live.cluster)
    live.cluster.evict(live.namespace, live.pod(run))
    until(lambda: [p for p in live.pods(run) if p["status"]["phase"] == "Pending"])
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7200))
    live.cluster.store.change(
        ("jobs", live.namespace, run.id), lambda job: job["metadata"].update(creationTimestamp=since)
    )
    assert run.status().state in (State.QUEUED, State.RESTARTING)
    cordon(live.cluster, again_open=True)
    assert end_of(run).state is State.SUCCEEDED


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_a_run_is_cancelled_while_it_runs_and_between_attempts(live: Site) -> None:
    run = steady(live)
    assert run.cancel().state in (State.STOPPING, State.CANCELLED)
    assert end_of(run).state is State.CANCELLED
    between = steady(live)
    cordon(live.cluster)
    live.cluster.evict(live.namespace, live.pod(between))
    until(lambda: [p for p in live.pods(between) if p["status"]["phase"] == "Pending"])
    between.cancel()
    assert end_of(between).state is State.CANCELLED
    assert (starts(run), starts(between)) == (["None"], ["None"])
    for one in run, between:
        assert not [p for p in live.pods(one) if p["status"]["phase"] in ("Pending", "Running")]
        assert one.cancel().state is State.CANCELLED


# -- a submission that is cut off -------------------------------------------------------------------------------------

CUTS: dict[str, tuple[dict[str, Any], State]] = {
    "before the Job": ({"path": r"/jobs\?", "late": False}, State.SENDING),
    "after the Job": ({"path": r"/jobs\?", "late": True}, State.QUEUED),
    "before the Secret": ({"path": "/secrets$", "late": False}, State.SENDING),
    "after the Secret": ({"path": "/secrets$", "late": True}, State.SENDING),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_submission_that_is_cut_off(site: Site, cut: str) -> None:
    """At most one Job, which has its Secret; what is not known is asked before it is sent again."""
    how, state = CUTS[cut]
    site.cluster.drop(**how, method="POST")
    error = site.refused({}, FROM_HERE)
    assert isinstance(error, UnreachableError)
    assert "; whether wrong-" in str(error) and "cvlaunch submit --resume wrong-" in str(error), str(error)
    (run,) = runs()
    assert run.record.state is State.SENDING
    assert len(site.left().get("jobs", [])) == (state is State.QUEUED)
    assert run.status().state in (state, State.STARTING)
    if state is State.SENDING:
        assert run.resume().handle == Handle("kubernetes", "there", run.id)
    left = site.left()
    assert left["jobs"] == [run.id]


def test_a_submission_whose_secret_is_refused_leaves_nothing(site: Site) -> None:
    site.cluster.fail(500, path="/secrets$", method="POST", times=None)
    error = site.refused({}, FROM_HERE)
    assert isinstance(error, UnreachableError)
    until(lambda: site.left() == {})


def test_two_submissions_of_one_run_at_once(site: Site, tmp_path: Path) -> None:
    """By two people, whose ledgers know nothing of each other."""
    path, outcomes = site.write({}, FROM_HERE), list[object]()

    def send(number: int) -> None:
        ledger = Ledger(tmp_path / f"ledger-{number}", tmp_path / f"cache-{number}")
        try:
            outcomes.append(submit(path, target="there", run_id="twice-1", ledger=ledger).handle)
        except ConflictError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=send, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Handle("kubernetes", "there", "twice-1") in outcomes and len(outcomes) == 2
    assert site.left()["jobs"] == site.left()["secrets"] == ["twice-1"]


# -- what somebody else has applied -----------------------------------------------------------------------------------


def apply(site: Site, run_id: str) -> str:
    """As `kubectl apply` or Argo CD does with what `cvlaunch render` prints."""
    done = cli("render", "job.yaml", "--target", "there", "--run-id", run_id, cwd=site.project)
    assert done.returncode == 0, done.stderr
    for document in yaml.safe_load_all(done.stdout):
        document["metadata"].setdefault("annotations", {})["kubectl.kubernetes.io/last-applied-configuration"] = "{}"
        site.cluster.create(document["kind"], site.namespace, document)
    return done.stdout


def holds(found: Any, wanted: Any) -> bool:
    """All of it; the cluster adds what it has for what is not said."""
    if isinstance(wanted, dict):
        return all(key in found and holds(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(holds, found, wanted))
    return bool(found == wanted)


def test_a_rendering_that_a_colleague_applied(live: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = """
import json, os
line = {"step": 1, "epoch": 1, "time": 0, "split": "val", "values": {"accuracy": 0.5}}
open(os.environ["CVLAUNCH_OUTPUT"] + "/metrics.jsonl", "a").write(json.dumps(line) + "\\n")
print("applied by hand")
"""
    monkeypatch.chdir(live.project)
    live.write({}, {"command": ["/opt/venv/bin/python", "-c", script]})
    text = apply(live, "by-hand-1")
    done = cli("attach", "by-hand-1", "--target", "there", cwd=live.project)
    assert (done.returncode, done.stdout) == (0, "kubernetes://there/by-hand-1\n"), done.stderr
    run = Run("by-hand-1")
    assert end_of(run).state is State.SUCCEEDED
    assert "applied by hand" in text_of(run)
    assert run.metrics().summary() == {"val/accuracy": 0.5}
    assert (run.sync(tmp_path / "home").path / "output/result.json").exists()
    assert holds(yaml.safe_load(run.record.plan["text"]), yaml.safe_load(text))
    again = run.rerun()
    assert run.diff(again).identical
    assert end_of(again).state is State.SUCCEEDED


@on_openshift
def test_what_a_colleague_applied_is_resumed(live: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(live.project)
    live.write({}, {"command": ["/opt/venv/bin/python", "-c", STEADY]})
    apply(live, "by-hand-3")
    run = attach("by-hand-3", target="there")
    until(lambda: "goes on" in text_of(run))
    live.cluster.kill_container(live.namespace, live.pod(run))
    assert end_of(run).state is State.FAILED
    assert end_of(run.resume()).state is State.SUCCEEDED
    assert starts(run)[-1] == "1"


def test_several_nodes_that_a_colleague_applied(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.project)
    site.write({}, resources(nodes=2))
    text = apply(site, "by-hand-2")
    run = attach("by-hand-2", target="there")
    assert holds(list(yaml.safe_load_all(run.record.plan["text"])), list(yaml.safe_load_all(text)))
    assert run.status().state in (State.QUEUED, State.STARTING)
    assert attach("by-hand-2", target="there").id == run.id
    assert site.left()["services"] == ["by-hand-2"]
    run.cancel()
    end_of(run)
    run.remove(remote=True)
    until(lambda: site.left() == {})


def test_a_foreign_image_that_a_colleague_applied(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent again, it is started as it was: by its own entry point."""
    monkeypatch.chdir(site.project)
    site.write({}, {"runner": "none", "image": "registry.example.com/debian:12", "command": ["true"]})
    text = apply(site, "by-hand-4")
    again = attach("by-hand-4", target="there").rerun()
    (container,) = yaml.safe_load(again.record.plan["text"])["spec"]["template"]["spec"]["containers"]
    (wanted,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    assert container["args"] == wanted["args"] == ["true"] and "command" not in container


def test_what_can_t_be_taken_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.project)
    site.write()
    spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": NEVER}]}}}
    site.cluster.create("Job", site.namespace, {"metadata": {"name": "foreign"}, "spec": spec})
    where = f"in context test ({site.cluster.url}), namespace {site.namespace}"
    done = cli("attach", "foreign", "--target", "there", cwd=site.project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cvlaunch: Job 'foreign' {where} holds no job of cvlaunch (cvlaunch/job.json)\n"
    for name in ("nobody-1", "../../secrets/x"):
        with pytest.raises(SpecError, match="there is no Job "):
            attach(name, target="there")
    assert runs() == []


# -- exec, secrets, OpenShift -----------------------------------------------------------------------------------------


def test_exec(live: Site, capfd: pytest.CaptureFixture[str]) -> None:
    run = live.run("import time; print('goes on', flush=True); time.sleep(600)", env={"GREETING": "hello"})
    until(lambda: "goes on" in text_of(run))
    script = "import os; print(os.environ['GREETING'], os.environ['CVLAUNCH_RUN_ID'], os.getcwd()); raise SystemExit(7)"
    assert run.exec(["/opt/venv/bin/python", "-c", script], tty=False) == 7
    assert capfd.readouterr().out.split()[:2] == ["hello", run.id]
    run.cancel()
    end_of(run)
    with pytest.raises(SpecError, match="has ended: CANCELLED; a command runs only beside a run that is going on"):
        run.exec(["true"], tty=False)


def test_exec_where_no_pod_runs(site: Site) -> None:
    run = site.send()
    done = cli("exec", run.id, "--", "true", cwd=site.project)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"cvlaunch: no pod of {run.id} is running; a command runs only beside a run that is going on\n"
    )


@on_both
def test_secrets(live: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of this machine is in a Secret that goes with the Job; the cluster's own stay where they are."""
    secret(live.cluster, live.namespace)
    monkeypatch.setenv("CANARY", "from-this-machine")
    script = "import os; print([len(os.environ[name]) for name in ('HERE', 'ONE', 'TWO')], os.environ['HERE'])"
    secrets = {"HERE": "env:CANARY", "ONE": "store:keys/one", "TWO": "store:keys/two"}
    run = live.run(script, secrets=secrets)
    assert end_of(run).state is State.SUCCEEDED
    assert "[17, 1, 1]" in text_of(run) and "from-this-machine" not in text_of(run)
    made, job = (live.cluster.get(kind, live.namespace, run.id) for kind in ("Secret", "Job"))
    assert made and job and list(made["data"]) == ["HERE"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("Job", job["metadata"]["uid"])
    assert "from-this-machine" not in json.dumps([job, *live.pods(run)]) + json.dumps(run.record.plan)
    run.remove(remote=True)
    until(lambda: live.left() == {})
    assert live.cluster.get("Secret", live.namespace, "keys") is not None


@on_openshift
def test_any_user_of_a_project_writes_where_it_must(live: Site) -> None:
    script = """
import os, pathlib
for variable in ("CVLAUNCH_CHECKPOINTS", "CVLAUNCH_MODEL", "CVLAUNCH_OUTPUT"):
    (pathlib.Path(os.environ[variable]) / "mine").touch()
for folder in ("/tmp", "/dev/shm", os.environ["HOME"]):
    (pathlib.Path(folder) / "mine").touch()
try:
    pathlib.Path("/opt/mine").touch()
except OSError as error:
    print(error.strerror)
print(os.getuid(), os.getgid(), 1000650000 in os.getgroups())
"""
    run = live.run(script)
    assert end_of(run).state is State.SUCCEEDED, text_of(run)
    lines = text_of(run).splitlines()
    assert "Read-only file system" in lines and "1000650000 0 True" in lines, lines
    (pod,) = live.pods(run)
    assert pod["metadata"]["annotations"]["openshift.io/scc"] == "restricted-v2"


# -- calls ------------------------------------------------------------------------------------------------------------

MANY = 1200


@dataclasses.dataclass(frozen=True)
class Crowd:
    """Jobs as a cluster has them whose controllers rest. Those in `waiting` have a pod for which there is no room."""

    cluster: KubeCluster
    backend: Backend
    handles: list[Handle]
    waiting: list[Handle]

    def poll(self) -> tuple[Mapping[Handle, Status], list[str]]:
        """What is said of all, and what was asked for."""
        self.cluster.requests.clear()
        found = self.backend.status(self.handles)
        return found, [request.path.rpartition("/")[2] for request in self.cluster.requests]


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    with kube_cluster(tmp_path / "cluster", alive=False) as cluster:
        namespace = cluster.namespace()
        job = {"name": "many", "image": NEVER, "command": ["true"], "output": "s3://results/runs"}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        text = render(tmp_path / "job.yaml", backend="kubernetes").text
        (model,) = yaml.safe_load_all(text)
        target = KubernetesTarget(kubeconfig=str(cluster.kubeconfig), namespace=namespace)
        handles = [Handle("kubernetes", "there", f"many-{number:04}") for number in range(MANY)]
        for number, handle in enumerate(handles):
            meta = {"name": handle.native, "namespace": namespace}
            labels = {**model["metadata"]["labels"], RUN_ID: handle.native}
            status = {"active": 1, "ready": int(number >= 20), "startTime": "2026-11-22T09:00:00Z"}
            made = cluster.put({**model, "metadata": {**meta, "labels": labels}, "status": status})
            if number < 20:
                owner = {"kind": "Job", "name": handle.native, "uid": made["metadata"]["uid"]}
                no_room = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
                cluster.put(
                    {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {**meta, "labels": labels, "ownerReferences": [owner]},
                        "spec": model["spec"]["template"]["spec"],
                        "status": {"phase": "Pending", "conditions": [no_room]},
                    }
                )
        yield Crowd(cluster, KubernetesBackend(target, "there"), handles, handles[:20])


def states(found: Mapping[Handle, Status]) -> Counter[tuple[State, str]]:
    return Counter((status.state, status.reason) for status in found.values())


EXPECTED = {(State.QUEUED, "no node takes it: no room"): 20, (State.RUNNING, ""): MANY - 20}


def test_many_runs_are_asked_in_a_few_calls(crowd: Crowd) -> None:
    found, calls = crowd.poll()
    assert (states(found), calls) == (EXPECTED, ["jobs", "jobs", "jobs", "pods"])
    assert {request.query["limit"] for request in crowd.cluster.requests} == {"500"}
    asked = crowd.cluster.requests[-1].query["labelSelector"]
    assert asked.count("many-") == 20, "pods only of those that wait"
    found = crowd.backend.status(crowd.handles[20:100])
    assert states(found) == {(State.RUNNING, ""): 80}
    assert len(crowd.cluster.requests) == 5, "a few are asked for by name, and pods of running ones not at all"


def test_a_poll_survives_what_a_busy_server_says(crowd: Crowd) -> None:
    crowd.cluster.expire_continue(times=1)
    found, calls = crowd.poll()
    assert (states(found), calls) == (EXPECTED, ["jobs"] * 5 + ["pods"]), "the list is read from its beginning again"
    crowd.cluster.throttle(times=1, retry_after=1)
    begin = time.monotonic()
    found, calls = crowd.poll()
    assert (states(found), len(calls)) == (EXPECTED, 5) and time.monotonic() - begin > 0.9
    crowd.cluster.fail(503, times=1)
    crowd.cluster.drop(path="continue=", late=False)
    found, calls = crowd.poll()
    assert (states(found), len(calls)) == (EXPECTED, 6)


def test_a_token_that_expires_while_somebody_waits(site: Site) -> None:
    run = site.send({"context": "exec"})
    run.status()
    ends: list[Status] = []
    waiting = threading.Thread(target=lambda: ends.append(Run(run.id).wait(timeout=180)))
    waiting.start()
    site.cluster.requests.clear()
    until(lambda: site.cluster.requests)
    site.cluster.expire_tokens()
    until(lambda: len(site.cluster.requests) > 4)
    run.cancel()
    waiting.join()
    assert [status.state for status in ends] == [State.CANCELLED]


def test_a_wait_logs_in_once(site: Site) -> None:
    """A plug-in takes a second of a cloud's, and may ask the user something."""
    run = site.send({"context": "exec"})
    script = site.cluster.kubeconfig.with_name("token-plugin.sh")
    count = site.project / "count"
    script.write_text(f"echo x >> '{count}'\n{script.read_text()}")
    asking = Run(run.record, Ledger())
    for _ in range(3):
        assert not asking.status().state.terminal
    assert count.read_text() == "x\n"


def test_a_token_that_nobody_renews(site: Site) -> None:
    """Asking again would not help, so that no wait goes on."""
    run = site.send()
    site.cluster.expire_tokens(renew=False)
    for ask in (run.status, run.wait):
        with pytest.raises(AuthError, match=r"target there could not be asked: context test .*: log in again, or ren"):
            ask()
    assert run.record.state is State.QUEUED


# -- sidecars ---------------------------------------------------------------------------------------------------------

PROXY = "registry.example.com/proxy:1"
SPEAKS = "echo 'the proxy listens'; trap 'exit 0' TERM; sleep infinity & wait"
UNTIL_TOLD = """
import pathlib, time
print("goes on", flush=True)
while not pathlib.Path("/tmp/end").exists():
    time.sleep(0.05)
"""


@pytest.fixture
def meshed(live: Site, base_image: str) -> Site:
    """A mesh's sidecar comes before each pod's own container, and its name before the container's."""
    live.cluster.serve_image(PROXY, image=base_image)
    live.cluster.inject("istio-proxy", image=PROXY, args=["bash", "-c", SPEAKS])
    return live


def test_a_run_beside_a_sidecar(meshed: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Status, logs and commands are those of the run's own container."""
    run = meshed.run(UNTIL_TOLD)
    until(lambda: "goes on" in text_of(run))
    (pod,) = meshed.pods(run)
    assert [one["name"] for one in pod["spec"]["containers"]] == ["istio-proxy", "train"]
    assert "the proxy listens" not in text_of(run)
    script = "import os, pathlib; print(os.environ['CVLAUNCH_RUN_ID']); pathlib.Path('/tmp/end').touch()"
    assert run.exec(["/opt/venv/bin/python", "-c", script], tty=False) == 0
    assert capfd.readouterr().out.strip() == run.id
    status = until_status(run, lambda found: bool(found.reason))
    assert status.state is State.RUNNING
    assert status.reason == "its command has ended, and sidecars keep its pod: have istio-proxy not injected"
    assert run.cancel().state in (State.STOPPING, State.CANCELLED)
    assert end_of(run).state is State.CANCELLED


def test_a_label_keeps_the_sidecar_out(meshed: Site) -> None:
    run = meshed.run("print('alone')", {"labels": {"sidecar.istio.io/inject": "false"}})
    assert end_of(run).state is State.SUCCEEDED
    assert "alone" in text_of(run)
