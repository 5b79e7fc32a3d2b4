"""Any real cluster, as `make test-cluster` names it: its API server, its controllers, its nodes. Nothing of ours stands
in for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.backends.base import Handle
from launcher.kube.client import Access, Cluster
from launcher.kube.words import RUN_ID
from launcher.ledger import Ledger
from launcher.testing import ContainerFacts
from tests.worlds.kubernetes import facts_of

__all__ = ["REAL", "RealCluster", "RealWorld"]


@dataclass(frozen=True)
class RealCluster:
    """Read when this file is imported: each test has a home and an environment of its own."""

    kubeconfig: str
    context: str
    image: str
    output: str
    backend: str
    keys: Mapping[str, Any]


def _configured() -> RealCluster | None:
    get = os.environ.get
    context = get("CVLAUNCH_TEST_CONTEXT")
    if not context:
        return None
    kubeconfig = get("KUBECONFIG") or str(Path.home() / ".kube/config")
    image, output = (get(f"CVLAUNCH_TEST_{name}") or "" for name in ("IMAGE", "OUTPUT"))
    assert image and output, "make test-cluster needs IMAGE=… and OUTPUT=…"
    keys = yaml.safe_load(get("CVLAUNCH_TEST_KEYS") or "{}")
    return RealCluster(kubeconfig, context, image, output, get("CVLAUNCH_TEST_BACKEND") or "kubernetes", keys)


REAL = _configured()
"""None unless the environment names a cluster."""


class RealWorld:
    """folder: the test's own is above it, and has its ledger."""

    patience = 600.0

    def __init__(self, folder: Path, cluster: RealCluster) -> None:
        self.backend = cluster.backend
        self._ledger = folder.parent / "ledger"
        self._facts = cluster
        access = Access(context=cluster.context, kubeconfig=cluster.kubeconfig, namespace=cluster.keys.get("namespace"))
        self._cluster = Cluster(access, "test")

    environment: Mapping[str, str] = {}

    @property
    def target(self) -> Mapping[str, Any]:
        facts = self._facts
        where = {"kubeconfig": facts.kubeconfig, "context": facts.context, "output": facts.output}
        return {"backend": self.backend, "helper_image": facts.image, **where, **facts.keys}

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"image={self._facts.image}",)

    def python(self) -> str:
        return "/opt/venv/bin/python"

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        return facts_of(text)

    def sent(self, handle: Handle) -> str:
        """The text of the ledger, if the cluster has all of it: it adds what it takes for granted."""
        text = self._text(handle)
        live = self._cluster.get(self._cluster.path("jobs", handle.native))
        assert _has(live, next(yaml.safe_load_all(text))), live
        return text

    def submit_again(self, handle: Handle) -> None:
        """A name is taken once; so the same job comes from somebody who gave it another."""
        job = next(yaml.safe_load_all(self._text(handle)))
        job["metadata"]["name"] = f"{handle.native}-again"
        self._cluster.create(self._cluster.path("jobs"), job)

    def preempt(self, handle: Handle) -> None:
        for pod in self._cluster.list(self._cluster.path("pods"), labels=f"{RUN_ID}={handle.native}"):
            name = pod["metadata"]["name"]
            body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
            self._cluster.create(self._cluster.path("pods", name, "eviction"), body)

    def _text(self, handle: Handle) -> str:
        cache = self._ledger.with_name("cache")
        return str(Ledger(self._ledger, cache).get(handle.native).plan["text"])


def _has(live: Any, sent: Any) -> bool:
    if isinstance(sent, Mapping):
        return isinstance(live, Mapping) and all(key in live and _has(live[key], value) for key, value in sent.items())
    if isinstance(sent, list):
        return isinstance(live, list) and len(live) >= len(sent) and all(map(_has, live, sent))
    return bool(live == sent)
