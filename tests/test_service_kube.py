"""The cluster of the tests does what a real one does, where our own tests count on it: asked by the official client."""

from __future__ import annotations

import base64
import json
import stat
import struct
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
import websocket
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.services.kube import KubeCluster

Json = dict[str, Any]
JobMaker = Callable[..., Json]

IGNORE_DISRUPTION = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
FAIL_ON_64 = {
    "action": "FailJob",
    "onExitCodes": {"containerName": "train", "operator": "In", "values": [64]},
}
RESTRICTED = {
    "securityContext": {"runAsNonRoot": True, "runAsUser": 1234, "seccompProfile": {"type": "RuntimeDefault"}},
}
RESTRICTED_CONTAINER = {
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}


def job(name: str, script: str, *, pod: Json | None = None, container: Json | None = None, **spec: Any) -> Json:
    """With an image that nobody has; `runnable` gives it one."""
    train = {"name": "train", "image": "nobody/has:it", "command": ["bash", "-c", script], **(container or {})}
    template = {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [train],
            **(pod or {}),
        }
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template, **spec},
    }


@pytest.fixture
def api(kube: KubeCluster) -> client.ApiClient:
    configuration = client.Configuration()
    config.load_kube_config(str(kube.kubeconfig), client_configuration=configuration)
    with client.ApiClient(configuration) as made:
        yield made
        made.rest_client.pool_manager.clear()


@pytest.fixture
def batch(api: client.ApiClient) -> client.BatchV1Api:
    return client.BatchV1Api(api)


@pytest.fixture
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture
def namespace(kube: KubeCluster) -> str:
    return kube.namespace()


@pytest.fixture
def runnable(kube: KubeCluster, base_image: str) -> None:
    kube.serve_image("nobody/has:it", image=base_image)


def refused(call: Callable[[], object]) -> tuple[int, Json]:
    with pytest.raises(ApiException) as caught:
        call()
    return caught.value.status, json.loads(caught.value.body)


def condition(obj: Json, kind: str) -> Json:
    found = [c for c in obj.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else {}


def ended(obj: Json) -> bool:
    return any(condition(obj, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def end_of(kube: KubeCluster, namespace: str, name: str) -> Json:
    return kube.wait_for("job", namespace, name, ended)


def exit_of(kube: KubeCluster, namespace: str, name: str) -> tuple[int, str]:
    """(code, reason) of the container of the job's first pod"""
    terminated = kube.pods(namespace, name)[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    return terminated["exitCode"], terminated["reason"]


def running(kube: KubeCluster, namespace: str, name: str, *, count: int = 1) -> list[str]:
    """Names of the job's pods, once so many of them run."""

    def found() -> list[str]:
        pods = [p for p in kube.pods(namespace, name) if p["status"].get("phase") == "Running"]
        return [p["metadata"]["name"] for p in pods if "deletionTimestamp" not in p["metadata"]]

    return kube.wait(lambda: found() if len(found()) >= count else None)


# -- the API ----------------------------------------------------------------------------------------------------------


def test_what_is_created_comes_back_with_defaults(
    kube: KubeCluster, batch: client.BatchV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    body = job("one", "true", container={"resources": {"limits": {"memory": "1024Mi", "cpu": "1.5"}}})
    made = batch.create_namespaced_job(namespace, body)
    assert (made.spec.parallelism, made.spec.completions, made.spec.suspend) == (1, 1, False)
    limits = made.spec.template.spec.containers[0].resources.limits
    assert (limits["memory"], limits["cpu"]) == ("1Gi", "1500m")
    assert made.spec.template.metadata.labels["batch.kubernetes.io/job-name"] == "one"
    assert kube.posted("job", namespace, "one") == body
    code, answer = refused(lambda: batch.create_namespaced_job(namespace, body))
    assert (code, answer["reason"]) == (409, "AlreadyExists")
    assert answer["message"] == 'jobs.batch "one" already exists'
    assert answer["details"] == {"name": "one", "group": "batch", "kind": "jobs"}
    code, answer = refused(lambda: batch.create_namespaced_job("nowhere", body))
    assert (code, answer["message"]) == (404, 'namespaces "nowhere" not found')
    code, answer = refused(lambda: batch.read_namespaced_job("two", namespace))
    assert (code, answer["message"]) == (404, 'jobs.batch "two" not found')


def spoiled(path: str, value: Any, **spec: Any) -> Json:
    body: Any = job("bad", "true", **spec)
    *parents, last = path.split(".")
    at = body
    for key in parents:
        at = at[int(key)] if key.isdigit() else at.setdefault(key, {})
    at[last] = value
    return body


TRAIN = "spec.template.spec.containers.0"
BAD = [
    (spoiled("metadata.name", "Big_Name"), 422, "metadata.name", "lowercase RFC 1123 subdomain"),
    (spoiled("metadata.name", "x" * 64), 422, "spec.template.labels", "no more than 63 bytes"),
    (spoiled("metadata.labels", {"a": "x" * 64}), 422, "metadata.labels", "no more than 63 bytes"),
    (spoiled("spec.template.spec.restartPolicy", "Always"), 422, "spec.template.spec.restartPolicy", "valid values"),
    (spoiled("spec.completionMode", "Indexed", parallelism=2), 422, "spec.completions", "when completion mode"),
    (spoiled(f"{TRAIN}.image", ""), 422, "spec.template.spec.containers[0].image", "Required value"),
    (
        spoiled(f"{TRAIN}.volumeMounts", [{"name": "no", "mountPath": "/x"}]),
        422, "spec.template.spec.containers[0].volumeMounts[0].name", 'Not found: "no"',
    ),
    (
        spoiled(f"{TRAIN}.env", [{"name": "1st", "value": ""}]),
        422, "spec.template.spec.containers[0].env[0].name", "a valid environment variable name",
    ),
    (
        spoiled(f"{TRAIN}.resources", {"requests": {"nvidia.com/gpu": 1}}),
        422, "spec.template.spec.containers[0].resources.limits", "Limit must be set for non overcommitable resources",
    ),
    (
        spoiled(f"{TRAIN}.resources", {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}),
        422, "spec.template.spec.containers[0].resources.requests", "must be less than or equal to memory limit of 1Gi",
    ),
    (
        spoiled("spec.podFailurePolicy", {"rules": [FAIL_ON_64]}, podReplacementPolicy="TerminatingOrFailed"),
        422, "spec.podReplacementPolicy", 'Unsupported value: "TerminatingOrFailed": supported values: "Failed"',
    ),
    (
        spoiled("spec.podFailurePolicy", {"rules": [FAIL_ON_64]}, pod={"restartPolicy": "OnFailure"}),
        422, "spec.template.spec.restartPolicy", 'only "Never" is supported when podFailurePolicy is specified',
    ),
    (spoiled(f"{TRAIN}.colour", "blue"), 400, "", 'unknown field "spec.template.spec.containers[0].colour"'),
    (spoiled("spec.parallelism", "2"), 400, "", "unmarshal string into Go struct field JobSpec.spec.parallelism"),
    (spoiled(f"{TRAIN}.resources", {"limits": {"memory": "2GiB"}}), 400, "", "quantities must match"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "field", "words"), BAD, ids=[f"{case[2]}-{case[3][:20]}" for case in BAD])
def test_a_bad_job_is_refused_by_field(
    api: client.ApiClient, namespace: str, body: Json, code: int, field: str, words: str
) -> None:
    got, answer = raw(api, "POST", f"/apis/batch/v1/namespaces/{namespace}/jobs?fieldValidation=Strict", body)
    assert (got, answer["status"]) == (code, "Failure")
    if field:
        causes = {cause["field"]: cause["message"] for cause in answer["details"]["causes"]}
        assert words in causes[field]
    assert words in answer["message"]


def bearer(api: client.ApiClient) -> str:
    """Its key was called `authorization` before version 36."""
    keys: dict[str, str] = api.configuration.api_key
    token = keys.get("BearerToken") or keys["authorization"]
    return token if token.startswith("Bearer ") else f"Bearer {token}"


def raw(
    api: client.ApiClient, method: str, path: str, body: Any = None, form: str = "application/json"
) -> tuple[int, Any]:
    """Past the client's own models, which refuse much of what the server is asked here."""
    import urllib3

    token = bearer(api)
    with urllib3.PoolManager() as pool:
        response = pool.request(
            method, api.configuration.host + path, body=None if body is None else json.dumps(body),
            headers={"Authorization": token, "Content-Type": form}, retries=False,
        )  # fmt: skip
        return response.status, json.loads(response.data)


def test_patches_test_versions_and_immutable_fields(kube: KubeCluster, api: client.ApiClient, namespace: str) -> None:
    made = kube.create("job", namespace, job("one", "true", suspend=True))
    place = f"/apis/batch/v1/namespaces/{namespace}/jobs/one"
    test = [{"op": "test", "path": "/metadata/resourceVersion", "value": "1"}, {"op": "remove", "path": "/spec"}]
    code, answer = raw(api, "PATCH", place, test, "application/json-patch+json")
    assert (code, answer["reason"]) == (422, "Invalid")
    old = {"metadata": {"resourceVersion": "1", "labels": {"a": "b"}}}
    code, answer = raw(api, "PATCH", place, old, "application/merge-patch+json")
    assert (code, answer["reason"]) == (409, "Conflict")
    code, answer = raw(api, "PATCH", place, {"metadata": {"labels": {"a": "b"}}}, "application/merge-patch+json")
    assert (code, answer["metadata"]["labels"]) == (200, {"a": "b"})
    kube.put({**made, "status": {"startTime": "2026-11-22T00:00:00Z"}})
    image = {"spec": {"template": {"spec": {"containers": []}}}}
    code, answer = raw(api, "PATCH", place, image, "application/merge-patch+json")
    assert (code, "field is immutable" in answer["message"]) == (422, True)
    notebook = f"/apis/kubeflow.org/v1/namespaces/{namespace}/notebooks/n"
    spec = {"template": {"spec": {"containers": [{"name": "n", "image": "x"}]}}}
    kube.create("notebook", namespace, {"metadata": {"name": "n"}, "spec": spec})
    code, answer = raw(api, "PATCH", notebook, {}, "application/strategic-merge-patch+json")
    assert (code, answer["reason"]) == (415, "UnsupportedMediaType")


def test_lists_come_in_pages_that_may_expire(kube: KubeCluster, core: client.CoreV1Api, namespace: str) -> None:
    for number in range(5):
        labels = {"kind": "even" if number % 2 == 0 else "odd", **({"first": ""} if number == 0 else {})}
        kube.create("configmap", namespace, {"metadata": {"name": f"c{number}", "labels": labels}})

    def names(**query: Any) -> list[str]:
        return [item.metadata.name for item in core.list_namespaced_config_map(namespace, **query).items]

    assert names(label_selector="kind=even") == ["c0", "c2", "c4"]
    assert names(label_selector="kind in (even, odd),!first") == ["c1", "c2", "c3", "c4"]
    assert names(label_selector="kind notin (even),kind") == ["c1", "c3"]
    assert names(field_selector="metadata.name=c3") == ["c3"]
    first = core.list_namespaced_config_map(namespace, limit=2)
    assert first.metadata.remaining_item_count == 4
    token = first.metadata._continue if hasattr(first.metadata, "_continue") else first.metadata.var_continue
    assert names(limit=2, _continue=token) == ["c2", "c3"]
    kube.expire_continue()
    code, answer = refused(lambda: names(limit=2, _continue=token))
    assert (code, answer["reason"]) == (410, "Expired")


def test_rights_and_reviews_agree(
    kube: KubeCluster, api: client.ApiClient, core: client.CoreV1Api, namespace: str
) -> None:
    kube.forbid("list", "pods")
    code, answer = refused(lambda: core.list_namespaced_pod(namespace))
    assert code == 403
    assert answer["message"] == (
        f'pods is forbidden: User "dev" cannot list resource "pods" in API group "" in the namespace "{namespace}"'
    )
    for verb, allowed in (("list", False), ("get", True)):
        review = {"spec": {"resourceAttributes": {"verb": verb, "resource": "pods", "namespace": namespace}}}
        _, answer = raw(api, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        assert answer["status"]["allowed"] is allowed


def test_tokens_expire_and_the_plugin_has_the_new_one(kube: KubeCluster, namespace: str) -> None:
    configuration = client.Configuration()
    config.load_kube_config(str(kube.kubeconfig), context="exec", client_configuration=configuration)
    with client.ApiClient(configuration) as old:
        client.CoreV1Api(old).list_namespaced_pod(namespace)
        kube.expire_tokens()
        code, answer = refused(lambda: client.CoreV1Api(old).list_namespaced_pod(namespace))
        assert (code, answer["reason"]) == (401, "Unauthorized")
    config.load_kube_config(str(kube.kubeconfig), context="exec", client_configuration=configuration)
    with client.ApiClient(configuration) as new:
        client.CoreV1Api(new).list_namespaced_pod(namespace)
    assert stat.S_IMODE(kube.kubeconfig.stat().st_mode) == 0o600


def test_faults_happen_as_often_as_asked(kube: KubeCluster, api: client.ApiClient, namespace: str) -> None:
    import urllib3

    path = f"/api/v1/namespaces/{namespace}/configmaps"
    kube.throttle(path="configmaps", retry_after=3)
    token = bearer(api)
    with urllib3.PoolManager(headers={"Authorization": token}, retries=False) as pool:
        first = pool.request("GET", kube.url + path)
        assert (first.status, first.headers["Retry-After"]) == (429, "3")
        assert pool.request("GET", kube.url + path).status == 200
        kube.drop(path="configmaps", method="POST")
        body = json.dumps({"metadata": {"name": "kept"}})
        with pytest.raises(urllib3.exceptions.ProtocolError):
            pool.request("POST", kube.url + path, body=body)
    assert kube.get("configmap", namespace, "kept")
    assert [r.method for r in kube.requests if r.path == path] == ["GET", "GET", "POST"]


def test_the_children_go_with_their_owner(kube: KubeCluster, batch: client.BatchV1Api, namespace: str) -> None:
    owner = kube.create("job", namespace, job("one", "true", suspend=True))
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": "one", "uid": owner["metadata"]["uid"]}
    secret = {"metadata": {"name": "s", "ownerReferences": [reference]}, "stringData": {"A": "1"}}
    kube.create("secret", namespace, secret)
    batch.delete_namespaced_job("one", namespace, propagation_policy="Background")
    kube.wait(lambda: not kube.get("secret", namespace, "s"))
    late = kube.create("secret", namespace, secret)
    kube.wait(lambda: not kube.get("secret", namespace, late["metadata"]["name"]))


# -- controllers without pods that run --------------------------------------------------------------------------------


def test_no_node_has_it(kube: KubeCluster, namespace: str) -> None:
    limits = {"limits": {"nvidia.com/gpu": "3"}}
    kube.create("job", namespace, job("big", "true", container={"resources": limits}))
    found = kube.wait(lambda: [p for p in kube.pods(namespace, "big") if condition(p, "PodScheduled")])
    scheduled = condition(found[0], "PodScheduled")
    assert (scheduled["status"], scheduled["reason"]) == ("False", "Unschedulable")
    assert scheduled["message"].startswith("0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3")
    kube.add_node("huge", {}, {"nvidia.com/gpu": "8"})
    kube.wait(lambda: kube.pods(namespace, "big")[0]["spec"].get("nodeName") == "huge")


def test_an_unbound_claim_holds_the_pod_back(kube: KubeCluster, namespace: str) -> None:
    claim = {
        "metadata": {"name": "c"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "missing",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    kube.create("pvc", namespace, claim)
    pod = {"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "c"}}]}
    kube.create("job", namespace, job("one", "true", pod=pod))
    found = kube.wait(lambda: [p for p in kube.pods(namespace, "one") if condition(p, "PodScheduled")])
    assert "pod has unbound immediate PersistentVolumeClaims" in condition(found[0], "PodScheduled")["message"]
    assert ("ProvisioningFailed", 'storageclass.storage.k8s.io "missing" not found') in kube.events(namespace, "c")


REFUSALS = [
    ({"quota": {"requests.nvidia.com/gpu": "0"}}, "exceeded quota: quota, requested: requests.nvidia.com/gpu=1"),
    ({"pod_security": "restricted"}, 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'),
    ({"openshift": True}, "unable to validate against any security context constraint"),
    ({}, 'admission webhook "policy.example.com" denied the request: no latest'),
]


@pytest.mark.parametrize(("settings", "words"), REFUSALS, ids=["quota", "pod-security", "scc", "webhook"])
def test_refused_pods_show_as_events_of_the_job(kube: KubeCluster, settings: Json, words: str) -> None:
    namespace = kube.namespace(**settings)
    if not settings:
        kube.deny("no latest")
    container = {"resources": {"limits": {"nvidia.com/gpu": "1"}}, "securityContext": {"runAsUser": 1000}}
    kube.create("job", namespace, job("one", "true", container=container))
    kube.wait(lambda: any(r == "FailedCreate" and words in m for r, m in kube.events(namespace, "one")))
    assert not kube.pods(namespace)


def test_a_queue_holds_the_job_until_it_is_admitted(kube: KubeCluster, namespace: str) -> None:
    body = job("one", "true")
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    kube.put({"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "spec": {"clusterQueue": "q"},
              "metadata": {"name": "team", "namespace": namespace}})  # fmt: skip
    assert kube.create("job", namespace, body)["spec"]["suspend"] is True
    kube.wait_for("job", namespace, "one", lambda found: condition(found, "Suspended").get("status") == "True")
    kube.wait(lambda: kube.objects("workload", namespace))
    assert condition(kube.objects("workload", namespace)[0], "QuotaReserved")["reason"] == "Pending"
    kube.admit(namespace, "one")
    kube.wait(lambda: kube.pods(namespace, "one"))
    kube.preempt_workload(namespace, "one")
    kube.wait(lambda: not kube.pods(namespace, "one"))
    found = kube.get("job", namespace, "one") or {}
    assert (condition(found, "Suspended")["status"], found["status"].get("failed", 0)) == ("True", 0)


# -- pods that run ----------------------------------------------------------------------------------------------------

needs_podman = pytest.mark.needs("podman", "debootstrap")


@needs_podman
def test_logs_have_stamps_and_can_be_followed(
    kube: KubeCluster, api: client.ApiClient, core: client.CoreV1Api, namespace: str, runnable: None
) -> None:
    kube.create(
        "job",
        namespace,
        job("one", "echo first; echo second >&2; until [ -e /go ]; do sleep 0.02; done; echo third; exit 3"),
    )
    pod = running(kube, namespace, "one")[0]
    kube.wait(lambda: "second" in core.read_namespaced_pod_log(pod, namespace))
    following = core.read_namespaced_pod_log(pod, namespace, follow=True, timestamps=True, _preload_content=False)
    assert commanded(api, namespace, pod, "touch", "/go") == ("", "", 0)
    lines = following.data.decode().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["first", "second", "third"]
    moments = [line.split(" ", 1)[0] for line in lines]
    assert moments == sorted(moments)
    assert moments[2].endswith("Z")
    end = end_of(kube, namespace, "one")
    assert condition(end, "Failed")["reason"] == "BackoffLimitExceeded"
    assert core.read_namespaced_pod_log(pod, namespace, tail_lines=1) == "third\n"
    code, answer = refused(lambda: core.read_namespaced_pod_log(pod, namespace, previous=True))
    assert (code, "previous terminated container" in answer["message"]) == (400, True)


@needs_podman
def test_the_pod_is_as_it_was_described(kube: KubeCluster, core: client.CoreV1Api, runnable: None) -> None:
    namespace = kube.namespace(pod_security="restricted")
    kube.create("secret", namespace, {"metadata": {"name": "s"}, "stringData": {"TOKEN": "canary-kube-4711"}})
    kube.create("pvc", namespace, {"metadata": {"name": "c"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}})  # fmt: skip
    script = """
        df --output=size -k /dev/shm | tail -1; id -u; id -G; cat /etc/s/TOKEN; echo " $TOKEN"; cat /etc/info/job
        echo; touch /x; touch /dev/shm/y && ulimit -c; echo kept > /data/file
        grep -E 'NoNewPrivs|CapEff' /proc/self/status
        echo "$WORDS" "$1"; echo '{"state": "done"}' > /dev/termination-log
    """
    mounts = {"/dev/shm": "shm", "/etc/s": "s", "/etc/info": "info", "/data": "data"}
    container = {
        **RESTRICTED_CONTAINER,
        "securityContext": {**RESTRICTED_CONTAINER["securityContext"], "readOnlyRootFilesystem": True},
        "args": ["me", "$(NODE) $(touch /x)"],
        "env": [
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "TOKEN"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "WORDS", "value": "$$(NODE) $(NODE)"},
        ],
        "volumeMounts": [
            {"name": name, "mountPath": path, **({"subPath": "a/b"} if name == "data" else {})}
            for path, name in mounts.items()
        ],
    }
    field = {"fieldPath": "metadata.annotations['cvlaunch/job.json']"}
    pod = {
        "securityContext": {**RESTRICTED["securityContext"], "fsGroup": 4321},
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "3Mi"}},
            {"name": "s", "secret": {"secretName": "s", "defaultMode": 0o400}},
            {"name": "info", "downwardAPI": {"items": [{"path": "job", "fieldRef": field}]}},
            {"name": "data", "persistentVolumeClaim": {"claimName": "c"}},
        ],
    }
    body = job("one", script, pod=pod, container=container)
    body["spec"]["template"]["metadata"] = {"annotations": {"cvlaunch/job.json": '{"a": 1}'}}
    kube.create("job", namespace, body)
    end = end_of(kube, namespace, "one")
    found = kube.pods(namespace, "one")[0]
    lines = core.read_namespaced_pod_log(found["metadata"]["name"], namespace).splitlines()
    assert condition(end, "Complete").get("status") == "True", lines
    node = found["spec"]["nodeName"]
    assert [line.strip() for line in lines if "touch: cannot" not in line] == [
        "3072", "1234", "0 4321", "canary-kube-4711 canary-kube-4711", '{"a": 1}', "0",
        "CapEff:\t0000000000000000", "NoNewPrivs:\t1", f"$(NODE) {node} {node} $(touch /x)",
    ]  # fmt: skip
    assert "touch: cannot touch '/x': Read-only file system" in lines
    terminated = found["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["reason"], terminated["message"]) == ("Completed", '{"state": "done"}\n')
    file = kube.volume_folder(namespace, "c") / "a/b/file"
    assert (file.read_text(), file.stat().st_uid, file.stat().st_gid) == ("kept\n", 1234, 4321)


@needs_podman
def test_an_evicted_pod_is_replaced_and_not_counted(kube: KubeCluster, namespace: str, runnable: None) -> None:
    script = "trap 'echo stopping; exit 75' TERM; while :; do sleep 0.02; done"
    policy = {"rules": [IGNORE_DISRUPTION, FAIL_ON_64]}
    short = {"terminationGracePeriodSeconds": 1}  # the first TERM may come before the trap is set
    kube.create("job", namespace, job("one", script, pod=short, podFailurePolicy=policy))
    first = running(kube, namespace, "one")[0]
    kube.evict(namespace, first)
    second = kube.wait(lambda: [name for name in running(kube, namespace, "one") if name != first])[0]
    kube.wait(lambda: kube.get("pod", namespace, first) is None)
    status = (kube.get("job", namespace, "one") or {})["status"]
    assert (status.get("failed", 0), status["active"]) == (0, 1)
    kube.kill_container(namespace, second)
    end = end_of(kube, namespace, "one")
    assert end["status"]["failed"] == 1
    assert exit_of(kube, namespace, "one") == (137, "OOMKilled")


@pytest.mark.parametrize("first", ["train", "init"])
def test_a_pod_that_is_deleted_before_it_starts(kube: KubeCluster, namespace: str, first: str) -> None:
    """A node can say no more than that it has not found the first container: it counts as one that was killed."""
    pod = {"initContainers": [{"name": first, "image": "nobody/has:it"}]} if first == "init" else {}
    policy = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [137]}}]}
    kube.create("job", namespace, job("one", "true", pod=pod, podFailurePolicy=policy))
    kube.delete_pod(namespace, kube.wait(lambda: [p for p in kube.pods(namespace) if waits(p)])[0]["metadata"]["name"])
    message = condition(end_of(kube, namespace, "one"), "Failed")["message"]
    assert message.startswith(f"Container {first} for pod ") and "failed with exit code 137 matching" in message


def waits(pod: Json) -> bool:
    """For an image that nobody has."""
    found = [*pod["status"].get("initContainerStatuses", ()), *pod["status"].get("containerStatuses", ())]
    return any(container["state"].get("waiting", {}).get("reason") == "ErrImagePull" for container in found)


GREEDY = "x=$(head -c 100000000 /dev/zero | tr '\\0' a)"


@needs_podman
@pytest.mark.parametrize(("script", "reason"), [(GREEDY, "OOMKilled"), ("kill -9 $$ & exit 137", "Error")])
def test_memory_has_a_limit(kube: KubeCluster, namespace: str, runnable: None, script: str, reason: str) -> None:
    container = {"resources": {"limits": {"memory": "30Mi"}}}
    kube.create("job", namespace, job("one", script, container=container))
    end_of(kube, namespace, "one")
    assert exit_of(kube, namespace, "one") == (137, reason)


@needs_podman
def test_a_rule_fails_the_job_at_once(kube: KubeCluster, namespace: str, runnable: None) -> None:
    policy = {"rules": [IGNORE_DISRUPTION, FAIL_ON_64]}
    kube.create("job", namespace, job("one", "exit 64", podFailurePolicy=policy, backoffLimit=5))
    failed = condition(end_of(kube, namespace, "one"), "Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert failed["message"].endswith("failed with exit code 64 matching FailJob rule at index 1")
    assert len(kube.pods(namespace, "one")) == 1


@needs_podman
def test_indexed_pods_find_each_other(
    kube: KubeCluster, core: client.CoreV1Api, namespace: str, runnable: None
) -> None:
    script = "until getent hosts one-1.net one-0.net; do sleep 0.02; done; hostname; echo index $JOB_COMPLETION_INDEX"
    indexed = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    kube.create("job", namespace, job("one", script, pod={"subdomain": "net"}, **indexed))
    running(kube, namespace, "one", count=2)
    selector = {"batch.kubernetes.io/job-name": "one"}
    kube.create("service", namespace, {"metadata": {"name": "net"}, "spec": {
        "clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}})  # fmt: skip
    end = end_of(kube, namespace, "one")
    assert end["status"]["completedIndexes"] == "0,1"
    logs = {
        pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: core.read_namespaced_pod_log(
            pod["metadata"]["name"], namespace
        ).splitlines()[-2:]
        for pod in kube.pods(namespace, "one")
    }
    assert logs == {"0": ["one-0", "index 0"], "1": ["one-1", "index 1"]}


@needs_podman
def test_deadlines_give_their_grace(kube: KubeCluster, namespace: str, runnable: None) -> None:
    """The pod's own clock; TERM is deaf, so KILL comes after the grace."""
    pod = {"activeDeadlineSeconds": 3, "terminationGracePeriodSeconds": 1}
    start = time.monotonic()
    kube.create("job", namespace, job("one", "trap '' TERM; while :; do sleep 0.02; done", pod=pod))
    end_of(kube, namespace, "one")
    assert 3.8 < time.monotonic() - start < 28  # by default the grace would be 30 s
    status = kube.pods(namespace, "one")[0]["status"]
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137


@needs_podman
def test_restarts_keep_the_log_before(
    kube: KubeCluster, core: client.CoreV1Api, namespace: str, runnable: None
) -> None:
    """As does what an emptyDir holds."""
    script = "if [ -e /keep/mark ]; then echo second; else echo first; touch /keep/mark; exit 9; fi"
    pod = {"restartPolicy": "OnFailure", "volumes": [{"name": "keep", "emptyDir": {}}]}
    container = {"volumeMounts": [{"name": "keep", "mountPath": "/keep"}]}
    kube.create("job", namespace, job("one", script, pod=pod, container=container, backoffLimit=3))
    end_of(kube, namespace, "one")
    found = kube.pods(namespace, "one")[0]
    state = found["status"]["containerStatuses"][0]
    assert (state["restartCount"], state["lastState"]["terminated"]["exitCode"]) == (1, 9)
    name = found["metadata"]["name"]
    assert core.read_namespaced_pod_log(name, namespace) == "second\n"
    assert core.read_namespaced_pod_log(name, namespace, previous=True) == "first\n"


@needs_podman
def test_waiting_containers_say_why(kube: KubeCluster, core: client.CoreV1Api, namespace: str, base_image: str) -> None:
    container = {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "late", "key": "A"}}}]}
    kube.create("job", namespace, job("one", "echo $A", container=container))

    def reason() -> str:
        states = [p["status"].get("containerStatuses") for p in kube.pods(namespace, "one")]
        return states[0][0]["state"].get("waiting", {}).get("reason", "") if states and states[0] else ""

    kube.wait(lambda: reason() == "ImagePullBackOff")
    pod = kube.pods(namespace, "one")[0]["metadata"]["name"]
    code, answer = refused(lambda: core.read_namespaced_pod_log(pod, namespace))
    assert (code, answer["message"]) == (
        400, f'container "train" in pod "{pod}" is waiting to start: trying and failing to pull image',
    )  # fmt: skip
    kube.serve_image("nobody/has:it", image=base_image)
    kube.wait(lambda: reason() == "CreateContainerConfigError")
    kube.create("secret", namespace, {"metadata": {"name": "late"}, "data": {"A": base64.b64encode(b"came").decode()}})
    end_of(kube, namespace, "one")
    assert core.read_namespaced_pod_log(pod, namespace) == "came\n"


@needs_podman
def test_exec_and_portforward(kube: KubeCluster, api: client.ApiClient, namespace: str, runnable: None) -> None:
    kube.create("job", namespace, job("one", "while :; do sleep 0.02; done"))
    pod = running(kube, namespace, "one")[0]
    assert commanded(api, namespace, pod, "bash", "-c", "echo out; echo err >&2; exit 5") == ("out\n", "err\n", 5)
    port = kube.server.port
    forwarded = socket_to(
        api, f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward?ports={port}", "v4.channel.k8s.io"
    )
    assert {forwarded.recv(), forwarded.recv()} == {bytes([c]) + struct.pack("<H", port) for c in (0, 1)}
    forwarded.send_binary(b"\0GET /healthz HTTP/1.0\r\n\r\n")
    answer = b""
    while chunk := forwarded.recv():
        answer += chunk[1:]
    forwarded.shutdown()
    assert answer.startswith(b"HTTP/1.0 200 OK")
    cat = socket_to(
        api, f"/api/v1/namespaces/{namespace}/pods/{pod}/exec?command=cat&stdin=true&stdout=true", "v5.channel.k8s.io"
    )
    assert cat.recv() == b"\1"
    cat.send_binary(b"\0through")
    assert cat.recv() == b"\1through"
    cat.send_binary(b"\xff\0")
    assert json.loads(cat.recv()[1:]) == {"metadata": {}, "status": "Success"}
    cat.shutdown()


def commanded(api: client.ApiClient, namespace: str, pod: str, *command: str) -> tuple[str, str, int]:
    """(what it wrote, its errors, its exit code). Not by the official client's `stream`, which leaves sockets open."""
    query = urlencode([*(("command", word) for word in command), ("stdout", "true"), ("stderr", "true")])
    socket = socket_to(api, f"/api/v1/namespaces/{namespace}/pods/{pod}/exec?{query}", "v4.channel.k8s.io")
    channels = {1: b"", 2: b"", 3: b""}
    while frame := socket.recv():
        channels[frame[0]] += frame[1:]
    socket.shutdown()
    ended = json.loads(channels[3])
    code = int(ended["details"]["causes"][0]["message"]) if ended["status"] == "Failure" else 0
    return channels[1].decode(), channels[2].decode(), code


def socket_to(api: client.ApiClient, path: str, protocol: str) -> websocket.WebSocket:
    url = api.configuration.host.replace("http", "ws", 1) + path
    token = bearer(api)
    return websocket.create_connection(url, header={"Authorization": token}, subprotocols=[protocol], timeout=60)


@needs_podman
def test_a_lost_node_takes_its_pods_with_it(kube: KubeCluster, namespace: str, runnable: None) -> None:
    policy = {"rules": [IGNORE_DISRUPTION]}
    kube.create("job", namespace, job("one", "while :; do sleep 0.02; done", podFailurePolicy=policy))
    first = running(kube, namespace, "one")[0]
    kube.lose_node((kube.get("pod", namespace, first) or {})["spec"]["nodeName"])
    kube.wait(lambda: [name for name in running(kube, namespace, "one") if name != first])
    assert (kube.get("job", namespace, "one") or {})["status"].get("failed", 0) == 0
