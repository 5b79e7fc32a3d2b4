"""What is sent to a cluster beside others who send there too: nothing of theirs is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import submit
from launcher.backends.base import Plan
from launcher.backends.kubernetes import KubernetesBackend
from launcher.errors import ConflictError
from launcher.kube.target import KubernetesTarget
from launcher.kube.words import RUN_ID
from launcher.run import render
from launcher.spec import JobSpec
from launcher.status import State
from tests.services.kube import KubeCluster, kube_cluster

pytestmark = pytest.mark.needs("podman")

RUN = "render-0000000000"
VALUES = {"TOKEN": "canary"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    """Without controllers: objects stay as they were sent."""
    with kube_cluster(tmp_path_factory.mktemp("kube") / "cluster", alive=False) as made:
        yield made


@pytest.fixture
def backend(cluster: KubeCluster) -> Iterator[KubernetesBackend]:
    target = KubernetesTarget(kubeconfig=str(cluster.kubeconfig), namespace=cluster.namespace())
    yield KubernetesBackend(target, "there")
    cluster.clear()


def plan_of(**resources: Any) -> Plan:
    job = {"name": "sent", "image": "registry.example.com/trainer:1", "command": ["true"], "output": "s3://bucket/runs"}
    return render(JobSpec.model_validate({**job, "resources": resources}), backend="kubernetes")


def uid_of(cluster: KubeCluster, kind: str, backend: KubernetesBackend) -> str | None:
    found = cluster.get(kind, backend.target.namespace or "", RUN)
    return str(found["metadata"]["uid"]) if found else None


THEIRS = {"Secret": {"stringData": {"password": "theirs"}}, "Service": {"spec": {"ports": [{"port": 80}]}}}


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("kind", THEIRS)
def test_somebody_s_object_of_that_name_stays(
    cluster: KubeCluster, backend: KubernetesBackend, kind: str, readable: bool
) -> None:
    cluster.create(kind, backend.target.namespace or "", {"metadata": {"name": RUN}, **THEIRS[kind]})
    before = uid_of(cluster, kind, backend)
    if not readable:
        cluster.forbid("get", f"{kind.lower()}s")
    with pytest.raises(ConflictError, match=rf"has another {kind} {RUN}; choose another --run-id, or delete that one"):
        backend.submit(plan_of(nodes=2), VALUES)
    assert uid_of(cluster, kind, backend) == before
    assert uid_of(cluster, "Job", backend) is None, "a Job that lacks a part is taken back"


def test_what_an_earlier_submission_left_is_replaced(cluster: KubeCluster, backend: KubernetesBackend) -> None:
    labels = {RUN_ID: RUN}
    cluster.create("Secret", backend.target.namespace or "", {"metadata": {"name": RUN, "labels": labels}})
    before = uid_of(cluster, "Secret", backend)
    backend.submit(plan_of(), VALUES)
    assert uid_of(cluster, "Secret", backend) not in (None, before)


def test_a_job_that_goes_on_is_not_cleared_away(cluster: KubeCluster, backend: KubernetesBackend) -> None:
    """Somebody else has resumed the run, and our ledger does not know."""
    backend.submit(plan_of(), {})
    before = uid_of(cluster, "Job", backend)
    with pytest.raises(
        ConflictError, match=f"the Job {RUN} in .* goes on: somebody else has resumed it; `cvlaunch can"
    ):
        backend.submit(plan_of(), {}, attempt=2)
    assert uid_of(cluster, "Job", backend) == before


def test_who_may_only_look_sees_a_run_that_should_be_given_up(cluster: KubeCluster, backend: KubernetesBackend) -> None:
    handle = backend.submit(plan_of(), {})
    namespace = backend.target.namespace or ""
    cluster.put(pod_without_image(cluster.get("Job", namespace, RUN) or {}))
    cluster.forbid("patch", "jobs")
    status = backend.status([handle])[handle]
    assert (status.state, status.native) == (State.STARTING, "Pending/ImagePullBackOff")
    cluster.allow()
    assert backend.status([handle])[handle].state is State.STOPPING


def test_a_run_can_be_cancelled_whose_claim_can_t_be_reached(
    cluster: KubeCluster, backend: KubernetesBackend, tmp_path: Path
) -> None:
    """What keeps the run from starting mostly keeps a pod for its claim from starting, too."""
    namespace = backend.target.namespace or ""
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    cluster.create("PersistentVolumeClaim", namespace, {"metadata": {"name": "runs"}, "spec": spec})
    target = {"backend": "kubernetes", "kubeconfig": str(cluster.kubeconfig), "namespace": namespace}
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"there": {**target, "output": "pvc://runs/x"}}}))
    job = {"name": "waits", "image": "registry.example.com/trainer:1", "command": ["true"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run = submit(tmp_path / "job.yaml", target="there", run_id=RUN)
    cluster.forbid("create", "jobs")
    assert run.cancel().state is State.STOPPING
    assert (cluster.get("Job", namespace, RUN) or {})["spec"]["activeDeadlineSeconds"] == 1


def pod_without_image(job: dict[str, Any]) -> dict[str, Any]:
    """On its node for a year."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": RUN, "uid": job["metadata"]["uid"], "controller": True}
    template, waiting = job["spec"]["template"], {"reason": "ImagePullBackOff", "message": "Back-off"}
    metadata = {"name": f"{RUN}-x", "namespace": job["metadata"]["namespace"], "ownerReferences": [owner]}
    containers = [{"name": "train", "state": {"waiting": waiting}}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], **metadata},
        "spec": {**template["spec"], "nodeName": "plain"},
        "status": {"phase": "Pending", "startTime": "2025-11-22T00:00:00Z", "containerStatuses": containers},
    }
