"""Memory at /dev/shm for what is there already: the guide's workbench, any object, files, and a cluster."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import pty
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from launcher.cli.app import main
from launcher.errors import SpecError
from launcher.kube.podspecs import kind_named, kind_of, parse_quantity, shm_mount, volumes_of
from launcher.kube.shmcheck import check_pod
from launcher.kube.shmfiles import patch_text
from launcher.kube.shmpatch import ANNOTATION, effect, plan_patch, plan_undo, refuse_fixed
from tests.cli_tool import COMMAND
from tests.conftest import Golden
from tests.services.kube import KubeCluster

MANIFESTS = sorted((Path(__file__).parent / "manifests").iterdir(), key=lambda path: path.name)
GI = 2**30
Json = dict[str, Any]
Call = Callable[..., tuple[int, str, str]]
AT = ("spec", "template", "spec")

CLAIM = {"name": "pytorch-shm", "persistentVolumeClaim": {"claimName": "dev-shm"}}
MEMORY = {"name": "pytorch-shm", "emptyDir": {"medium": "Memory"}}


def workbench(*volumes: Json, mounts: tuple[Json, ...] = (), **container: Any) -> Json:
    """As the guide's; volumes and mounts beside that of the home folder."""
    home = {"name": "pytorch", "persistentVolumeClaim": {"claimName": "pytorch"}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "Notebook",
        "metadata": {"name": "my-workbench", "resourceVersion": "41"},
        "spec": {
            "template": {
                "spec": {
                    "containers": [
                        {
                            "name": "my-workbench",
                            "image": "pytorch",
                            "volumeMounts": [{"mountPath": "/opt/app-root/src", "name": "pytorch"}, *mounts],
                            **container,
                        },
                        {"name": "oauth-proxy", "image": "proxy"},
                    ],
                    "volumes": [home, *volumes],
                }
            }
        },
    }


def of_kind(kind: str, spec: Json, **metadata: Any) -> Json:
    """An object with this pod."""
    obj: Json = {"apiVersion": {"Pod": "v1"}.get(kind, "apps/v1"), "kind": kind, "metadata": {"name": "x", **metadata}}
    return {**obj, "spec": spec if kind == "Pod" else {"template": {"spec": spec}}}


def pod(*volumes: Json, mounts: tuple[Json, ...] = (), **container: Any) -> Json:
    return {"containers": [{"name": "a", "volumeMounts": [*mounts], **container}], "volumes": [*volumes]}


def spec_of(obj: Json) -> Json:
    found = obj
    kind = kind_of(obj)
    assert kind is not None
    for key in kind.pod_spec:
        found = found[key]
    return found


def at_shm(obj: Json, container: int = 0) -> Json | None:
    """The volume at /dev/shm."""
    spec = spec_of(obj)
    mount = shm_mount(spec["containers"][container])
    return next((volume for volume in spec["volumes"] if mount and volume["name"] == mount[1]["name"]), None)


# -- the guide's workbench


def test_a_memory_volume_elsewhere_is_moved() -> None:
    before = workbench(MEMORY, mounts=({"mountPath": "/opt/app-root/src/shm", "name": "pytorch-shm"},))
    change = plan_patch(before, size=2 * GI)
    assert spec_of(change.after)["containers"][0]["volumeMounts"] == [
        {"mountPath": "/opt/app-root/src", "name": "pytorch"},
        {"mountPath": "/dev/shm", "name": "pytorch-shm"},
    ]
    assert at_shm(change.after) == {"name": "pytorch-shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    assert [operation["path"] for operation in change.operations] == [
        "/metadata/resourceVersion",
        "/spec/template/spec/volumes/1/emptyDir/sizeLimit",
        "/spec/template/spec/containers/0/volumeMounts/1/mountPath",
        "/metadata/annotations",
    ]
    assert change.operations[0] == {"op": "test", "path": "/metadata/resourceVersion", "value": "41"}
    assert change.done[1].endswith("is mounted at /dev/shm in container my-workbench; it was at /opt/app-root/src/shm")


def test_a_claim_elsewhere_is_left_and_the_output_says_why() -> None:
    change = plan_patch(workbench(CLAIM, mounts=({"mountPath": "/opt/shm", "name": "pytorch-shm"},)), size=GI)
    assert at_shm(change.after) == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
    assert {"mountPath": "/opt/shm", "name": "pytorch-shm"} in spec_of(change.after)["containers"][0]["volumeMounts"]
    (left,) = change.left
    assert "pytorch-shm is at /opt/shm and stays so: it is the PersistentVolumeClaim dev-shm" in left
    assert "network" in left and "--use-volume pytorch-shm" in left


def test_use_volume_does_what_the_guide_does_by_hand() -> None:
    change = plan_patch(
        workbench(CLAIM, mounts=({"mountPath": "/opt/shm", "name": "pytorch-shm"},)), use_volume="pytorch-shm"
    )
    assert spec_of(change.after)["containers"][0]["volumeMounts"] == [
        {"mountPath": "/opt/app-root/src", "name": "pytorch"},
        {"mountPath": "/dev/shm", "name": "pytorch-shm"},
    ]
    assert spec_of(change.after)["volumes"] == spec_of(change.before)["volumes"]
    assert change.left == ()


def test_without_any_a_volume_and_a_mount_are_added() -> None:
    change = plan_patch(workbench(), size=2 * GI)
    assert at_shm(change.after) == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    assert at_shm(change.after, 1) is None
    assert json.loads(change.after["metadata"]["annotations"][ANNOTATION])


# -- which volume, which container


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        pytest.param(pod(MEMORY), {}, MEMORY, id="a memory volume without a mount gets one"),
        pytest.param(pod(), {}, {"name": "shm", "emptyDir": {"medium": "Memory"}}, id="no size, no limit"),
        pytest.param(
            pod({"name": "shm", "emptyDir": {}}), {}, {"name": "shm-2", "emptyDir": {"medium": "Memory"}}, id="clash"
        ),
        pytest.param(
            pod(
                {"name": "tmp", "emptyDir": {"medium": "Memory"}},
                MEMORY,
                mounts=({"name": "tmp", "mountPath": "/opt"},),
            ),
            {},
            MEMORY,
            id="the one that is named for it goes first",
        ),
        pytest.param(
            pod({"name": "t", "emptyDir": {"medium": "Memory"}}, mounts=({"name": "t", "mountPath": "/tmp/x"},)),
            {},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            id="what programs look for stays",
        ),
        pytest.param(
            pod({"name": "t", "emptyDir": {}}, mounts=({"name": "t", "mountPath": "/dev/shm/"},)),
            {"replace": True, "size": GI},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
            id="replace",
        ),
        pytest.param(
            pod({"name": "t", "emptyDir": {}}, CLAIM, mounts=({"name": "t", "mountPath": "/dev/shm"},)),
            {"replace": True, "use_volume": "pytorch-shm"},
            CLAIM,
            id="replace by a volume",
        ),
        pytest.param(
            pod(mounts=({"name": "gone", "mountPath": "/dev/shm"},)),
            {"replace": True},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            id="a mount of nothing",
        ),
        pytest.param(
            pod(
                {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "2048Mi"}},
                mounts=({"name": "m", "mountPath": "/dev/shm", "readOnly": True},),
            ),
            {"size": 2 * GI},
            {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "2048Mi"}},
            id="can't be written",
        ),
    ],
)
def test_what_is_at_dev_shm_afterwards(spec: Json, options: Json, expected: Json) -> None:
    for kind in ("Deployment", "Pod"):
        change = plan_patch(of_kind(kind, spec), **options)
        assert at_shm(change.after) == expected
        (mount,) = [m for m in spec_of(change.after)["containers"][0]["volumeMounts"] if "shm" in m["mountPath"]]
        assert mount.keys() == {"name", "mountPath"}
        assert len(change.done) + len(change.left) > 0
        assert plan_undo(change.after).after == of_kind(kind, spec)


def test_what_is_as_asked_stays_as_it_is() -> None:
    ready = pod(
        {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1024Mi"}},
        mounts=({"name": "m", "mountPath": "/dev/shm"},),
    )
    for size in (None, GI):
        change = plan_patch(of_kind("Deployment", ready), size=size)
        assert (change.operations, change.after) == ((), of_kind("Deployment", ready))
    grown = plan_patch(of_kind("Deployment", ready), size=3 * GI)
    assert grown.done == ("volume m has at most 3Gi, 1024Mi before",)


@pytest.mark.parametrize(
    ("names", "metadata", "option", "expected"),
    [
        (["a"], {}, None, "a"),
        (["istio-proxy", "a"], {}, None, "a"),
        (["oauth-proxy"], {}, None, "oauth-proxy"),
        (["a", "x"], {}, None, "x"),
        (["a", "b"], {"kubectl.kubernetes.io/default-container": "b"}, None, "b"),
        (["a", "x"], {}, "a", "a"),
    ],
)
def test_the_container_that_works_is_taken(names: list[str], metadata: Json, option: str | None, expected: str) -> None:
    obj = of_kind("Deployment", {"containers": [{"name": name} for name in names]})
    obj["spec"]["template"]["metadata"] = {"annotations": metadata}
    after = plan_patch(obj, container=option).after
    assert [c["name"] for c in spec_of(after)["containers"] if c.get("volumeMounts")] == [expected]


SMALL = {"resources": {"limits": {"memory": "1Gi"}}}
DISK = pod({"name": "d", "emptyDir": {}}, mounts=({"name": "d", "mountPath": "/dev/shm"},))
OWNED = {"ownerReferences": [{"apiVersion": "kubeflow.org/v1", "kind": "Notebook", "name": "wb", "controller": True}]}
REPLICAS = {
    "labels": {"pod-template-hash": "5d6"},
    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d6", "controller": True}],
}


@pytest.mark.parametrize(
    ("obj", "options", "message"),
    [
        (of_kind("Deployment", DISK), {}, "has something else at /dev/shm: volume d, an emptyDir on the node's disk; "
         "--replace takes /dev/shm from it"),
        (of_kind("Deployment", DISK), {"use_volume": "n"}, "--use-volume: deployment/x has no volume 'n'; it has d"),
        (of_kind("Deployment", DISK), {"use_volume": "d", "size": GI}, "--size: the size of volume d is not set here"),
        (of_kind("Pod", pod(**SMALL)), {"size": 2 * GI}, "--size: container a of pod/x may use 1Gi of memory, and what "
         "is written to /dev/shm counts into it: 2Gi don't fit; raise its resources.limits.memory"),
        (of_kind("Pod", pod(MEMORY, **SMALL)), {"size": 2 * GI}, "2Gi don't fit"),
        (of_kind("Pod", pod()), {"size": 64 * 2**20}, "--size: 67108864 bytes are not more than the 64Mi"),
        (of_kind("Pod", pod()), {"container": "b"}, "--container: pod/x has no container 'b'; it has a"),
        (of_kind("Pod", {"containers": [{"name": "a"}, {"name": "b"}]}), {},
         "--container: pod/x has several containers: a, b; choose one"),
        (of_kind("Pod", pod(MEMORY, {**MEMORY, "name": "dshm"})), {},
         "--use-volume: pod/x has several volumes of memory: pytorch-shm, dshm; choose one"),
        (of_kind("Pod", {"containers": []}), {}, "pod/x has no containers"),
        (of_kind("StatefulSet", pod(), **OWNED), {}, "statefulset/x is made by Notebook wb, which would undo the "
         "change; patch that: cvlaunch shm patch notebook/wb"),
        (of_kind("Pod", pod(), **REPLICAS), {}, "cvlaunch shm patch deployment/web"),
        ({"apiVersion": "v1", "kind": "Service"}, {}, "v1 Service can't be patched; what can: Notebook, Deployment"),
        ({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}, {}, "spec: keys and values"),
        ({"apiVersion": "v1", "kind": "Pod", "metadata": "x"}, {}, "metadata: keys and values were expected"),
        (of_kind("Pod", {"containers": "a"}), {}, "containers: a list of objects was expected"),
        (of_kind("Pod", {"containers": [{"name": "a"}], "volumes": ["a"]}), {}, "volumes: a list of objects"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_said(obj: Json, options: Json, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan_patch(obj, **options)
    assert message in str(caught.value)


def test_what_another_controller_makes_is_patched_with_a_warning() -> None:
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": "ddp", "controller": True}
    change = plan_patch(of_kind("Pod", pod(), ownerReferences=[owner]))
    assert change.operations
    assert change.left == ("it is made by PyTorchJob ddp, which may undo the change or make new ones without it",)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2Gi", 2 * GI), ("1.5Gi", 3 * GI // 2), ("500M", 5 * 10**8), ("1k", 1000), ("128974848000m", 128974848),
        ("2e9", 2 * 10**9), ("1E", 10**18), (".5Gi", GI // 2), (1024, 1024), ("1.2m", 1), ("2gi", None), ("", None),
        ("2 Gi", None), ("-1", None), ("1e", None), ("NaN", None),
    ],
)  # fmt: skip
def test_quantities(text: object, size: int | None) -> None:
    assert parse_quantity(text) == size


@pytest.mark.parametrize(
    ("word", "kind"),
    [("notebook", "Notebook"), ("notebooks.kubeflow.org", "Notebook"), ("STS", "StatefulSet"), ("po", "Pod"),
     ("deploy", "Deployment"), ("deployments.apps", "Deployment"), ("jobs", "Job"), ("cj", "CronJob")],
)  # fmt: skip
def test_kinds_are_named_as_for_kubectl(word: str, kind: str) -> None:
    assert kind_named(word).name == kind


@pytest.mark.parametrize(
    ("kind", "spec", "expected"),
    [
        ("Notebook", {}, "the pod of the notebook restarts"),
        ("Deployment", {}, "its pod is replaced"),
        ("Deployment", {"replicas": 3}, "its 3 pods are replaced"),
        ("Deployment", {"replicas": 0}, "nothing restarts: it has no pods"),
        ("Deployment", {"paused": True}, "when it is resumed"),
        ("StatefulSet", {"replicas": 2}, "its 2 pods are restarted"),
        ("StatefulSet", {"updateStrategy": {"type": "OnDelete"}}, "after it was deleted"),
        ("DaemonSet", {}, "restarted"),
        ("ReplicaSet", {}, "new ones have"),
        ("CronJob", {}, "the next job"),
    ],
)
def test_it_says_what_restarts(kind: str, spec: Json, expected: str) -> None:
    group = {"Notebook": "kubeflow.org/v1", "CronJob": "batch/v1"}.get(kind, "apps/v1")
    assert expected in effect({"apiVersion": group, "kind": kind, "metadata": {"name": "x"}, "spec": spec})


def test_a_stopped_notebook_is_not_restarted() -> None:
    stopped = workbench()
    stopped["metadata"]["annotations"] = {"kubeflow-resource-stopped": "2026-11-20T17:02:11Z"}
    assert effect(stopped).startswith("the notebook is stopped: nothing restarts")


@pytest.mark.parametrize("api_version, kind", [("v1", "Pod"), ("batch/v1", "Job")])
def test_jobs_and_pods_of_a_cluster_must_be_made_anew(api_version: str, kind: str) -> None:
    with pytest.raises(SpecError, match=rf"{kind.lower()}/x must be made anew.*kubectl replace --force"):
        refuse_fixed({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}})


# -- any object


names = st.sampled_from(["shm", "dshm", "data", "tmp", "shm-2", "y"])
sources = st.sampled_from(
    [
        {"emptyDir": {"medium": "Memory"}},
        {"emptyDir": {"medium": "Memory", "sizeLimit": "512Mi"}},
        {"emptyDir": {}},
        {"persistentVolumeClaim": {"claimName": "dev-shm"}},
        {"configMap": {"name": "c"}},
    ]
)
volume_lists = st.one_of(
    st.sampled_from([None, "absent"]),
    st.lists(st.tuples(names, sources), max_size=3, unique_by=lambda pair: pair[0]).map(
        lambda pairs: [{"name": name, **source} for name, source in pairs]
    ),
)
mount_lists = st.one_of(
    st.sampled_from([None, "absent"]),
    st.lists(
        st.fixed_dictionaries(
            {"name": names, "mountPath": st.sampled_from(["/dev/shm", "/dev/shm/", "/opt/x", "/tmp/y", "/data"])},
            optional={"readOnly": st.booleans(), "subPath": st.just("sub")},
        ),
        max_size=3,
        unique_by=lambda mount: mount["mountPath"],
    ),
)
annotation_maps = st.sampled_from([None, "absent", {}, {"a": "b"}, {"a": "'"}])
kinds = st.sampled_from(["Notebook", "Deployment", "StatefulSet", "Job", "CronJob", "Pod"])


@st.composite
def shared_objects(draw: st.DrawFn) -> Json:
    """With the same mapping in several places: in YAML these are anchors and aliases."""
    kind = kind_named(draw(kinds))
    containers = [
        {"name": name, "image": "i", **_unless_absent("volumeMounts", draw(mount_lists))}
        for name in draw(st.sampled_from([["x"], ["oauth-proxy", "x"], ["a"], ["a", "b"]]))
    ]
    spec: Json = {"containers": containers, **_unless_absent("volumes", draw(volume_lists)), "restartPolicy": "Never"}
    for key in reversed(kind.pod_spec):
        spec = {key: spec}
    group = "kubeflow.org/v1" if kind.name == "Notebook" else f"{kind.group}/v1".lstrip("/")
    metadata = {"name": "x", **_unless_absent("annotations", draw(annotation_maps))}
    return {"apiVersion": group, "kind": kind.name, "metadata": metadata, **spec}


objects = shared_objects().map(lambda obj: json.loads(json.dumps(obj)))


def _unless_absent(key: str, value: Any) -> Json:
    return {} if value == "absent" else {key: value}


options = st.fixed_dictionaries(
    {"replace": st.booleans()},
    optional={
        "size": st.sampled_from([GI, 3 * GI // 2]),
        "use_volume": names,
        "container": st.sampled_from(["a", "x"]),
    },
)


@given(objects, options)
@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
def test_twice_is_once_and_undo_gives_the_same_object(obj: Json, how: Json) -> None:
    original = copy.deepcopy(obj)
    change = _planned(obj, how)
    assert obj == original
    assert jsonpatch.apply_patch(obj, list(change.operations)) == change.after
    assert (plan_patch(change.after, **how).operations, bool(change.operations)) == ((), change.after != obj)
    assert in_order(obj, change.after)
    undo = plan_undo(change.after)
    assert undo.after == obj
    assert jsonpatch.apply_patch(change.after, list(undo.operations)) == obj
    if how.get("use_volume") is None:
        worked_on = [i for i, c in enumerate(spec_of(change.after)["containers"]) if at_shm_is_memory(change.after, i)]
        assert worked_on


@given(objects, options, options)
@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
def test_one_undo_takes_back_several_patches(obj: Json, first: Json, second: Json) -> None:
    once = _planned(obj, first).after
    assert plan_undo(_planned(once, second).after).after == obj


def in_order(before: Any, after: Any) -> bool:
    """Keys and items that stay keep their order."""
    if isinstance(before, dict) and isinstance(after, dict):
        kept = [key for key in before if key in after]
        return kept == [key for key in after if key in before] and all(in_order(before[k], after[k]) for k in kept)
    return not isinstance(before, list) or all(in_order(*pair) for pair in zip(before, after or [], strict=False))


def _planned(obj: Json, how: Json) -> Any:
    try:
        return plan_patch(obj, **how)
    except SpecError:
        assume(False)


def at_shm_is_memory(obj: Json, container: int) -> bool:
    spec = spec_of(obj)
    mount = shm_mount(spec["containers"][container])
    volume = volumes_of(spec).get(mount[1]["name"]) if mount else None
    return volume is not None and volume.form == "memory"


def test_undo_of_what_was_never_patched_does_nothing() -> None:
    change = plan_undo(workbench())
    assert change.operations == ()
    assert change.left == (f"it has no annotation {ANNOTATION}: cvlaunch has not patched it",)


def test_undo_leaves_what_others_have_added_since() -> None:
    patched = plan_patch(of_kind("Deployment", {"containers": [{"name": "a"}]})).after
    other = {"name": "other", "emptyDir": {}}
    spec_of(patched)["volumes"].insert(0, other)
    patched["metadata"]["annotations"]["theirs"] = "1"
    after = plan_undo(patched).after
    assert spec_of(after) == {"containers": [{"name": "a"}], "volumes": [other]}
    assert after["metadata"]["annotations"] == {"theirs": "1"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda obj: spec_of(obj)["volumes"].clear(), '{"volume": "shm"} can\'t be taken back: change it by hand'),
        (lambda obj: spec_of(obj)["containers"][0].pop("volumeMounts"), "has changed since cvlaunch patched it"),
        (lambda obj: obj["metadata"]["annotations"].update({ANNOTATION: "[1"}), "is not what cvlaunch wrote"),
        (lambda obj: obj["metadata"]["annotations"].update({ANNOTATION: "[1]"}), "is not what cvlaunch wrote"),
        (lambda obj: obj["metadata"]["annotations"].update({ANNOTATION: '[{"mount": "z"}]'}), "can't be taken back"),
    ],
)
def test_undo_of_what_has_changed_says_so(spoil: Callable[[Json], object], message: str) -> None:
    patched = plan_patch(of_kind("Deployment", pod())).after
    spoil(patched)
    with pytest.raises(SpecError, match=re.escape(message)):
        plan_undo(patched)


# -- files


def read_all(text: str) -> list[Any]:
    """By another parser than ours; numbers and dates as they are."""
    return list(YAML(typ="safe", pure=True).load_all(text))


def patched(text: str, **how: Any) -> str:
    return patch_text(text, lambda obj: plan_patch(obj, **{"size": 2 * GI, "replace": True, **how})).text


def objects_in(text: str) -> Iterator[Json]:
    for document in read_all(text):
        if isinstance(document, dict):
            yield from document.get("items", [document])


def comments(text: str) -> list[str]:
    return re.findall(r"(?<=\s)#.*?(?=\r?$)", text, re.MULTILINE)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path: Path, golden: Golden) -> None:
    before = path.read_bytes().decode()
    after = patched(before)
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), path.name, "patched", lineterm="", n=1)
    golden.check(f"shm/{path.name}.diff", "".join(f"{line}\n" for line in diff))
    assert patched(after) == after
    assert comments(after)[: len(comments(before))] == comments(before) or "readOnly" in before
    assert read_all(patch_text(after, plan_undo).text) == read_all(before)
    for old, new in zip(objects_in(before), objects_in(after), strict=True):
        kind = kind_of(old)
        if kind is None:
            assert new == old
            continue
        assert any(at_shm_is_memory(new, i) for i in range(len(spec_of(new)["containers"])))
        if kind.group != "kubeflow.org" and "generateName" not in new["metadata"]:
            kubernetes_validate.validate(new, "1.33", strict=True)


def test_the_corpus_has_all_kinds() -> None:
    found = {kind.name for path in MANIFESTS for obj in objects_in(path.read_text()) if (kind := kind_of(obj))}
    assert found >= {"Notebook", "Deployment", "StatefulSet", "Job", "Pod", "CronJob", "DaemonSet", "ReplicaSet"}
    assert len(MANIFESTS) >= 10


def test_a_file_without_pods_stays_to_the_byte() -> None:
    text = "# nothing\n---\na:   {b:  1}\r\n---\n\n--- |\n  text\n...\n# end"
    assert patched(text) == text
    assert patched("") == ""


styles = st.fixed_dictionaries(
    {"indent": st.sampled_from([2, 4]), "default_flow_style": st.sampled_from([None, False, True])}
)


@given(shared_objects(), options, styles, st.randoms(use_true_random=False))
@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
def test_files_of_any_style_keep_comments_and_order(obj: Json, how: Json, style: Json, random: Any) -> None:
    change = _planned(json.loads(json.dumps(obj)), how)
    block = style["default_flow_style"] is False
    lines = yaml.safe_dump(obj, sort_keys=False, width=10**6, **style).splitlines()
    lines = [f"{line}  # {i}" for i, line in enumerate(lines)] if block else lines
    for i in sorted(random.sample(range(len(lines)), len(lines) // 3), reverse=True) if block else ():
        lines.insert(i, f"{' ' * random.randrange(9)}# before {i}")
    text = random.choice(["\n", "\r\n"]).join([*lines, random.choice(["", "# end"])])
    after = patch_text(text, lambda obj: plan_patch(obj, **how)).text
    assert yaml.safe_load(after) == change.after
    assert in_order(change.after, yaml.safe_load(after))
    found = comments(after)
    gone = [comment for comment in comments(text) if comment not in found]
    assert len(gone) <= sum(operation["op"] == "remove" for operation in change.operations)
    assert [comment for comment in comments(text) if comment not in gone] == found
    undone = patch_text(after, plan_undo).text
    assert yaml.safe_load(undone) == obj
    assert [comment for comment in comments(undone) if comment not in gone] == comments(undone)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
DEPLOYMENT = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f.yaml:1: not YAML: "),
        ("a: 1\n---\nb: {{ .Values.x }}: {{ y }}\n", "f.yaml:3: not YAML: mapping values are not allowed here; a "
         "template of Helm must be rendered first"),
        ("\ta: 1", "f.yaml:1: not YAML: found character '\\t' that cannot start any token"),
        ("a: \x07", "f.yaml: not YAML: unacceptable character #x0007"),
        ("---\na: *b\n", "f.yaml:2: no anchor &b stands before its alias"),
        (f"---\n# x\n---\n{DEPLOYMENT}spec: {{template: {{spec: {{}}}}}}\n", "f.yaml:4: deployment/x has no contai"),
        (f"{DEPLOYMENT}spec: 3\n", "f.yaml:1: spec: keys and values were expected"),
        (f"{DEPLOYMENT}spec: &s {{template: *s}}\n", "f.yaml:4: no anchor &s stands before its alias"),
        (f"{DEPLOYMENT}{BOMB}", "f.yaml:1: its aliases expand to more than 200000 values"),
        ("[" * 600 + "]" * 600, "f.yaml:1: nested too deep"),
    ],
)  # fmt: skip
def test_bad_files_are_said_with_their_line(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        patch_text(text, plan_patch, file="f.yaml")
    assert message in str(caught.value)


def test_aliases_are_written_out_only_where_they_must_be() -> None:
    text = (
        f"{DEPLOYMENT}spec:\n  selector: &labels {{matchLabels: {{app: x}}}}\n  template:\n    metadata: *labels\n"
        "    spec:\n      containers:\n      - name: x\n        volumeMounts: &mounts\n"
        "        - {name: d, mountPath: /d}\n      - name: y\n        volumeMounts: *mounts\n"
    )
    after = patched(text, replace=False)
    assert "metadata: *labels" in after
    assert "*mounts" not in after
    first, second = (container["volumeMounts"] for container in spec_of(read_all(after)[0])["containers"])
    assert (len(first), second) == (2, [{"name": "d", "mountPath": "/d"}])


# -- which pods have too little


def running(*, resources: Json | None = None, image: str = "busybox", volume: Json | None = None, **more: Any) -> Json:
    container: Json = {"name": "a", "image": image, "resources": resources or {}}
    spec: Json = {"containers": [container, {"name": "istio-proxy", "image": "torch"}], **more.pop("spec", {})}
    if volume is not None:
        container["volumeMounts"] = [{"name": "v", "mountPath": "/dev/shm"}]
        spec["volumes"] = [{"name": "v", **volume}]
    metadata = {"name": "x-0", **more}
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Running"}}


GPU = {"limits": {"nvidia.com/mig-1g.5gb": 1}}
STATEFUL = {
    "labels": {"notebook-name": "wb"},
    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "wb", "controller": True}],
}


@pytest.mark.parametrize(
    ("obj", "least", "expected"),
    [
        (running(), None, ("64 MiB by default", "", False)),
        (running(resources=GPU), None, ("64 MiB by default", "nvidia.com/mig-1g.5gb", True)),
        (running(image="quay.io/x/pytorch:2"), None, ("64 MiB by default", "image pytorch:2", True)),
        (running(image="x@sha256:c0da"), None, ("64 MiB by default", "", False)),
        (running(**STATEFUL), None, ("64 MiB by default", "workbench", True)),
        (running(resources=GPU, volume={"emptyDir": {"medium": "Memory"}}), None,
         ("memory without a limit", "nvidia.com/mig-1g.5gb", False)),
        (running(resources=GPU, volume={"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}), GI,
         ("1Gi of memory", "nvidia.com/mig-1g.5gb", False)),
        (running(resources=GPU, volume={"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}), GI + 1,
         ("1Gi of memory", "nvidia.com/mig-1g.5gb", True)),
        (running(resources=GPU, volume={"persistentVolumeClaim": {"claimName": "c"}}), None,
         ("the PersistentVolumeClaim c", "nvidia.com/mig-1g.5gb", False)),
        (running(resources=GPU, spec={"hostIPC": True}), None,
         ("the node's (hostIPC)", "nvidia.com/mig-1g.5gb", False)),
    ],
)  # fmt: skip
def test_pods_are_judged(obj: Json, least: int | None, expected: tuple[str, str, bool]) -> None:
    (finding,) = check_pod(obj, least=least)
    assert (finding.words, finding.loads, finding.too_little) == expected


def test_a_check_says_what_to_patch() -> None:
    assert [finding.owner for finding in check_pod(running(**STATEFUL))] == ["notebook/wb"]
    assert [finding.owner for finding in check_pod(running(**REPLICAS))] == ["deployment/web"]
    assert [finding.owner for finding in check_pod(running())] == ["pod/x-0"]
    assert [*check_pod({**running(), "status": {"phase": "Succeeded"}})] == []


# -- the command


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return called


def test_a_file_is_filtered(call: Call, tmp_path: Path) -> None:
    text = next(path for path in MANIFESTS if path.name == "deployment-multi.yaml").read_text()
    (tmp_path / "in.yaml").write_text(text)
    code, out, err = call("shm", "patch", "-f", "in.yaml", "--size", "2Gi")
    assert (code, out) == (0, patched(text))
    assert err.startswith("deployment/detector: volume shm is new: memory, at most 2Gi\n")
    (tmp_path / "out.yaml").write_text(out)
    assert call("shm", "patch", "-f", "out.yaml", "--undo", "-q") == (0, text, "")
    assert call("shm", "patch", "-f", "out.yaml", "--size", "2Gi")[1:] == (
        out,
        "deployment/detector: nothing to do; it is as asked\n",
    )


def test_a_file_can_be_looked_at_first(call: Call, tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text(json.dumps(workbench(), indent=1))
    code, out, _ = call("shm", "patch", "notebook/my-workbench", "-f", "in.yaml", "--dry-run")
    assert code == 0
    assert '+        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]' in out or "+" in out
    code, out, _ = call("shm", "patch", "-f", "in.yaml", "--json")
    (found,) = json.loads(out)
    assert (code, found["object"], found["effect"][:10]) == (0, "notebook/my-workbench", "the pod of")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["shm", "patch"], 2, "give KIND/NAME, as notebook/my-workbench, or -f FILE; see: cvlaunch shm patch --help"),
        (["shm", "patch", "wb"], 2, "'wb' is no KIND/NAME; it looks like notebook/my-workbench"),
        (["shm", "patch", "notebok/wb"], 2, "'notebok' is no kind with a pod; did you mean 'notebook'? there are "),
        (["shm", "patch", "-f", "nix.yaml"], 2, "nix.yaml: No such file or directory"),
        (["shm", "patch", "-f", "in.yaml", "--size", "2 apples"], 2, "Invalid value for '--size': '2 apples' is not a"),
        (["shm", "patch", "-f", "in.yaml", "job/x"], 2, "in.yaml has no job/x"),
        (["shm", "patch", "-f", "in.yaml", "--context", "x"], 2, "--file: a file is not in a cluster"),
        (["shm", "patch", "-f", "in.yaml", "--undo", "--size", "1Gi"], 2, "--undo: it takes back all that was changed"),
        (["shm", "patch", "-f", "latin.yaml"], 2, "latin.yaml: not a text file (UTF-8)"),
        (
            ["shm", "patch", "-f", "in.yaml", "--container", "b"],
            2,
            "in.yaml:1: --container: notebook/my-workbench has no",
        ),
        (["shm", "patch", "notebook/x", "--target", "local"], 2, "--target: target local is of backend local"),
        (["shm", "check", "--kubeconfig", "nix"], 2, "there is no file nix"),
    ],
)
def test_bad_input_is_one_clear_line(call: Call, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(workbench()))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_without_pods_passes_with_a_warning(call: Call, tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text("kind: Service\n")
    assert call("shm", "patch", "-f", "in.yaml") == (
        0,
        "kind: Service\n",
        "warning: in.yaml has nothing with a pod that can be patched; it comes out as it is\n",
    )


# -- a cluster


def made(kube: KubeCluster, obj: Json) -> tuple[str, Json]:
    """Namespace and object, as the API server has it."""
    namespace = kube.namespace()
    obj = {**obj, "metadata": {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}}
    return namespace, kube.create(obj["kind"], namespace, obj)


def serving(kind: str) -> Json:
    selector = {"matchLabels": {"app": "x"}}
    obj = of_kind(kind, pod(image="registry.example.com/x:1"))
    obj["spec"] |= {"selector": selector, "replicas": 0, **({"serviceName": "x"} if kind == "StatefulSet" else {})}
    obj["spec"]["template"]["metadata"] = {"labels": {"app": "x"}}
    return obj


def without_bookkeeping(obj: Json) -> Json:
    kept = {key: value for key, value in obj["metadata"].items() if key in ("name", "annotations", "labels")}
    return {"metadata": kept, "spec": obj["spec"]}


@pytest.mark.parametrize(
    ("obj", "what"),
    [
        (workbench(MEMORY, mounts=({"mountPath": "/opt/shm", "name": "pytorch-shm"},)), "notebooks/my-workbench"),
        (workbench(), "notebook.kubeflow.org/my-workbench"),
        (serving("Deployment"), "deploy/x"),
        (serving("StatefulSet"), "sts/x"),
    ],
)
def test_patched_once_in_a_cluster_and_back_again(kube: KubeCluster, call: Call, obj: Json, what: str) -> None:
    namespace, before = made(kube, obj)
    kind, name = before["kind"], before["metadata"]["name"]
    options = [what, "-n", namespace, "--yes"]
    code, out, err = call("shm", "patch", *options, "--size", "2Gi")
    assert code == 0, err
    after = kube.get(kind, namespace, name)
    assert after
    volume = at_shm(after)
    assert volume and volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert re.search(r"^\+ .*mountPath: /dev/shm$", out, re.MULTILINE)
    assert err.endswith(f"patched {kind.lower()}/{name}; --undo takes it back\n")
    assert call("shm", "patch", *options, "--size", "2Gi") == (
        0,
        "",
        f"{kind.lower()}/{name}: nothing to do; it is as asked\n",
    )
    assert call("shm", "patch", *options, "--undo", "--dry-run")[0] == 0
    assert kube.get(kind, namespace, name) == after
    assert call("shm", "patch", *options, "--undo")[0] == 0
    found = kube.get(kind, namespace, name)
    assert found and without_bookkeeping(found) == without_bookkeeping(before)


class Terminal:
    """`cvlaunch` with somebody in front of it."""

    def __init__(self, *arguments: str) -> None:
        self._end, other_end = pty.openpty()
        streams = {"stdin": other_end, "stdout": other_end, "stderr": other_end}
        self._process = subprocess.Popen([*COMMAND, *arguments], **streams)  # type: ignore[call-overload]
        os.close(other_end)
        self.text = ""

    def read_to(self, word: str) -> None:
        while word not in self.text:
            self.text += os.read(self._end, 4096).decode()

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._end, text.encode())

    def end(self) -> int:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while read := os.read(self._end, 4096).decode():
                self.text += read
        os.close(self._end)
        return int(self._process.wait(60))


def test_it_asks_and_takes_a_no(kube: KubeCluster) -> None:
    namespace, before = made(kube, workbench())
    terminal = Terminal("shm", "patch", "notebook/my-workbench", "-n", namespace, "--size", "2Gi")
    terminal.read_to("[y/N]: ")
    assert "the pod of the notebook restarts" in terminal.text
    assert f"patch notebook/my-workbench in context test ({kube.url}), namespace {namespace}?" in terminal.text
    assert "\x1b[32m+" in terminal.text
    terminal.type("n\n")
    assert terminal.end() == 130
    assert "cvlaunch: nothing was changed" in terminal.text
    assert kube.get("Notebook", namespace, "my-workbench") == before


@pytest.mark.parametrize(
    ("change", "questions"),
    [
        pytest.param({"labels": {"team": "vision"}}, 1, id="another place"),
        pytest.param({"annotations": {"theirs": "1"}}, 2, id="the place that is patched"),
    ],
)
def test_what_changes_in_between_is_read_anew(kube: KubeCluster, change: Json, questions: int) -> None:
    namespace, before = made(kube, workbench())
    terminal = Terminal("shm", "patch", "notebook/my-workbench", "-n", namespace)
    terminal.read_to("[y/N]: ")
    kube.put({**before, "metadata": {**before["metadata"], **change}})
    for _ in range(questions):
        terminal.read_to("[y/N]: ")
        terminal.type("y\n")
    assert terminal.end() == 0, terminal.text
    after = kube.get("Notebook", namespace, "my-workbench")
    assert after and at_shm(after)
    for key, value in change.items():
        assert after["metadata"][key].items() >= value.items()
    asked = [request.method for request in kube.requests if namespace in request.path]
    assert asked == ["GET", "PATCH", "GET", "PATCH"]


def test_what_changes_all_the_time_is_given_up(kube: KubeCluster, call: Call) -> None:
    namespace, _ = made(kube, workbench())
    kube.fail(409, method="PATCH", times=None)
    code, _, err = call("shm", "patch", "notebook/my-workbench", "-n", namespace, "--yes")
    assert code == 6
    assert err.splitlines()[-1].endswith("changes faster than it can be patched: try again")


def test_nobody_is_there_to_be_asked(kube: KubeCluster, call: Call) -> None:
    namespace, before = made(kube, workbench())
    code, _, err = call("shm", "patch", "notebook/my-workbench", "-n", namespace)
    assert (code, err.splitlines()[-1]) == (
        2,
        "cvlaunch: this needs a yes; nobody can be asked here, so give --yes",
    )
    assert kube.get("Notebook", namespace, "my-workbench") == before


def test_a_notebook_by_a_target(kube: KubeCluster, call: Call, tmp_path: Path) -> None:
    namespace, _ = made(kube, workbench())
    (tmp_path / "targets.yaml").write_text(
        f"targets: {{ocp: {{backend: openshift, context: test, namespace: {namespace}}}}}\n"
    )
    code, out, err = call("shm", "patch", "notebook/my-workbench", "--target", "ocp", "--yes", "--json")
    assert (code, json.loads(out)["applied"]) == (0, True), err
    found = kube.get("Notebook", namespace, "my-workbench")
    assert found and at_shm(found)
    assert call("shm", "patch", "notebook/my-workbench", "--target", "ocp", "-n", "other", "--yes")[0] == 2


@pytest.mark.parametrize(
    ("disturb", "arguments", "code", "message"),
    [
        (None, ["notebook/my-workbnch"], 2, "did you mean 'my-workbench'? there are my-workbench"),
        (None, ["deployment/x"], 2, "no deployment/x in context test"),
        (("forbid", "patch", "notebooks"), ["notebook/my-workbench", "--yes"], 4, 'cannot patch resource "notebooks"'),
        (("forbid", "get", "notebooks"), ["notebook/my-workbench", "--yes"], 4, 'cannot get resource "notebooks"'),
        (("hide_api", "kubeflow.org"), ["notebook/my-workbench"], 2, "lacks the operator that brings it"),
        (None, ["notebook/my-workbench", "--context", "tst"], 2, "no context 'tst'"),
        (None, ["notebook/my-workbench", "--context", "stale"], 4, "context stale"),
        (None, ["notebook/my-workbench", "--use-volume", "pytorch", "--size", "1Gi"], 2, "--size: the size of volume"),
    ],
)  # fmt: skip
def test_what_a_cluster_refuses_is_one_clear_line(
    kube: KubeCluster, call: Call, disturb: tuple[str, ...] | None, arguments: list[str], code: int, message: str
) -> None:
    namespace, _ = made(kube, workbench())
    if disturb:
        getattr(kube, disturb[0])(*disturb[1:])
    found, _, err = call("shm", "patch", *arguments, "-n", namespace)
    assert found == code, err
    assert message in err.splitlines()[-1]


def there(kube: KubeCluster, namespace: str, **how: Any) -> None:
    """A pod that somebody runs."""
    obj = running(**how)
    kube.put({"apiVersion": "v1", "kind": "Pod", **obj, "metadata": {**obj["metadata"], "namespace": namespace}})


def test_a_pod_of_a_cluster_must_be_made_anew(kube: KubeCluster, call: Call) -> None:
    namespace = kube.namespace()
    there(kube, namespace, spec={"nodeName": "elsewhere"})
    code, out, err = call("shm", "patch", "pod/x-0", "-n", namespace, "--container", "a")
    assert (code, out) == (2, "")
    assert "a cluster takes no other volumes for a Pod that is there: pod/x-0 must be made anew" in err


def test_check_lists_pods_and_marks_those_with_too_little(kube: KubeCluster, call: Call) -> None:
    namespace = kube.namespace()
    assert call("shm", "check", "-n", namespace)[:2] == (0, "")
    memory = {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
    there(kube, namespace, resources=GPU, volume=memory, spec={"nodeName": "elsewhere"})
    code, out, _ = call("shm", "check", "-n", namespace)
    assert (code, out.splitlines()[1].split("  ")[0]) == (0, "x-0")
    code, out, err = call("shm", "check", "-n", namespace, "--size", "2Gi")
    assert (code, "too little" in out, err) == (1, True, "more for it: cvlaunch shm patch pod/x-0 --size 2Gi\n")
    code, out, _ = call("shm", "check", "-n", namespace, "--json")
    assert (code, [(found["size"], found["too_little"]) for found in json.loads(out)]) == (0, [(GI, False)])
