"""A poll of 2,000 Jobs of Kubernetes: requests, time, CPU and memory, beside the official client's own list.

    python benchmarks/kubernetes.py [ROUNDS]

The API server is the one of the tests (tests/services/kube), in this process; each side asks it from a process of its
own. 1,900 Jobs run, 50 wait and 50 have just failed. Ours says of each run what it is doing and why (`Backend.status`);
the peer, `BatchV1Api.list_namespaced_job` of the package `kubernetes`, only reads the Jobs, as typed objects, in pages
of the same size. The two take turns; medians. Exits with 1 if a poll of ours needs more than 5 requests, or more CPU
time than the peer.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.run import render
from launcher.spec import JobSpec
from tests.services.kube import KubeCluster, kube_cluster

JOBS, WAITING, FAILED = 2000, 50, 50
MOST_REQUESTS = 5

OURS = """
from launcher.backends.base import Handle
from launcher.backends.kubernetes import KubernetesBackend
from launcher.kube.target import KubernetesTarget
backend = KubernetesBackend(KubernetesTarget(kubeconfig=sys.argv[1], namespace=sys.argv[2]), "bench")
handles = [Handle("kubernetes", "bench", f"bench-{number:04}") for number in range(int(sys.argv[3]))]
def poll():
    states = [status.state for status in backend.status(handles).values()]
    return {state: states.count(state) for state in sorted({*states})}
"""
PEER = """
from kubernetes import client, config
config.load_kube_config(sys.argv[1])
api = client.BatchV1Api()
LABEL = "app.kubernetes.io/managed-by=cvlaunch"
def poll():
    found, page = [], None
    while page is None or page.metadata._continue:
        more = {"_continue": page.metadata._continue} if page else {}
        page = api.list_namespaced_job(sys.argv[2], label_selector=LABEL, limit=500, **more)
        found += page.items
    return {"read": len(found)}
"""
MEASURED = """
import json, resource, sys, time
{setup}
poll()
begin, cpu = time.perf_counter(), time.process_time()
found = poll()
spent = {{"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{**spent, "mib": peak, "found": found}}))
"""
"""The first poll loads packages and configuration."""


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as scratch, kube_cluster(Path(scratch) / "cluster", alive=False) as cluster:
        namespace = cluster.namespace("bench")
        fill(cluster, namespace)
        results: dict[str, list[dict[str, Any]]] = {"cvlaunch": [], "kubernetes": []}
        for _ in range(rounds):
            for name, setup in (("cvlaunch", OURS), ("kubernetes", PEER)):
                results[name].append(measure(cluster, namespace, setup))
    return report(results)


def fill(cluster: KubeCluster, namespace: str) -> None:
    """As controllers and kubelets would have left them; this cluster has none."""
    job = JobSpec.model_validate(
        {"name": "bench", "image": "registry.example.com/trainer:1", "command": ["true"], "output": "s3://bucket/runs"}
    )
    text = render(job, backend="kubernetes").text
    for number in range(JOBS):
        run_id = f"bench-{number:04}"
        body = yaml.load(text.replace("render-0000000000", run_id), yaml.CSafeLoader)
        body["metadata"]["namespace"] = namespace
        cluster.put({**body, "status": status_of(number)})
        if number < WAITING + FAILED:
            cluster.put(pod_of(body, cluster.get("jobs", namespace, run_id) or {}, failed=number >= WAITING))


def status_of(number: int) -> dict[str, Any]:
    times = {"startTime": "2026-11-22T09:00:00Z"}
    if number < WAITING:
        return {**times, "active": 1, "ready": 0}
    if number < WAITING + FAILED:
        failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "no more"}
        return {**times, "failed": 1, "conditions": [{**failed, "lastTransitionTime": "2026-11-22T09:10:00Z"}]}
    return {**times, "active": 1, "ready": 1}


def pod_of(job: Mapping[str, Any], live: Mapping[str, Any], *, failed: bool) -> dict[str, Any]:
    template = copy.deepcopy(job["spec"]["template"])
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": live["metadata"]["name"], "uid": live["metadata"]["uid"]}
    metadata = {**template["metadata"], "name": f"{owner['name']}-x", "namespace": live["metadata"]["namespace"]}
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    ended = {"exitCode": 1, "reason": "Error", "message": "no", "finishedAt": "2026-11-22T09:10:00Z"}
    container = {"name": "train", "state": {"terminated": ended}}
    status = {"phase": "Failed", "containerStatuses": [container]} if failed else {"phase": "Pending"}
    status |= {} if failed else {"conditions": [unschedulable]}
    spec = {**template["spec"], **({"nodeName": "plain"} if failed else {})}
    owners = {"ownerReferences": [{**owner, "controller": True}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**metadata, **owners}, "spec": spec, "status": status}


def measure(cluster: KubeCluster, namespace: str, setup: str) -> dict[str, Any]:
    cluster.requests.clear()
    arguments = [str(cluster.kubeconfig), namespace, str(JOBS)]
    script = MEASURED.format(setup=setup)
    done = subprocess.run([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "requests": len(cluster.requests) / 2}


def report(results: Mapping[str, list[dict[str, Any]]]) -> int:
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("requests", "s", "cpu_s", "mib")}
        for name, runs in results.items()
    }
    print(f"{'':12}{'requests':>10}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}")
    for name, found in medians.items():
        print(f"{name:12}{found['requests']:10.0f}{found['s']:10.2f}{found['cpu_s']:10.2f}{found['mib']:10.0f}")
    ours, peer = medians["cvlaunch"], medians["kubernetes"]
    print(f"{'ratio':12}" + "".join(f"{ours[key] / peer[key]:10.2f}" for key in ("requests", "s", "cpu_s", "mib")))
    print("found:", results["cvlaunch"][-1]["found"], results["kubernetes"][-1]["found"])
    return int(ours["requests"] > MOST_REQUESTS or ours["cpu_s"] > peer["cpu_s"])


if __name__ == "__main__":
    sys.exit(main())
