"""Looking at clusters: what an API server says of itself, to users who may see much, little, or nothing."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import yaml

from launcher.cli.app import main
from launcher.errors import AuthError
from launcher.kube.access import Access
from launcher.kube.client import Cluster
from launcher.kube.probe import ROLE, Subject, as_target, policy, probe
from launcher.kube.target import KubernetesTarget
from tests.services.kube import KubeCluster

Json = dict[str, Any]
Call = Callable[..., tuple[int, str, str]]

CORE = "/api/v1"
SPACE = f"{CORE}/namespaces/vision"
KUEUE = "/apis/kueue.x-k8s.io/v1beta1"


@dataclass
class Answers:
    """What a server says. lists: path → items. hidden: forbidden paths. denied: (verb, resource) of the user.
    accounts: service account → SCCs that it may use; None: the user may not ask."""

    version: str = "v1.33.4"
    groups: tuple[str, ...] = ("batch", "apps")
    objects: dict[str, Json] = field(default_factory=lambda: {SPACE: {"metadata": {"name": "vision"}}})
    lists: dict[str, list[Json]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    denied: set[tuple[str, str]] = field(default_factory=set)
    accounts: dict[str, set[str]] | None = None
    user: str | None = "ada"
    token: str = "good"
    url: str = ""

    def get(self, path: str) -> tuple[int, Json]:
        if path in self.hidden:
            what = path.rpartition("/")[2]
            return 403, refusal(
                403, f'{what} is forbidden: User "ada" cannot list resource "{what}" at the cluster scope'
            )
        if path == "/version":
            return 200, {"gitVersion": self.version}
        if path == "/apis":
            return 200, {"groups": [{"name": name} for name in self.groups]}
        if path in self.objects:
            return 200, self.objects[path]
        if path.rpartition("/")[2] in KNOWN or path in self.lists:
            return 200, {"items": self.lists.get(path, []), "metadata": {}}
        if path.startswith("/apis/"):
            return 404, refusal(404, "the server could not find the requested resource")
        return 404, refusal(404, f'"{path}" not found')

    def post(self, path: str, body: Json) -> tuple[int, Json]:
        if path.endswith("/selfsubjectreviews"):
            said = {"status": {"userInfo": {"username": self.user}}}
            return (201, said) if self.user else (404, refusal(404, "the server could not find the requested resource"))
        asked = body["spec"]["resourceAttributes"]
        if path.endswith("/localsubjectaccessreviews"):
            return self.of_account(path, body["spec"])
        if asked["verb"] == "use" and asked.get("namespace") != "vision":  # a RoleBinding gives it in the namespace
            return 201, {"status": {"allowed": False}}
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"), asked.get("name"))))
        return 201, {"status": {"allowed": (asked["verb"], resource) not in self.denied}}

    def of_account(self, path: str, spec: Json) -> tuple[int, Json]:
        if self.accounts is None:
            what = 'User "ada" cannot create resource "localsubjectaccessreviews" in API group "authorization.k8s.io"'
            return 403, refusal(403, f"localsubjectaccessreviews is forbidden: {what}")
        name, asked = spec["user"].rpartition(":")[2], spec["resourceAttributes"]
        assert path.split("/")[-2] == asked["namespace"] == "vision"
        assert {"system:authenticated", "system:serviceaccounts:vision"} <= {*spec["groups"]}
        return 201, {"status": {"allowed": asked["name"] in self.accounts[name]}}


KNOWN = {
    "nodes", "pods", "resourcequotas", "limitranges", "priorityclasses", "storageclasses", "persistentvolumeclaims",
}  # fmt: skip


def refusal(code: int, message: str) -> Json:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message}


@contextlib.contextmanager
def served(answers: Answers) -> Iterator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version: ClassVar[str] = "HTTP/1.1"
        wbufsize: ClassVar[int] = -1  # an answer is one packet, which nobody waits to acknowledge

        def do_GET(self) -> None:
            self.say(*answers.get(urlsplit(self.path).path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.say(*answers.post(urlsplit(self.path).path, json.loads(body)))

        def say(self, code: int, body: Json) -> None:
            if self.headers["Authorization"] != f"Bearer {answers.token}":
                code, body = 401, refusal(401, "Unauthorized")
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    answers.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield answers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def kubeconfig(folder: Path, answers: Answers, token: str = "good") -> str:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": answers.url}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "kind@Lab.1/x", "context": {"cluster": "c", "user": "u", "namespace": "vision"}}],
        "current-context": "kind@Lab.1/x",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(content))
    return str(folder / "kubeconfig")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def made(answers: Answers, **access: str) -> Cluster:
            stack.enter_context(served(answers))
            found = Cluster(Access(kubeconfig=kubeconfig(tmp_path, answers, **access)))
            stack.callback(found.close)
            return found

        yield made


def node(name: str, *, labels: dict[str, str] | None = None, ready: bool = True, **more: Any) -> Json:
    """more: allocatable by name with `_` for `.` and `__` for `/`; taints."""
    taints = [dict(zip(("key", "value", "effect"), taint, strict=True)) for taint in more.pop("taints", ())]
    amounts = {key.replace("__", "/").replace("_", "."): value for key, value in more.items()}
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": taints},
        "status": {
            "allocatable": {"cpu": "31850m", "memory": "130046416Ki", **amounts},
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def pod(on: str | None, gpus: int, first: int = 0) -> Json:
    """first: GPUs of its init container."""
    asked = [{"resources": {"limits": {"nvidia.com/gpu": str(count)}}} for count in (gpus, first)]
    return {
        "metadata": {"name": f"{on}-{gpus}-{first}"},
        "spec": {"nodeName": on, "containers": asked[:1], "initContainers": asked[1:]},
    }


A100 = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
TAINT = ("nvidia.com/gpu", "present", "NoSchedule")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def called(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return called


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# -- a whole cluster


def test_a_cluster_with_everything(kube: KubeCluster, call: Call) -> None:
    space = kube.namespace(pod_security="restricted", quota={"requests.nvidia.com/gpu": "2"}, openshift=True)
    spec: Json = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    kube.create("PersistentVolumeClaim", space, {"metadata": {"name": "runs"}, "spec": spec})
    kube.wait_for("PersistentVolumeClaim", space, "runs", lambda found: found["status"]["phase"] == "Bound")
    queue = {"metadata": {"name": "team"}, "spec": {"clusterQueue": "all"}}
    kube.create("LocalQueue", space, {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", **queue})
    code, out, err = call("targets", "probe", "lab", "--context", "exec", "--namespace", space, "--json", "--write")
    assert code == 0, err
    found = json.loads(out)["cluster"]
    assert (found["distribution"], found["level"], found["exists"], found["hidden"]) == (
        "OpenShift",
        "restricted",
        True,
        [],
    )
    gpus = {(n["name"], n["resource"], n["model"], n["count"], n["free"]) for n in found["nodes"]}
    assert {("a100", "nvidia.com/gpu", "A100", 2, 2), ("mig", "nvidia.com/mig-1g.5gb", "A100", 7, 7)} <= gpus
    assert [(q["resource"], q["hard"]) for q in found["quotas"]] == [("requests.nvidia.com/gpu", "2")]
    assert [q["name"] for q in found["queues"]] == ["team"]
    assert [(c["name"], c["phase"]) for c in found["claims"]] == [("runs", "Bound")]
    shown = yaml.safe_load(call("targets", "show", "lab")[1])
    assert (shown["backend"], shown["context"], shown["namespace"]) == ("openshift", "exec", space)
    assert (shown["output"], shown["queue"]) == ("pvc://runs/runs", "team")


def test_a_user_with_the_least_role(kube: KubeCluster, call: Call) -> None:
    """Nothing of the cluster and nothing that is not in the Role: a probe is whole all the same."""
    space = kube.namespace()
    for resource in ("nodes", "priorityclasses", "storageclasses", "namespaces", "clusterqueues"):
        kube.forbid("*", resource)
    kube.forbid("list", "pods", namespace="")
    kube.forbid("patch", "jobs", namespace=space)
    code, out, err = call("targets", "probe", "lab", "--context", "test", "--namespace", space)
    assert code == 0, err
    lines = words(out)
    assert "patch jobs runs: submit, status, cancel, rm yes" in lines
    assert f"hidden from you nodes, namespace {space}, priorityclasses, storageclasses" in lines


# -- GPUs


def test_gpus_with_label_count_free_and_taints(cluster: Callable[..., Cluster]) -> None:
    nodes = [
        node("cpu-1"),
        node("gpu-1", labels=A100, nvidia_com__gpu="8", taints=[TAINT, ("team", "vision", "NoSchedule")]),
        node("gpu-2", labels={**A100, "x": "y"}, nvidia_com__gpu="8", ready=False, taints=[TAINT]),
        node("gpu-3", labels={"nvidia.com/gpu.product": "Tesla-T4-SHARED"}, nvidia_com__gpu="4"),
        node("mig-1", **{"nvidia_com__mig-1g_10gb": "7", "nvidia_com__gpu": "0"}),
    ]
    pods = [pod("gpu-1", 2), pod("gpu-1", 1, first=3), pod(None, 8), pod("gpu-3", 9)]
    found = probe(cluster(Answers(lists={f"{CORE}/nodes": nodes, f"{CORE}/pods": pods})))
    facts = [(n.name, n.ready, n.resource, n.model, n.product, n.count, n.free, n.taints) for n in found.nodes]
    assert facts == [
        ("gpu-1", True, "nvidia.com/gpu", "A100", A100["nvidia.com/gpu.product"], 8, 3, ("team=vision:NoSchedule",)),
        ("gpu-2", False, "nvidia.com/gpu", "A100", A100["nvidia.com/gpu.product"], 8, 8, ()),
        ("gpu-3", True, "nvidia.com/gpu", "", "Tesla-T4-SHARED", 4, 0, ()),
        ("mig-1", True, "nvidia.com/mig-1g.10gb", "", "", 7, 7, ()),
    ]
    assert (found.nodes[0].cpus, found.nodes[0].memory) == ("31850m", "130046416Ki")


def test_hidden_pods_leave_it_open_what_is_free(cluster: Callable[..., Cluster]) -> None:
    answers = Answers(lists={f"{CORE}/nodes": [node("g", labels=A100, nvidia_com__gpu="8")]}, hidden={f"{CORE}/pods"})
    found = probe(cluster(answers))
    assert [(n.count, n.free) for n in found.nodes] == [(8, None)]
    assert found.hidden == ("pods of other namespaces",)


def test_what_may_not_be_seen_is_no_error(cluster: Callable[..., Cluster]) -> None:
    wide = {f"{CORE}/nodes", "/apis/storage.k8s.io/v1/storageclasses", "/apis/scheduling.k8s.io/v1/priorityclasses"}
    narrow = {SPACE, *(f"{SPACE}/{name}" for name in ("resourcequotas", "limitranges", "persistentvolumeclaims"))}
    found = probe(cluster(Answers(hidden=wide | narrow, user=None)))
    assert set(found.hidden) == {
        "nodes", "storageclasses", "priorityclasses", "namespace vision", "resourcequotas", "limitranges",
        "persistentvolumeclaims",
    }  # fmt: skip
    assert (found.exists, found.level, found.user, found.nodes) == (None, None, None, ())


def test_without_an_identity_nothing_is_seen(cluster: Callable[..., Cluster]) -> None:
    with pytest.raises(AuthError, match="log in again"):
        probe(cluster(Answers(), token="old"))


# -- what the cluster is


DISTRIBUTIONS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "Kubernetes": ("v1.33.4", (), {"kubernetes.io/os": "linux"}),
    "OpenShift": ("v1.31.9", ("security.openshift.io",), {}),
    "GKE": ("v1.33.4-gke.1134000", (), {}),
    "EKS": ("v1.32.8-eks-3abc123", (), {}),
    "OVH Managed Kubernetes": ("v1.33.1", ("kube.cloud.ovh.com",), {}),
    "AKS": ("v1.32.6", (), {"kubernetes.azure.com/cluster": "x"}),
    "K3s": ("v1.33.4+k3s1", (), {}),
}


@pytest.mark.parametrize("name, said", DISTRIBUTIONS.items(), ids=DISTRIBUTIONS)
def test_distributions(
    cluster: Callable[..., Cluster], name: str, said: tuple[str, tuple[str, ...], dict[str, str]]
) -> None:
    version, groups, labels = said
    found = probe(cluster(Answers(version, groups, lists={f"{CORE}/nodes": [node("n", labels=labels)]})))
    assert (found.distribution, found.version) == (name, version)


def test_a_namespace_s_level_and_one_that_is_not_there(cluster: Callable[..., Cluster]) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    found = probe(cluster(Answers(objects={SPACE: {"metadata": {"name": "vision", "labels": labels}}})))
    assert (found.exists, found.level, found.user) == (True, "restricted", "ada")
    assert probe(cluster(Answers(objects={}))).exists is False


def test_security_context_constraints_that_may_be_used(cluster: Callable[..., Cluster]) -> None:
    denied = {("use", f"securitycontextconstraints/{name}") for name in ("anyuid", "hostmount-anyuid", "privileged")}
    found = probe(cluster(Answers(groups=("security.openshift.io",), denied=denied)))
    assert (found.account, found.sccs) == (None, ("restricted-v2", "restricted", "nonroot-v2", "nonroot"))


@pytest.mark.parametrize(
    ("asked", "account", "sccs"),
    [(None, "default", ("restricted-v2",)), ("trainer", "trainer", ("restricted-v2", "anyuid"))],
)
def test_security_context_constraints_of_the_pods(
    cluster: Callable[..., Cluster], asked: str | None, account: str, sccs: tuple[str, ...]
) -> None:
    """A pod has those of its service account, whatever its user may."""
    accounts = {"default": {"restricted-v2"}, "trainer": {"restricted-v2", "anyuid"}}
    found = probe(cluster(Answers(groups=("security.openshift.io",), accounts=accounts)), service_account=asked)
    assert (found.account, found.sccs) == (account, sccs)


# -- the namespace


def test_quotas_queues_priorities_and_volumes(cluster: Callable[..., Cluster]) -> None:
    hard, used = {"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "6"}
    limit = {"type": "Container", "default": {"memory": "1Gi"}, "max": {"memory": "64Gi", "cpu": "16"}}
    lists = {
        f"{SPACE}/resourcequotas": [{"metadata": {"name": "q"}, "status": {"hard": hard, "used": used}}],
        f"{SPACE}/limitranges": [{"metadata": {"name": "l"}, "spec": {"limits": [limit]}}],
        f"{KUEUE}/namespaces/vision/localqueues": [
            {"metadata": {"name": "team"}, "spec": {"clusterQueue": "all"}, "status": {"pendingWorkloads": 3}}
        ],
        "/apis/scheduling.k8s.io/v1/priorityclasses": [
            {"metadata": {"name": "system-node-critical"}, "value": 2_000_001_000},
            {"metadata": {"name": "low"}, "value": -1, "preemptionPolicy": "Never", "globalDefault": True},
        ],
        "/apis/storage.k8s.io/v1/storageclasses": [
            {
                "metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
                "provisioner": "csi.example.com",
                "volumeBindingMode": "WaitForFirstConsumer",
            }
        ],
        f"{SPACE}/persistentvolumeclaims": [
            claim("one", "Bound", "ReadWriteOnce"),
            claim("many", "Pending", "ReadWriteMany"),
            claim("runs", "Bound", "ReadWriteMany"),
        ],
    }
    found = probe(cluster(Answers(groups=("kueue.x-k8s.io",), lists=lists)))
    assert [(q.resource, q.used, q.hard) for q in found.quotas] == [("requests.nvidia.com/gpu", "6", "8")]
    assert [(x.kind, x.resource, x.most, x.default) for x in found.limits] == [
        ("Container", "cpu", "16", ""),
        ("Container", "memory", "64Gi", "1Gi"),
    ]
    assert [(q.name, q.cluster_queue, q.pending, q.admitted) for q in found.queues] == [("team", "all", 3, 0)]
    assert [(p.name, p.value, p.default, p.preempts) for p in found.priorities] == [("low", -1, True, False)]
    assert [(s.name, s.default, s.binding) for s in found.storage_classes] == [("fast", True, "WaitForFirstConsumer")]
    assert [(c.name, c.phase, c.shared, c.size) for c in found.claims] == [
        ("one", "Bound", False, "10Gi"),
        ("many", "Pending", True, "10Gi"),
        ("runs", "Bound", True, "10Gi"),
    ]
    assert as_target(found) == {
        "backend": "kubernetes",
        "namespace": "vision",
        "output": "pvc://runs/runs",
        "queue": "team",
    }


def claim(name: str, phase: str, mode: str) -> Json:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "10Gi"}}, "storageClassName": "fast"}
    return {"metadata": {"name": name}, "spec": spec, "status": {"phase": phase}}


# -- what follows


TARGETS: dict[str, tuple[tuple[str, ...], list[Json], Json]] = {
    "OpenShift": (("security.openshift.io",), [node("g", labels=A100, nvidia_com__gpu="8")], {"backend": "openshift"}),
    "another label": (
        (),
        [node("g", labels={"cloud.google.com/gke-accelerator": "nvidia-l4"}, nvidia_com__gpu="1")],
        {"backend": "kubernetes", "gpu_label": "gke"},
    ),
    "slices": ((), [node("g", **{"nvidia_com__mig-1g_5gb": "7"})], {"gpu_resource": "nvidia.com/mig-1g.5gb"}),
    "whole ones beside slices": (
        (),
        [node("g", **{"nvidia_com__mig-1g_5gb": "7"}), node("h", nvidia_com__gpu="2")],
        {"gpu_resource": None},
    ),
    "what most are": (
        (),
        [node("a", amd_com__gpu="1"), node("b", nvidia_com__gpu="8"), node("c", nvidia_com__gpu="8")],
        {"gpu_resource": None},
    ),
    "a taint of all nodes": (
        (),
        [
            node("a", nvidia_com__gpu="8", taints=[TAINT, ("team", "vision", "NoSchedule"), ("odd", "", "NoExecute")]),
            node("b", nvidia_com__gpu="8", taints=[("team", "vision", "NoSchedule")]),
        ],
        {"tolerations": [{"key": "team", "value": "vision", "effect": "NoSchedule"}]},
    ),
    "no GPUs": ((), [node("a")], {"gpu_resource": None, "tolerations": None}),
}


@pytest.mark.parametrize("groups, nodes, expected", TARGETS.values(), ids=TARGETS)
def test_a_target_that_fits(
    cluster: Callable[..., Cluster], groups: tuple[str, ...], nodes: list[Json], expected: Json
) -> None:
    found = probe(cluster(Answers(groups=groups, lists={f"{CORE}/nodes": nodes})))
    keys = as_target(found, context="c")
    assert KubernetesTarget.model_validate(keys)
    assert {key: keys.get(key) for key in expected} == expected


# -- rights


def test_each_right_is_asked_for_and_missing_ones_are_told(cluster: Callable[..., Cluster]) -> None:
    denied = {("create", "jobs"), ("get", "pods/log"), ("list", "workloads")}
    found = probe(cluster(Answers(denied=denied)))
    assert {(right.verb, right.resource) for right in found.missing} == denied - {("list", "workloads")}  # no Kueue
    assert {right.needed for right in found.missing} == {True}
    asked = {(right.verb, right.resource) for right in found.rights}
    of_role = {
        (verb, name)
        for need in ROLE
        for name in need.resources
        for verb in need.verbs
        if need.group in ("", "batch", "apps")
    }
    assert asked == of_role


def test_the_role_gives_what_is_asked_for_and_no_more() -> None:
    role, binding = yaml.safe_load_all(policy("vision", Subject("User", 'o"hara')))
    given = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    assert given == {(need.group, name, verb) for need in ROLE for name in need.resources for verb in need.verbs}
    assert not {"*", "watch", "update"} & {word for entry in given for word in entry}
    assert ("", "secrets", "get") not in given
    assert (role["metadata"], binding["metadata"]) == ({"name": "cvlaunch", "namespace": "vision"},) * 2
    assert binding["subjects"] == [{"kind": "User", "name": 'o"hara', "apiGroup": "rbac.authorization.k8s.io"}]
    _, binding = yaml.safe_load_all(policy("vision", Subject("ServiceAccount", "bot")))
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "bot", "namespace": "vision"}]


def test_the_page_has_this_role() -> None:
    page = (Path(__file__).parent.parent / "docs/kubernetes.md").read_text()
    assert f"```yaml\n{policy('vision', Subject('User', 'ada'))}```" in page


# -- the command line


def test_probe_of_a_context_prints_tables_and_a_target_that_can_be_used(call: Call, tmp_path: Path) -> None:
    nodes = [node(name, labels=A100, nvidia_com__gpu="8", taints=[TAINT]) for name in ("gpu-1", "gpu-2")]
    answers = Answers(
        groups=("security.openshift.io",),
        lists={
            f"{CORE}/nodes": nodes,
            f"{CORE}/pods": [pod("gpu-2", 3)],
            f"{SPACE}/persistentvolumeclaims": [claim("runs", "Bound", "ReadWriteMany")],
        },
        hidden={f"{SPACE}/limitranges"},
        denied={("create", "pods/exec")},
        accounts={"default": {"restricted-v2", "anyuid"}},
    )
    with served(answers):
        config = kubeconfig(tmp_path, answers)
        code, out, err = call("targets", "probe", "--kubeconfig", config, "--context", "kind@Lab.1/x", "--write")
    assert (code, "ask for the missing rights: cvlaunch targets policy lab-1 --user 'ada'" in err) == (0, True), err
    assert f"added to {tmp_path}/targets.yaml\n" in err
    lines = words(out)
    assert f"cluster context kind@Lab.1/x ({answers.url}), namespace vision" in lines
    assert "distribution OpenShift" in lines
    assert "rights 1 are missing" in lines
    assert "SCCs restricted-v2, anyuid (of service account default)" in lines
    assert "hidden from you limitranges" in lines
    assert "2 2 A100 NVIDIA-A100-SXM4-80GB nvidia.com/gpu 8 13 31850m 124.0 GiB" in lines
    assert "create pods/exec cvlaunch exec, and results in a volume (pvc://)" in lines
    assert "runs Bound ReadWriteMany 10Gi fast" in lines
    target = yaml.safe_load((tmp_path / "targets.yaml").read_text())["targets"]["lab-1"]
    assert yaml.safe_load(out[out.index("# targets.yaml") :])["targets"]["lab-1"] == target
    assert target == {
        "backend": "openshift",
        "context": "kind@Lab.1/x",
        "kubeconfig": config,
        "namespace": "vision",
        "output": "pvc://runs/runs",
    }
    assert yaml.safe_load(call("targets", "show", "lab-1")[1])["backend"] == "openshift"


def test_what_the_written_target_lacks_is_told(call: Call, tmp_path: Path) -> None:
    with served(Answers()) as answers:
        code, _, err = call("targets", "probe", "lab", "--kubeconfig", kubeconfig(tmp_path, answers), "--write")
    assert (code, err.endswith("targets.yaml; it still lacks `output`, the place of the results\n")) == (0, True), err


def test_limits_that_a_run_would_be_given_are_told(call: Call, tmp_path: Path) -> None:
    given = {"type": "Container", "default": {"cpu": "500m", "memory": "512Mi"}, "max": {"nvidia.com/gpu": "1"}}
    lists = {f"{SPACE}/limitranges": [{"metadata": {"name": "usual"}, "spec": {"limits": [given]}}]}
    with served(Answers(lists=lists)) as answers:
        code, _, err = call("targets", "probe", "lab", "--kubeconfig", kubeconfig(tmp_path, answers))
    assert code == 0
    assert "LimitRange usual: runs, which have no limit of cores, get one of 500m here" in err
    assert "LimitRange usual: runs without resources.memory get a limit of 512Mi here" in err
    assert "nvidia" not in err


def write_target(folder: Path, answers: Answers, **keys: str) -> None:
    target = {"backend": "kubernetes", "kubeconfig": kubeconfig(folder, answers), **keys}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"lab": target}}))


def test_probe_of_a_target_as_json(call: Call, tmp_path: Path) -> None:
    with served(Answers(hidden={f"{CORE}/nodes"})) as answers:
        write_target(tmp_path, answers, namespace="elsewhere")
        code, out, _ = call("targets", "probe", "lab", "--json")
        assert code == 0
        said = json.loads(out)
        assert (said["cluster"]["namespace"], said["cluster"]["exists"]) == ("elsewhere", False)
        assert said["cluster"]["hidden"] == ["nodes"]
        assert said["target"] == {"lab": {"backend": "kubernetes", **said["target"]["lab"], "namespace": "elsewhere"}}
        code, out, _ = call("targets", "probe", "lab")
        assert {"namespace elsewhere (is not there)", "GPUs unknown: nodes are hidden from you"} <= set(words(out))


def test_login_and_policy(call: Call, tmp_path: Path) -> None:
    with served(Answers(denied={("create", "jobs")})) as answers:
        write_target(tmp_path, answers)
        code, _, err = call("login", "lab")
        assert (code, "you are logged in, and may not create Jobs there" in err) == (0, True)
        answers.token = "new"
        code, _, err = call("login", "lab")
        assert (code, "log in again" in err) == (4, True)
        code, out, _ = call("targets", "policy", "lab", "--group", "team")
        assert (code, out) == (0, policy("vision", Subject("Group", "team")))
        assert "REPLACE-ME" in call("targets", "policy", "lab")[1]


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "two kinds of clusters": (
        ("probe", "--ssh", "login1", "--context", "c"),
        2,
        "--ssh, --root and --run-job are for clusters of SLURM",
    ),
    "a job on a node": (("probe", "lab", "--run-job"), 2, "--ssh, --root and --run-job are for clusters of SLURM"),
    "nothing to set up": (
        ("setup", "lab"),
        2,
        "lab: there is nothing to set up on a cluster of kubernetes: jobs bring",
    ),
    "a role for a process": (("policy", "local"), 2, "local: the local backend has no cluster of Kubernetes"),
    "two subjects": (
        ("policy", "lab", "--user", "a", "--group", "b"),
        2,
        "--user, --group and --service-account: choose one",
    ),
    "no such context": (("probe", "x", "--context", "y"), 2, "context"),
}


@pytest.mark.parametrize("arguments, expected, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: int,
    message: str,
) -> None:
    write_target(tmp_path, Answers(url="http://127.0.0.1:9"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    code, out, err = call("targets", *arguments)
    assert (code, out) == (expected, ""), err
    assert re.search(re.escape(message), err), err
