"""A Kubernetes in this process: a real API server at the wire, whose kubelets run pods with podman.

As the real one: discovery, versions, conflicts, pages, watches, the three patches, ownership and finalizers, RBAC, the
checks of the published schemas (unknown fields are refused where the client doesn't say otherwise) and those beyond
them, pod security `restricted`, OpenShift's restricted-v2, quotas, webhooks, the Job controller's counting and words,
the scheduler's words, a mesh's sidecars, Kueue's webhook, volumes, users and groups, exit codes, logs, exec,
port-forward, impersonation.

Otherwise than the real one: plain HTTP; the network is this machine's, so that two pods can't listen on the same
port, and names of headless services stand in /etc/hosts; back-off takes fractions of a second; limits of
CPUs and disks, probes, init containers that go on, lifecycle hooks and GPUs themselves are nobody's; a claim is a
folder of any size; Deployments, StatefulSets and Notebooks are objects that nothing follows from.
"""

from __future__ import annotations

from tests.services.kube.answers import ApiError
from tests.services.kube.cluster import NODES, KubeCluster, NodeSpec, kube_cluster

__all__ = ["NODES", "ApiError", "KubeCluster", "NodeSpec", "kube_cluster"]
