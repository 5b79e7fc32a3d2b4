"""GPU models as label values of nodes, GPU resources by name."""

from __future__ import annotations

import pytest

from launcher.errors import SpecError
from launcher.kube.gpus import MODELS, WAYS, found_on, is_gpu, node_requirement, toleration_key

WANTED = {
    "gfd": (["L40S"], "gfd", {}, "nvidia.com/gpu.product", ["NVIDIA-L40S"]),
    "any spelling": (["l40s"], "gfd", {}, "nvidia.com/gpu.product", ["NVIDIA-L40S"]),
    "several cards": (
        ["A100-80GB"],
        "gfd",
        {},
        "nvidia.com/gpu.product",
        ["NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe", "A100-SXM4-80GB"],
    ),
    "several models, the best first": (
        ["H200", "A100-80GB"],
        "gke",
        {},
        "cloud.google.com/gke-accelerator",
        ["nvidia-h200-141gb", "nvidia-a100-80gb"],
    ),
    "each value once": (
        ["A100", "A100-80GB"],
        "gke",
        {},
        "cloud.google.com/gke-accelerator",
        ["nvidia-tesla-a100", "nvidia-a100-80gb"],
    ),
    "one that this cloud has": (["A40", "L4"], "gke", {}, "cloud.google.com/gke-accelerator", ["nvidia-l4"]),
    "karpenter": (["A10G", "T4"], "karpenter", {}, "karpenter.k8s.aws/instance-gpu-name", ["a10g", "t4"]),
    "eks auto mode": (["H100"], "eks-auto", {}, "eks.amazonaws.com/instance-gpu-name", ["h100"]),
    "coreweave": (["A40"], "coreweave", {}, "gpu.nvidia.com/class", ["A40"]),
    "nebius": (["H100"], "nebius", {}, "nebius.com/gpu-name", ["H100"]),
    "amd": (["MI300A"], "amd", {}, "amd.com/gpu.product-name", ["AMD_Instinct_MI300A"]),
    "the target's own words": (
        ["A100", "L4"],
        "gfd",
        {"a100": ["NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"]},
        "nvidia.com/gpu.product",
        ["NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "NVIDIA-L4"],
    ),
    "a label of the cluster's own": (["A100"], "site.org/gpu", {"A100": ["big"]}, "site.org/gpu", ["big"]),
    "a value stands for itself": (["tesla-t4"], "gfd", {}, "nvidia.com/gpu.product", ["Tesla-T4"]),
}


@pytest.mark.parametrize("models, way, values, key, found", WANTED.values(), ids=WANTED)
def test_models_become_values_of_a_label(
    models: list[str], way: str, values: dict[str, list[str]], key: str, found: list[str]
) -> None:
    requirement = node_requirement(models, way, values=values)
    assert requirement is not None
    assert (requirement.key, list(requirement.values)) == (key, found)


def test_any_gpu_needs_no_label() -> None:
    assert node_requirement([], "gfd") is None


REFUSED = {
    "a typo beside a model": (["L4", "H10O"], "gfd", "is known for 'H10O'; did you mean 'H100'?"),
    "a typo": (["H10O"], "gfd", "resources.gpu: no value of the node label nvidia.com/gpu.product is known for 'H10O'"),
    "the nearest": (["H100S"], "gfd", "did you mean 'H100'?"),
    "the key of the target": (["X1"], "gke", "write it in the target: gpu_values: {X1: [VALUE]}"),
    "how to see the values": (["X1"], "gke", "`kubectl get nodes -L cloud.google.com/gke-accelerator` shows values"),
    "a label without words": (["A100"], "site.org/gpu", "of the node label site.org/gpu is known for 'A100'"),
    "no way": (["A100"], "gfdd", "gpu_label: 'gfdd' is no way to label nodes; did you mean 'gfd'? there are gfd, gke"),
    "not there": (["A40"], "karpenter", "'A40' (known for gfd, coreweave)"),
}


@pytest.mark.parametrize("models, way, message", REFUSED.values(), ids=REFUSED)
def test_a_model_that_has_no_value(models: list[str], way: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        node_requirement(models, way)
    assert message in str(caught.value)


def test_every_way_has_models_and_no_value_is_of_a_slice_or_shared_or_of_two_cards() -> None:
    assert set(MODELS) == set(WAYS)
    for way, table in MODELS.items():
        values = [value for listed in table.values() for value in listed]
        assert values and not [v for v in values if "MIG" in v or "SHARED" in v], way
        narrow = [v for model, listed in table.items() if model not in ("A100-80GB", "A100-40GB") for v in listed]
        assert len(narrow) == len(set(narrow)), way


LABELS = {
    "gfd": ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}, ("gfd", "NVIDIA-A100-SXM4-80GB", "A100")),
    "gke": ({"cloud.google.com/gke-accelerator": "nvidia-h100-mega-80gb"}, ("gke", "nvidia-h100-mega-80gb", "H100")),
    "a slice": ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"}, None),
    "shared": ({"nvidia.com/gpu.product": "Tesla-T4-SHARED"}, None),
}


@pytest.mark.parametrize("labels, expected", LABELS.values(), ids=LABELS)
def test_what_labels_say(labels: dict[str, str], expected: tuple[str, str, str] | None) -> None:
    found = found_on({"kubernetes.io/hostname": "gpu-1", **labels})
    assert found is not None
    if expected is None:
        assert (found.value, found.model) == (*labels.values(), None)
    else:
        assert (found.way, found.value, found.model) == expected


def test_a_node_without_labels_says_nothing() -> None:
    assert found_on({"kubernetes.io/hostname": "gpu-1"}) is None


RESOURCES = {
    "nvidia.com/gpu": "nvidia.com/gpu",
    "nvidia.com/gpu.shared": "nvidia.com/gpu",
    "nvidia.com/a100": "nvidia.com/gpu",
    "nvidia.com/mig-1g.5gb": "nvidia.com/gpu",
    "nvidia.com/mig-1g.10gb.me": "nvidia.com/gpu",
    "nvidia.com/mig-1c.3g.20gb": "nvidia.com/gpu",
    "amd.com/gpu": "amd.com/gpu",
    "gpu.intel.com/i915": "gpu.intel.com/i915",
    "gpu.intel.com/xe": "gpu.intel.com/xe",
}


@pytest.mark.parametrize("resource, toleration", RESOURCES.items())
def test_resources_and_the_taints_of_their_nodes(resource: str, toleration: str) -> None:
    assert is_gpu(resource)
    assert toleration_key(resource) == toleration


@pytest.mark.parametrize("resource", ["cpu", "gpu", "nvidia.com/", "nvidia.com/mig-1g", "nvidia.com/mig", "a.b/gpu"])
def test_what_is_no_gpu_resource(resource: str) -> None:
    assert not is_gpu(resource)
