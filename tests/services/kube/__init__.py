"""A Kubernetes in this process: a real API server at the wire, whose kubelets run pods with podman.

What it gets right and what it leaves out stands in CONTRIBUTING.md, with the other doubles.
"""

from __future__ import annotations

from tests.services.kube.answers import ApiError
from tests.services.kube.cluster import NODES, KubeCluster, NodeSpec, kube_cluster

__all__ = ["NODES", "ApiError", "KubeCluster", "NodeSpec", "kube_cluster"]
