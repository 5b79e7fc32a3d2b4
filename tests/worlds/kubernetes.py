"""A cluster at the wire whose kubelet runs pods with Podman: plain with results in S3, OpenShift with a claim."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backends.base import Handle
from launcher.kube.words import JOB_JSON, RUN_ID
from launcher.plan import dump_yaml
from launcher.quantities import parse_size
from launcher.testing import ContainerFacts
from tests.services.kube import KubeCluster
from tests.services.s3 import S3Server

__all__ = ["KubernetesWorld", "facts_of", "kubernetes_world"]

_SECRET = "s3-keys"
_IMAGE = "registry.example.com/cvlaunch/trainer:test"
"""As if it had been pushed: pods take no image that is on one machine only."""


class KubernetesWorld:
    """In a namespace of its own. server: keeps the results, else a claim does. keys: of the target, besides."""

    patience = 240.0

    def __init__(
        self,
        cluster: KubeCluster,
        *,
        image: str,
        server: S3Server | None = None,
        backend: str = "kubernetes",
        **keys: Any,
    ) -> None:
        self.backend = backend
        self.cluster = cluster
        self.namespace = cluster.namespace(openshift=backend == "openshift", pod_security="restricted")
        self._server, self._keys = server, keys
        cluster.serve_image(_IMAGE, image=image)
        if server is None:
            spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
            cluster.create("PersistentVolumeClaim", self.namespace, {"metadata": {"name": "runs"}, "spec": spec})
        else:
            server.make_bucket(self.namespace)
            keys = {"metadata": {"name": _SECRET}, "stringData": server.environment}
            cluster.create("Secret", self.namespace, keys)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the commands of this test's processes need."""
        return {**self.cluster.environment, **(self._server.environment if self._server else {})}

    @property
    def target(self) -> Mapping[str, Any]:
        kept: dict[str, Any] = {"output": "pvc://runs/vision", "helper_image": _IMAGE}
        if self._server is not None:
            storage = {"endpoint": self._server.endpoint, "region": "us-east-1"}
            kept = {"output": f"s3://{self.namespace}/runs", "storage": storage, "storage_secret": _SECRET}
        return {"backend": self.backend, "namespace": self.namespace, **kept, **self._keys}

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"image={_IMAGE}",)

    def python(self) -> str:
        return "/opt/venv/bin/python"

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        return facts_of(text)

    def sent(self, handle: Handle) -> str:
        """What the cluster got, in the form of a rendering."""
        return dump_yaml([self.cluster.posted("jobs", self.namespace, handle.native)])

    def submit_again(self, handle: Handle) -> None:
        """A name is taken once; so the same job comes from somebody who gave it another."""
        job = self.cluster.posted("jobs", self.namespace, handle.native)
        job["metadata"]["name"] = f"{handle.native}-again"
        self.cluster.create("jobs", self.namespace, job)

    def preempt(self, handle: Handle) -> None:
        for pod in self.pods(handle):
            self.cluster.evict(self.namespace, pod["metadata"]["name"])

    def pods(self, handle: Handle) -> list[dict[str, Any]]:
        """Those that have not ended."""
        found = self.cluster.objects("pods", self.namespace)
        mine = [pod for pod in found if pod["metadata"]["labels"].get(RUN_ID) == handle.native]
        return [pod for pod in mine if pod["status"].get("phase") not in ("Succeeded", "Failed")]

    def until_running(self, handle: Handle) -> None:
        deadline = time.monotonic() + self.patience
        while not [pod for pod in self.pods(handle) if pod["status"].get("phase") == "Running"]:
            assert time.monotonic() < deadline, self.cluster.objects("pods", self.namespace)
            time.sleep(0.05)


def facts_of(text: str) -> ContainerFacts:
    """Of a manifest that our template made."""
    job = next(yaml.safe_load_all(text))
    template = job["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    asked, volumes = container["resources"], {volume["name"]: volume for volume in pod["volumes"]}
    limits = asked["limits"]
    sources = volumes.get("secrets", {}).get("projected", {}).get("sources", ())
    return ContainerFacts(
        argv=container["command"],
        env={entry["name"]: entry["value"] for entry in container["env"] if "value" in entry},
        job=yaml.safe_load(template["metadata"]["annotations"][JOB_JSON]),
        gpus=int(limits.get("nvidia.com/gpu", 0)),
        nodes=job["spec"].get("completions", 1),
        image=container["image"],
        cpus=float(asked["requests"]["cpu"]) if "cpu" in asked["requests"] else None,
        memory=parse_size(limits["memory"]) if "memory" in limits else None,
        shm=parse_size(volumes["shm"]["emptyDir"]["sizeLimit"]) if "shm" in volumes else None,
        disk=parse_size(limits["ephemeral-storage"]),
        grace_s=float(pod["terminationGracePeriodSeconds"]),
        timeout_s=float(pod["activeDeadlineSeconds"]) if "activeDeadlineSeconds" in pod else None,
        secrets=frozenset(item["path"] for source in sources for item in source["secret"]["items"]),
    )


def kubernetes_world(
    request: pytest.FixtureRequest, backend: str, *, server: str = "moto_s3"
) -> Callable[[Path], KubernetesWorld]:
    """For a session's fixture: results in S3 on a plain cluster, on a claim on OpenShift. server: the S3's fixture.

    A world goes when the next one is made: its pods would hold ports of the loopback that they share.
    """
    cluster, image = request.getfixturevalue("kube_session"), request.getfixturevalue("trainer_image")
    bucket = request.getfixturevalue(server) if backend == "kubernetes" else None

    made: list[KubernetesWorld] = []

    def make(_: Path) -> KubernetesWorld:
        while made:
            cluster.remove_namespace(made.pop().namespace)
        made.append(KubernetesWorld(cluster, image=image, server=bucket, backend=backend))
        return made[-1]

    return make
