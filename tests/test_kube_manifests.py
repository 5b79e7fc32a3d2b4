"""Manifests for clusters of every kind: golden files, the published schemas of three versions, the bounds of a job."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launcher.backends.base import Image
from launcher.backends.kubernetes import KubernetesBackend, OpenShiftBackend
from launcher.contract import Channel, JobFile
from launcher.errors import SpecError
from launcher.plan import load_template, make_plan
from launcher.spec import JobSpec
from tests.conftest import Golden
from tests.jobs import SPECS, fixed_job
from tests.services.kube.environment import expand

VERSIONS = ("1.29", "1.33", "1.37")
GIB = 1 << 30
GPUS = {"gpus": 1, "gpu": ("A100",), "cpus": 8, "memory": 32 * GIB, "timeout": 7200.0}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"namespace": "vision", "storage_secret": "s3-keys", "image_pull_secrets": ["registry"]}, GPUS),
    "openshift": ({"namespace": "vision", "output": "pvc://runs/vision", "storage_secret": "s3-keys"}, GPUS),
    "gke": (
        {
            "gpu_label": "gke",
            "service_account": "trainer",
            "scales_up": True,
            "spot": {"node_selector": {"cloud.google.com/gke-spot": "true"}},
        },
        {**GPUS, "gpu": ("L4", "T4"), "spot": True},
    ),
    "eks": (
        {
            "gpu_label": "karpenter",
            "service_account": "trainer",
            "spot": {
                "node_selector": {"karpenter.sh/capacity-type": "spot"},
                "tolerations": [{"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
            },
        },
        {**GPUS, "spot": True},
    ),
    "ovh": (
        {"node_selector": {"nodepool": "gpu-a100"}, "storage": {"endpoint": "https://s3.gra.io.cloud.ovh.net"}},
        GPUS,
    ),
    "kueue": (
        {"queue": "vision", "queue_priority": "urgent", "priority_class": "batch", "labels": {"team": "vision"}},
        {**GPUS, "max_wait": 3600.0},
    ),
    "nodes": ({"interface": "eth0", "labels": {"sidecar.istio.io/inject": "false"}}, {**GPUS, "nodes": 2}),
    "pvc": ({"output": "pvc://runs"}, {**GPUS, "near": True}),
    "mig": ({"gpu_resource": "nvidia.com/mig-1g.10gb"}, {"gpus": 1}),
    "foreign": ({}, {**GPUS, "foreign": True}),
}
"""Name → keys of the target, and what the job asks for."""


def backend_for(case: str, keys: dict[str, Any]) -> KubernetesBackend:
    kind = OpenShiftBackend if case == "openshift" else KubernetesBackend
    return kind(kind.Target.model_validate(keys), "there")  # type: ignore[arg-type]


def manifest(name: str, backend: KubernetesBackend, **changes: Any) -> str:
    """Of a fixed job. changes: of its resources, and `near`, data on a claim, `foreign`, `shm`, `secrets`."""
    output = backend.target.output or "s3://bucket/runs"
    job = fixed_job(name, backend.target, "there", output)
    near = (Channel("near", "pvc://data/near shapes", "mounted"),) if changes.pop("near", False) else ()
    runner = "none" if changes.pop("foreign", False) else "auto"
    shm, secrets = changes.pop("shm", GIB), changes.pop("secrets", job.spec.secrets)
    resources = job.spec.resources.model_copy(update=changes)
    spec = job.spec.model_copy(
        update={"resources": resources, "runner": runner, "secrets": secrets, "retries": 2, "env": {"A": "$(B) c"}}
    )
    image = Image("registry/trainer@sha256:" + "c" * 64, digest="sha256:" + "c" * 64)
    job = dataclasses.replace(job, spec=spec, image=image, channels=(*job.channels, *near), shm=shm)
    return make_plan(job, backend, f"{name}-0000000000", template=load_template(type(backend))).text


def parts(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Job, and its container."""
    job = next(yaml.safe_load_all(text))
    return job, job["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", SPECS)
def test_golden_renderings(name: str, golden: Golden) -> None:
    golden.check(f"kubernetes/{name}.yaml", manifest(name, backend_for("plain", {})))


@pytest.mark.parametrize("case", CASES)
def test_golden_renderings_of_targets(case: str, golden: Golden) -> None:
    keys, asked = CASES[case]
    backend = backend_for(case, keys)
    golden.check(f"{backend.name}/{case}.yaml", manifest("command", backend, **asked))


@pytest.mark.parametrize("version", VERSIONS)
def test_published_schemas_take_every_rendering(version: str) -> None:
    folder = Path(__file__).parent / "golden"
    files = [path for name in ("kubernetes", "openshift") for path in (folder / name).glob("*.yaml")]
    assert len(files) == len(SPECS) + len(CASES)
    for path in files:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_the_restricted_standard(case: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    keys, asked = CASES[case]
    job, container = parts(manifest("command", backend_for(case, keys), **asked))
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"].get("runAsUser") != 0
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "or each start walks through all claims"
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "downwardAPI", "projected", "persistentVolumeClaim", "secret", "configMap"}


def test_openshift_chooses_user_and_group() -> None:
    """A user id or a group of one's own is what restricted-v2 refuses."""
    pod = parts(manifest("command", backend_for("openshift", {})))[0]["spec"]["template"]["spec"]
    assert pod["securityContext"].keys() == {"runAsNonRoot", "seccompProfile", "fsGroupChangePolicy"}


def test_images_come_by_the_name_that_nodes_know() -> None:
    keys = {"registry": "registry/trainer", "registry_inside": "inside.svc:5000/vision/trainer"}
    container = parts(manifest("command", backend_for("openshift", keys)))[1]
    assert container["image"] == "inside.svc:5000/vision/trainer@sha256:" + "c" * 64


HOSTILE = (
    "".join(map(chr, [*range(1, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0x1F4BE])) + "{{ x }}'\""
)


def test_every_character_arrives() -> None:
    text = manifest("command", backend_for("plain", {"labels": {"a": "b"}, "annotations": {"note": HOSTILE}}))
    job, _ = parts(text)
    assert job["spec"]["template"]["metadata"]["annotations"]["note"] == HOSTILE


@pytest.mark.parametrize("text", ["$(A)", "$$(A)", "$$$(A) $", "echo $$ $HOME ${A} $(", "$$", "a$"])
def test_dollars_arrive_in_a_foreign_image(text: str) -> None:
    backend = backend_for("plain", {})
    job = fixed_job("command", backend.target, "there", "s3://bucket/runs")
    spec = job.spec.model_copy(update={"runner": "none", "env": {"A": "value", "B": text}, "secrets": {}})
    job = dataclasses.replace(job, spec=spec, command=("sh", "-c", text), image=Image("x"))
    _, container = parts(make_plan(job, backend, "a-0", template=load_template(KubernetesBackend)).text)
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert [expand(found, values) for found in (container["args"][2], values["B"])] == [text, text]


def test_the_job_is_in_the_pod_as_people_read_it() -> None:
    text = manifest("command", backend_for("plain", {}))
    job, _ = parts(text)
    inline = job["spec"]["template"]["metadata"]["annotations"]["cvlaunch/job.json"]
    assert JobFile.from_bytes(inline.encode()).run_id == "command-0000000000"
    assert "cvlaunch/job.json: |-\n" in text


def test_a_job_that_no_annotation_can_hold_is_refused() -> None:
    backend = backend_for("plain", {})
    job = fixed_job("command", backend.target, "there", "s3://bucket/runs")
    spec = job.spec.model_copy(update={"env": {"LONG": "x" * 200_000}})
    job = dataclasses.replace(job, spec=spec, image=Image("x"))
    with pytest.raises(SpecError, match="more than 200000 bytes; put long values into a file"):
        make_plan(job, backend, "a-0", template=load_template(KubernetesBackend))


@pytest.mark.parametrize(
    ("memory", "shm", "said"),
    [
        (2 * GIB, GIB, None),
        (int(1.5 * GIB), GIB, None),
        (int(1.5 * GIB) - 1, GIB, r"1\.5 GiB is less than 1\.5 GiB: 1\.0 GiB of shared memory.*memory: 1536Mi or more"),
        (16 * GIB, 16 * GIB, r"16\.0 GiB is less than 16\.5 GiB: 16\.0 GiB of shared memory, which counts as memory"),
    ],
)
def test_shared_memory_counts_as_memory(memory: int, shm: int, said: str | None) -> None:
    backend = backend_for("plain", {})
    if said is None:
        job, container = parts(manifest("command", backend, memory=memory, shm=shm))
        assert container["resources"]["limits"]["memory"] == f"{memory >> 20}Mi".replace("2048Mi", "2Gi")
        volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
        return
    with pytest.raises(SpecError, match=said) as error:
        manifest("command", backend, memory=memory, shm=shm)
    assert error.value.key == "resources.memory"


def test_secrets_stand_by_reference() -> None:
    secrets = {"TOKEN": "env:TOKEN", "KEY": "store:wandb/api-key"}
    job, container = parts(manifest("command", backend_for("plain", {}), secrets=secrets))
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    sources = volumes["secrets"]["projected"]["sources"]
    assert [source["secret"]["name"] for source in sources] == ["command-0000000000", "wandb"]
    assert volumes["secrets"]["projected"]["defaultMode"] == 0o440
    assert not [entry for entry in container["env"] if entry["name"] in secrets], "no process but the command has them"


@pytest.mark.parametrize("reference", ["store:wandb", "store:/key", "store:wandb/"])
def test_a_secret_of_the_cluster_has_a_key(reference: str) -> None:
    with pytest.raises(SpecError, match="names no key of a Secret; it looks like store:SECRET/KEY"):
        manifest("command", backend_for("plain", {}), secrets={"KEY": reference})


@pytest.mark.parametrize(
    ("keys", "asked", "said"),
    [
        ({}, {"spot": True}, "doesn't say which nodes are spot"),
        ({}, {"gpus": 1, "gpu": ("A1OO",)}, "A1OO"),
        ({"output": "pvc:///x"}, {}, "is not a folder of a claim"),
    ],
)
def test_what_no_manifest_can_say_is_refused(keys: dict[str, Any], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        manifest("command", backend_for("plain", keys), **asked)


def test_folders_between_volumes_belong_to_the_runner() -> None:
    """The kubelet makes them as root; what the runner writes in is a mount of its own."""
    _, container = parts(manifest("classify", backend_for("pvc", {"output": "pvc://runs/x"}), near=True))
    mounts = {mount["mountPath"]: (mount["name"], mount.get("subPath")) for mount in container["volumeMounts"]}
    base = "x/classify-0000000000"
    assert mounts["/opt/ml"] == ("claim-runs", base)
    assert mounts["/opt/ml/input/config"] == ("claim-runs", f"{base}/input/config")
    assert mounts["/opt/ml/input/control"] == ("claim-runs", f"{base}/input/control")
    assert mounts["/opt/ml/input/data/near"] == ("claim-data", "near shapes")
    staged = [path for path in mounts if path.startswith("/opt/ml/input/data/") and not path.endswith("/near")]
    assert staged and all(mounts[path][0] == "claim-runs" for path in staged)


def test_claims_of_similar_names_are_volumes_of_their_own() -> None:
    """Names of claims have dots and 253 characters, those of volumes don't."""
    claims = ["a.b", "a-b", "a" * 60 + "-1", "a" * 60 + "-2", "b" * 57]
    backend = backend_for("plain", {"output": "pvc://a-b/runs"})
    job = fixed_job("command", backend.target, "there", "pvc://a-b/runs")
    channels = tuple(Channel(f"c{at}", f"pvc://{claim}", "mounted") for at, claim in enumerate(claims))
    job = dataclasses.replace(job, channels=channels, image=Image("x"))
    made, container = parts(make_plan(job, backend, "a-0", template=load_template(KubernetesBackend)).text)
    volumes = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in made["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert sorted(volumes.values()) == sorted(claims)
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in volumes)
    assert {volumes["claim-a-b"], volumes[f"claim-{'b' * 57}"]} == {"a-b", "b" * 57}
    mounts = {one["mountPath"].rpartition("/")[2]: volumes.get(one["name"]) for one in container["volumeMounts"]}
    assert [mounts[channel.name] for channel in channels] == claims


def test_a_rendering_without_a_target_names_what_is_missing(tmp_path: Path) -> None:
    from launcher.run import render

    job = JobSpec.model_validate({"name": "x", "image": "registry/x:1", "command": ["true"]})
    plan = render(job, backend="openshift", folder=tmp_path)
    assert plan.placeholders == ("the key output of target 'openshift' (s3://REPLACE-ME/runs)",)
    inline = parts(plan.text)[0]["spec"]["template"]["metadata"]["annotations"]["cvlaunch/job.json"]
    assert json.loads(inline)["output"] == "s3://REPLACE-ME/runs"
    given = job.model_copy(update={"output": "s3://bucket/runs"})
    assert render(given, backend="openshift", folder=tmp_path).placeholders == ()
