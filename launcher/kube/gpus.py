"""GPUs in a cluster's words: labels that say which model a node has, resources that say how many.

Clusters label their nodes in several ways, and a model has a value for each of its cards there, so a pod asks for
`key In [values]`. Values of slices (`…-MIG-1g.10gb`) and of cards that pods share (`…-SHARED`) are in no list: they are
not what a job means that asks for the model. A target's `gpu_values` name them where they are meant.

Sources, read in November 2026:

* `gfd`: docs/gpu-feature-discovery/README.md of NVIDIA/k8s-device-plugin. The value is NVML's name of the card with `-`
  for spaces; the names are those of node listings and of ai-dynamo's table of products. OVH Managed Kubernetes and
  OpenShift have these labels with NVIDIA's operator.
* `gke`: "Run GPUs in Standard node pools" and "GPU machine types" of Google Cloud's documentation.
* `karpenter`, `eks-auto`: karpenter.sh "Scheduling" and "Instance types"; "EKS Auto Mode: supported labels" of AWS. The
  value is the name of EC2's DescribeInstanceTypes in lower case, which says no memory size.
* `coreweave`: docs.coreweave.com "Label selectors", and the classes of its former price list.
* `nebius`: SkyPilot's label formatters and published manifests for Nebius' clusters.
* `amd`: documentation of AMD's k8s-device-plugin (node labeller) and GPU operator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import SpecError, nearest

__all__ = [
    "GPU_RESOURCE",
    "LABELS",
    "MODELS",
    "WAYS",
    "Found",
    "Requirement",
    "found_on",
    "is_gpu",
    "node_requirement",
    "toleration_key",
]

LABELS: Mapping[str, str] = {
    "gfd": "nvidia.com/gpu.product",
    "gke": "cloud.google.com/gke-accelerator",
    "karpenter": "karpenter.k8s.aws/instance-gpu-name",
    "eks-auto": "eks.amazonaws.com/instance-gpu-name",
    "coreweave": "gpu.nvidia.com/class",
    "nebius": "nebius.com/gpu-name",
    "amd": "amd.com/gpu.product-name",
}
"""How a cluster labels its nodes → the label's key."""
WAYS = tuple(LABELS)

_GFD: Mapping[str, Sequence[str]] = {
    "A100": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe", "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB",
             "A100-SXM4-80GB", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    "A100-80GB": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe", "A100-SXM4-80GB"),
    "A100-40GB": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    "H100": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe", "NVIDIA-H100-NVL"),
    "H200": ("NVIDIA-H200", "NVIDIA-H200-NVL", "NVIDIA-H200-141GB-HBM3e"),
    "H20": ("NVIDIA-H20", "NVIDIA-H20-3e"),
    "GH200": ("NVIDIA-GH200-480GB", "NVIDIA-GH200-120GB", "NVIDIA-GH200-144G-HBM3e"),
    "B200": ("NVIDIA-B200",),
    "B300": ("NVIDIA-B300", "NVIDIA-B300-SXM6-AC"),
    "GB200": ("NVIDIA-GB200",),
    "GB300": ("NVIDIA-GB300",),
    "L4": ("NVIDIA-L4",),
    "L40": ("NVIDIA-L40",),
    "L40S": ("NVIDIA-L40S",),
    "A2": ("NVIDIA-A2",),
    "A10": ("NVIDIA-A10",),
    "A10G": ("NVIDIA-A10G",),
    "A16": ("NVIDIA-A16",),
    "A30": ("NVIDIA-A30",),
    "A40": ("NVIDIA-A40",),
    "T4": ("Tesla-T4", "NVIDIA-T4"),
    "V100": ("Tesla-V100-SXM2-32GB", "Tesla-V100-SXM2-16GB", "Tesla-V100-SXM3-32GB", "Tesla-V100-PCIE-32GB",
             "Tesla-V100-PCIE-16GB", "Tesla-V100-SXM2-32GB-LS", "Tesla-V100-DGXS-32GB"),
    "V100S": ("Tesla-V100S-PCIE-32GB",),
    "P100": ("Tesla-P100-PCIE-16GB", "Tesla-P100-SXM2-16GB", "Tesla-P100-PCIE-12GB"),
    "P40": ("Tesla-P40",),
    "P4": ("Tesla-P4",),
    "RTXPRO6000": ("NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition", "NVIDIA-RTX-PRO-6000-Blackwell-Workstation-Edition",
                   "NVIDIA-RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition"),
    "RTX6000-ADA": ("NVIDIA-RTX-6000-Ada-Generation",),
    "RTX5000-ADA": ("NVIDIA-RTX-5000-Ada-Generation",),
    "RTXA6000": ("NVIDIA-RTX-A6000",),
    "RTXA5000": ("NVIDIA-RTX-A5000",),
    "RTXA4000": ("NVIDIA-RTX-A4000",),
    "RTX8000": ("Quadro-RTX-8000",),
    "RTX6000": ("Quadro-RTX-6000",),
    "RTX5090": ("NVIDIA-GeForce-RTX-5090",),
    "RTX4090": ("NVIDIA-GeForce-RTX-4090",),
    "RTX3090": ("NVIDIA-GeForce-RTX-3090",),
    "RTX3080": ("NVIDIA-GeForce-RTX-3080",),
}  # fmt: skip
_GKE: Mapping[str, Sequence[str]] = {
    "A100": ("nvidia-tesla-a100", "nvidia-a100-80gb"),
    "A100-80GB": ("nvidia-a100-80gb",),
    "A100-40GB": ("nvidia-tesla-a100",),
    "H100": ("nvidia-h100-80gb", "nvidia-h100-mega-80gb"),
    "H200": ("nvidia-h200-141gb",),
    "B200": ("nvidia-b200",),
    "GB200": ("nvidia-gb200",),
    "L4": ("nvidia-l4",),
    "T4": ("nvidia-tesla-t4",),
    "V100": ("nvidia-tesla-v100",),
    "P100": ("nvidia-tesla-p100",),
    "P4": ("nvidia-tesla-p4",),
    "RTXPRO6000": ("nvidia-rtx-pro-6000",),
}
_EC2: Mapping[str, Sequence[str]] = {
    **{
        model: (model.lower(),)
        for model in ("A100", "A10G", "B200", "B300", "H100", "H200", "L4", "L40S", "T4", "V100")
    },
    "RTXPRO6000": ("rtx-pro-server-6000",),
}
_COREWEAVE: Mapping[str, Sequence[str]] = {
    "A100": ("A100", "A100_NVLINK_80GB", "A100_PCIE_80GB", "A100_NVLINK", "A100_PCIE_40GB"),
    "A100-80GB": ("A100_NVLINK_80GB", "A100_PCIE_80GB"),
    "A100-40GB": ("A100_NVLINK", "A100_PCIE_40GB"),
    "H100": ("H100", "H100_NVLINK_80GB", "H100_PCIE"),
    **{model: (model,) for model in ("H200", "B200", "B300", "GB200", "GB300", "GH200", "L40", "L40S", "A40")},
    "V100": ("Tesla_V100_NVLINK",),
    "RTXA6000": ("RTX_A6000",),
    "RTXA5000": ("RTX_A5000",),
    "RTXA4000": ("RTX_A4000",),
}
_NEBIUS: Mapping[str, Sequence[str]] = {model: (model,) for model in ("H100", "H200", "B200", "B300", "L40S")}
_AMD: Mapping[str, Sequence[str]] = {
    "MI300X": ("AMD_Instinct_MI300X_OAM", "AMD_Instinct_MI300X"),
    "MI325X": ("AMD_Instinct_MI325X_OAM", "AMD_Instinct_MI325_OAM", "AMD_Instinct_MI325X"),
    "MI300A": ("AMD_Instinct_MI300A",),
    "MI250X": ("AMD_Instinct_MI250X",),
}

MODELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "gfd": _GFD,
    "gke": _GKE,
    "karpenter": _EC2,
    "eks-auto": _EC2,
    "coreweave": _COREWEAVE,
    "nebius": _NEBIUS,
    "amd": _AMD,
}
"""Way → model as job files name it → the label's values of whole cards. A general name stands before narrower ones."""

GPU_RESOURCE = re.compile(
    r"nvidia\.com/mig-(?:\d+c\.)?\d+g\.\d+gb(?:\.[a-z]+)*"
    r"|(?:nvidia\.com|amd\.com)/(?!mig)[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
    r"|gpu\.intel\.com/(?:i915|xe)"
)
"""Names of GPU resources: of device plugins (`nvidia.com/gpu`, `nvidia.com/gpu.shared`, `amd.com/gpu`), of NVIDIA's
slices (`nvidia.com/mig-1g.5gb`, `…-1g.5gb.me`), of Intel's drivers, and a site's own words for NVIDIA's and AMD's."""

_TOLERATIONS = {"nvidia.com": "nvidia.com/gpu", "amd.com": "amd.com/gpu"}
"""The vendor's domain → key of the taint of its nodes, whatever the resource is; for others it is the resource."""


@dataclass(frozen=True)
class Requirement:
    """A node's label `key` must have one of `values`."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a node's labels say. model: as job files name it; None for a slice, a shared card, a value nobody lists."""

    way: str
    value: str
    model: str | None


def node_requirement(
    models: Sequence[str], way: str, *, values: Mapping[str, Sequence[str]] | None = None
) -> Requirement | None:
    """What a node's label must say to have one of the models; None if any will do.

    way: one of WAYS, or the key of a label that the cluster has of its own; then `values` must have the models.
    values: the target's own label values for a model, instead of ours. A word that is a label value stands for itself.
    A model that only other ways have is passed over beside one that this way has: the cloud doesn't offer it.
    Raises SpecError, key `resources.gpu`, for a model that nobody knows, and where none has a value.
    """
    if not models:
        return None
    if "/" not in (key := LABELS.get(way, way)):
        there = f"{nearest(way, WAYS) or ';'} there are {', '.join(WAYS)}, or a label's key such as example.com/gpu"
        raise SpecError(f"{way!r} is no way to label nodes{there}", key="gpu_label")
    known = _known(way) | {model.lower(): tuple(labels) for model, labels in (values or {}).items()}
    found = {model: known.get(model.lower(), ()) for model in models}
    for model, labels in found.items():
        if not labels and not (any(found.values()) and _ways(model)):
            raise SpecError(_unknown(model, way, [*MODELS.get(way, ()), *(values or ())]), key="resources.gpu")
    return Requirement(key, tuple(dict.fromkeys(label for labels in found.values() for label in labels)))


def _known(way: str) -> dict[str, tuple[str, ...]]:
    """Model or label value, in lower case → label values."""
    table = MODELS.get(way, {})
    themselves = {value.lower(): (value,) for listed in table.values() for value in listed}
    return themselves | {model.lower(): tuple(values) for model, values in table.items()}


def _ways(model: str) -> list[str]:
    return [way for way, table in MODELS.items() if model.upper() in table]


def _unknown(model: str, way: str, names: Sequence[str]) -> str:
    key = LABELS.get(way, way)
    elsewhere = f" (known for {', '.join(ways)})" if (ways := _ways(model)) else ""
    hint = nearest(model.upper(), [name.upper() for name in names]) or ";"
    return (
        f"no value of the node label {key} is known for {model!r}{elsewhere}{hint} write it in the target:"
        f" gpu_values: {{{model}: [VALUE]}}; `kubectl get nodes -L {key}` shows values"
    )


def found_on(labels: Mapping[str, str]) -> Found | None:
    """What a node's labels say about its GPUs, by the first way that it is labelled in; None without such a label."""
    for way, key in LABELS.items():
        if value := labels.get(key):
            return Found(way, value, next(_models(value, way), None))
    return None


def _models(value: str, way: str) -> Iterator[str]:
    return (model for model, values in MODELS[way].items() if value in values)


def is_gpu(resource: str) -> bool:
    """Whether a node's resource is one of GPUs."""
    return GPU_RESOURCE.fullmatch(resource) is not None


def toleration_key(resource: str) -> str:
    """Key of the taint that nodes with this GPU resource have, where they have one."""
    return _TOLERATIONS.get(resource.partition("/")[0], resource)
