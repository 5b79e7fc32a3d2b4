"""Keys of a target: a namespace, the way to its cluster, and what every pod there gets."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from launcher.backends.base import BaseTarget
from launcher.kube.client import Access
from launcher.kube.gpus import WAYS, is_gpu
from launcher.spec import Duration, Model

__all__ = ["KubernetesTarget", "OpenShiftTarget", "Spot"]


def _gpu_resource(value: str) -> str:
    if not is_gpu(value):
        raise ValueError(f"expected a resource such as nvidia.com/gpu or nvidia.com/mig-1g.5gb, found {value!r}")
    return value


class Spot(Model):
    """Where pods go that may lose their node at any time."""

    node_selector: dict[str, str] = Field({}, description="labels of spot nodes: {cloud.google.com/gke-spot: 'true'}")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="of the taints that spot nodes have")


class KubernetesTarget(BaseTarget):
    """A namespace of a cluster, the way to it, and what every pod there gets."""

    backend: str = "kubernetes"
    context: str | None = Field(None, description="of your kubeconfig; none: the current one, or the pod's we are in")
    kubeconfig: str | None = Field(None, description="file; none: $KUBECONFIG, then ~/.kube/config")
    namespace: str | None = Field(None, description="none: the context's; a project on OpenShift")
    service_account: str | None = Field(None, description="of the pods: workload identity comes with it")
    image_pull_secrets: tuple[str, ...] = Field((), description="Secrets by which images are pulled")
    storage_secret: str | None = Field(
        None, description="Secret whose keys become variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    )
    run_as_user: int | None = Field(1000, ge=1, description="user id of the pods; none: the image's own, not root")
    fs_group: int | None = Field(1000, ge=0, description="group that owns volumes; none: the cluster decides")
    read_only: bool = Field(True, description="the image's own folders can't be written")
    gpu_resource: Annotated[str, AfterValidator(_gpu_resource)] = Field(
        "nvidia.com/gpu", description="what a GPU is called: nvidia.com/mig-1g.5gb, amd.com/gpu"
    )
    gpu_label: str = Field(
        "gfd", description=f"how nodes say which GPUs they have: {', '.join(WAYS)}, or the key of another label"
    )
    gpu_values: dict[str, tuple[str, ...]] = Field({}, description="GPU model → label values: {A100: [NVIDIA-A100X]}")
    scales_up: bool = Field(False, description="nodes come when they are needed, so none has to be there at submission")
    node_selector: dict[str, str] = Field({}, description="labels that nodes must have")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="as in a pod's specification")
    spot: Spot | None = Field(None, description="nodes for jobs with resources.spot")
    queue: str | None = Field(None, description="LocalQueue of Kueue")
    queue_priority: str | None = Field(None, description="WorkloadPriorityClass of Kueue")
    priority_class: str | None = Field(None, description="PriorityClass of the pods")
    labels: dict[str, str] = Field({}, description="further labels of Job and pods: sidecar.istio.io/inject")
    annotations: dict[str, str] = Field({}, description="further annotations of the pods: linkerd.io/inject")
    interface: str | None = Field(None, description="network between nodes: eth0; none: NCCL and gloo choose")
    pull_patience: Duration = Field(
        600.0, description="how long an image or a container may fail to come until the run is ended: 10m"
    )
    helper_image: str | None = Field(
        None, description="with Python, for pods that read a volume; none: that of the run which is read"
    )
    registry_inside: str | None = Field(
        None, description="`registry` as the nodes reach it, where that is another name (OpenShift's own)"
    )

    @property
    def access(self) -> Access:
        return Access(context=self.context, kubeconfig=self.kubeconfig, namespace=self.namespace)


class OpenShiftTarget(KubernetesTarget):
    """Its security context constraint restricted-v2 gives each namespace a range of user ids and a group."""

    backend: str = "openshift"
    run_as_user: int | None = Field(None, ge=1, description="none: OpenShift takes one of the project's range")
    fs_group: int | None = Field(None, ge=0, description="none: OpenShift takes the project's")
