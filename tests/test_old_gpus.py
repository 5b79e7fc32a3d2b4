"""GPUs that the torch of the trainer image has no code for: a training on them would be paid for, and fail at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import render
from launcher.gpus import is_old
from launcher.kube.gpus import MODELS
from launcher.sagemaker.catalogue import INSTANCES

LOCK = Path(__file__).parent.parent / "trainer_image/requirements.lock"
IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer:1"
TARGETS: dict[str, dict[str, Any]] = {
    "kubernetes": {"namespace": "vision", "gpu_label": "gfd"},
    "openshift": {"namespace": "vision", "gpu_label": "gfd"},
    "slurm": {"root": "/scratch/me", "container_command": "apptainer", "gpu_types": {"V100": "v100", "A100": "a100"}},
    "sagemaker": {"region": "eu-west-1"},
}
TRAIN = {"task": "classify", "model": "resnet18", "epochs": 1}
DATA = {"train": "s3://bucket/shapes/train", "val": "s3://bucket/shapes/val"}
WARNING = (
    "is too old for the trainer image's torch (CUDA 13), which has no code for it: name a newer GPU, or in `image`"
)


def warnings(folder: Path, backend: str, *gpu: str, target: dict[str, Any] | None = None, **job: Any) -> list[str]:
    """What is said of old models, of all warnings."""
    keys = {"backend": backend, "output": "s3://bucket/runs", **TARGETS[backend], **(target or {})}
    asked = {"gpus": 1, **({"gpu": list(gpu)} if gpu else {})}
    whole = {"name": "old", "image": IMAGE, "resources": asked, "data": DATA, **(job or {"train": TRAIN})}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"place": keys}}))
    (folder / "job.yaml").write_text(yaml.safe_dump(whole))
    return [said for said in render(folder / "job.yaml", target="place").warnings if " too old " in said]


def test_the_image_s_torch_begins_where_we_say() -> None:
    """CUDA 13 has no code for what is older than compute capability 7.5."""
    assert re.search(r"^nvidia-cuda-runtime==13\.", LOCK.read_text(), re.MULTILINE)


@pytest.mark.parametrize("backend", TARGETS)
def test_a_training_on_an_old_gpu_is_warned_of(backend: str, tmp_path: Path) -> None:
    (said,) = warnings(tmp_path, backend, "A100", "V100")
    assert said.startswith(f"resources.gpu: V100 {WARNING}")
    assert warnings(tmp_path, backend, "A100") == []


@pytest.mark.parametrize("backend", TARGETS)
def test_a_command_brings_a_torch_of_its_own(backend: str, tmp_path: Path) -> None:
    assert warnings(tmp_path, backend, "V100", command=["python", "train.py"]) == []


def test_a_process_has_the_cluster_s_torch(tmp_path: Path) -> None:
    own = {"container_command": None, "python": "/opt/python/bin/python"}
    assert warnings(tmp_path, "slurm", "V100", target=own, image=None, train=TRAIN) == []


def test_an_instance_type_may_be_old(tmp_path: Path) -> None:
    types = {"instance_types": ["ml.g5.2xlarge", "ml.p3.2xlarge"]}
    (said,) = warnings(tmp_path, "sagemaker", target=types)
    assert said.startswith(f"instance_types: the V100 of ml.p3.2xlarge {WARNING}")
    assert len(warnings(tmp_path, "sagemaker", "V100", target=types)) == 1, "once is enough"


def test_models_by_all_their_names() -> None:
    named = {model for table in MODELS.values() for model in table} | {kind.gpu for kind in INSTANCES.values()}
    assert {model for model in named if is_old(model)} == {"V100", "V100S", "P100", "P40", "P4"}
    longer = (
        "V100-32GB",
        "v100",
        "Tesla-P100-PCIE-16GB",
        "nvidia-tesla-v100",
        "Tesla_V100_NVLINK",
        "GTX 1080 Ti",
        "K80",
    )
    assert [name for name in longer if not is_old(name)] == []
