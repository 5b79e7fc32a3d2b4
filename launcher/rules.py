"""What each platform does to a container: read by plans, by rehearsal and by the test worlds.

What no source says is filled in as strictly as is likely, and `ContainerRules.assumed` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DEFAULT_SHM", "RULES", "SOURCES", "ContainerRules", "Shm"]

DEFAULT_SHM = 64 << 20
"""Docker's and containerd's, in bytes."""

SOURCES: Mapping[str, str] = {
    "BC": "botocore 1.44.5, data/sagemaker/2017-07-24/service-2.json",
    "SMDG": "awsdocs/amazon-sagemaker-developer-guide",
    "SMTT": "aws/sagemaker-training-toolkit, ENVIRONMENT_VARIABLES.md",
    "VX": "google-cloud-aiplatform 2.7.0, aiplatform_v1/types/custom_job.py",
    "VXE": "google-cloud-aiplatform 2.7.0, aiplatform/training_utils/environment_variables.py",
    "OA": "ovh/ovhai-python-sdk, generated from OVH's OpenAPI",
    "OD": "ovh/docs, public_cloud/ai_machine_learning",
    "K8S": "kubernetes/api, batch/v1/types.go and core/v1/types.go",
    "PSA": "kubernetes/pod-security-admission, policy checks of the profile `restricted`",
    "SCC": "openshift/cluster-kube-apiserver-operator, SCC restricted-v2",
    "SLM": "SchedMD/slurm, manual pages",
    "APT": "apptainer/apptainer-userdocs",
}
"""Key → where it stands."""


@dataclass(frozen=True)
class Shm:
    """Shared memory on a platform. how: the platform's words for setting it; empty if it can't be set.

    size: bytes without a setting; None if no source says it. source: who says so. host: it is the machine's own.
    """

    how: str = ""
    size: int | None = None
    source: str = ""
    host: bool = False


@dataclass(frozen=True)
class ContainerRules:
    """One platform's. Sizes in bytes, times in seconds.

    uid: None is the caller's, `random` a high one that is in no /etc/passwd, `image` that of the image's USER, else
    root. gid: None is the user's own. groups: further groups of the user. passwd: whether the platform adds the user
    to /etc/passwd. root: where the contract's folders are. writable: folders that can be written; all others may be
    lost, or read-only (`read_only_root`). mounts: those of them that the platform mounts, empty, whatever the image has
    there. files: path below `root` → what the platform writes there. env: what it sets. drop_capabilities: all of them,
    and none can be had back. init: the image's command is not the first process. grace_s: between the stop signal and
    the kill; None is what the job asks for. network: whether a container reaches others. container: False runs a
    process instead. sources: name of a rule → key of SOURCES. assumed: name of a rule → what no source says of it.
    """

    uid: int | Literal["random", "image"] | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    passwd: bool = False
    root: str = "/opt/ml"
    writable: tuple[str, ...] = ("/opt/ml", "/tmp")  # noqa: S108 names folders of the container
    mounts: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    read_only_root: bool = False
    drop_capabilities: bool = False
    init: bool = False
    shm: Shm = Shm()
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "SIGTERM"
    grace_s: float | None = None
    network: bool = True
    container: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)


_NO_SIZE = "shared memory has 64 MiB, Docker's default"
_NO_GRACE = "the stop signal is SIGTERM, and the kill comes after the job's grace"
_ROOT = "a container runs as the image's USER, which is root where it names none"

_SAGEMAKER = ContainerRules(
    uid="image",
    mounts=("/opt/ml",),
    files={
        "input/config/hyperparameters.json": "{}",
        "input/config/inputdataconfig.json": "{}",
        "input/config/resourceconfig.json": json.dumps(
            {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}
        ),
    },
    shm=Shm(source="its API has no field for it, see aws/sagemaker-python-sdk#937"),
    env={
        "TRAINING_JOB_NAME": "rehearsal",
        "TRAINING_JOB_ARN": "arn:aws:sagemaker:eu-west-1:000000000000:training-job/rehearsal",
    },
    grace_s=120.0,
    sources={"writes": "SMDG", "shm": "BC", "environment": "SMTT", "stop": "SMDG", "results": "SMDG"},
    assumed={"user": _ROOT, "shm": _NO_SIZE},
)

_VERTEX = ContainerRules(
    uid="image",
    shm=Shm(source="its API has no field for it, see googleapis/python-aiplatform#3434"),
    env={
        "CLOUD_ML_JOB_ID": "0000000000000000000",
        "CLUSTER_SPEC": json.dumps(
            {
                "cluster": {"workerpool0": ["127.0.0.1:2222"]},
                "task": {"type": "workerpool0", "index": 0},
                "environment": "cloud",
            }
        ),
    },
    sources={"shm": "VX", "environment": "VXE"},
    assumed={"user": _ROOT, "shm": _NO_SIZE, "stop": _NO_GRACE},
)

_OVH = ContainerRules(
    uid=42420,
    gid=42420,
    shm=Shm(source="its JobSpec has no field for it"),
    sources={"user": "OD", "shm": "OA", "platform": "OD"},
    assumed={"shm": _NO_SIZE, "stop": _NO_GRACE},
)

_KUBERNETES = ContainerRules(
    uid=1000,
    gid=0,
    mounts=("/opt/ml", "/tmp"),  # noqa: S108 names folders of the container
    read_only_root=True,
    drop_capabilities=True,
    shm=Shm(how="an emptyDir of medium Memory", size=DEFAULT_SHM, source="it is containerd's default"),
    env={"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443", "JOB_COMPLETION_INDEX": "0"},
    sources={
        "user": "PSA",
        "privileges": "PSA",
        "read-only root": "K8S",
        "shm": "K8S",
        "environment": "K8S",
        "stop": "K8S",
    },
    assumed={"user": "the cluster holds pods to the profile `restricted`, and the job asks for user 1000"},
)

_OPENSHIFT = ContainerRules(
    uid="random",
    gid=0,
    mounts=("/opt/ml", "/tmp"),  # noqa: S108 names folders of the container
    read_only_root=True,
    drop_capabilities=True,
    shm=Shm(how="an emptyDir of medium Memory", size=DEFAULT_SHM, source="opendatahub-io/kubeflow#111"),
    env=_KUBERNETES.env,
    sources={
        "user": "SCC",
        "privileges": "SCC",
        "read-only root": "K8S",
        "shm": "K8S",
        "environment": "K8S",
        "stop": "K8S",
    },
)

_SLURM = ContainerRules(
    uid=None,
    passwd=True,
    writable=("/opt/ml", "/tmp", "/home/user"),  # noqa: S108 names folders of the container
    mounts=("/opt/ml", "/tmp", "/home/user"),  # noqa: S108
    read_only_root=True,
    drop_capabilities=True,
    init=True,
    shm=Shm(source="Apptainer and enroot mount the machine's own", host=True),
    env={
        "HOME": "/home/user",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    },
    sources={"writes": "APT", "shm": "APT", "environment": "SLM", "stop": "SLM"},
    assumed={"read-only root": "the site runs Apptainer without a writable layer"},
)

RULES: Mapping[str, ContainerRules] = {
    "sagemaker": _SAGEMAKER,
    "vertex": _VERTEX,
    "ovh": _OVH,
    "openshift": _OPENSHIFT,
    "kubernetes": _KUBERNETES,
    "slurm": _SLURM,
}
"""By the names of backends. slurm: in a container that Apptainer runs, the strictest of those in use."""
