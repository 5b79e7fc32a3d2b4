"""Real trainings in pods: one node with its data in S3, on a claim, evicted in mid-epoch, two nodes; what is trained is
what is trained at home."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, render, submit
from launcher.ledger import Ledger
from launcher.targets import load_targets
from launcher.testing.conformance import text_of
from tests.trainings import (
    at_home,
    digits,
    in_training,
    rank_0_port,
    resumed_in_the_middle,
    series,
    tagged,
    train,
    write_target,
)
from tests.worlds.kubernetes import KubernetesWorld, kubernetes_world
from tests.worlds.real_cluster import REAL, RealWorld

__all__ = ["at_home", "digits", "rank_0_port"]

pytestmark = pytest.mark.needs(*(("podman", "debootstrap") if REAL is None else ()))

LONGER = {"train.batch": "2", "train.image_size": "64"}
"""Epochs of several seconds, so that an eviction comes in the middle of one."""

REGISTRY = "registry.example.com/cvlaunch/kubernetes"


@pytest.fixture(
    scope="session", params=["kubernetes"] if REAL is None else ["that is real"]
)  # an image is built before a test has a home of its own
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], KubernetesWorld]:
    """Results and data in S3 on a plain cluster, on a claim on OpenShift. rclone is quick with many small files."""
    if request.param == "that is real" and REAL is not None:
        return functools.partial(RealWorld, cluster=REAL)
    return kubernetes_world(request, request.param, server="rclone_s3")


@pytest.fixture
def world(
    make_world: Callable[[Path], KubernetesWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> KubernetesWorld:
    made = make_world(tmp_path / "world")
    for name, value in {**made.environment, "CVLAUNCH_ENGINE": "podman"}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def pinned(trainer_image: str, world: KubernetesWorld) -> Iterator[str]:
    with tagged(trainer_image, REGISTRY) as reference:
        world.cluster.serve_image(reference, image=trainer_image)
        yield reference


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def test_a_training_is_the_one_at_home_and_the_container_backend_s(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run], pinned: str
) -> None:
    run = train(digits, world.target, ledger, settings=[f"image={pinned}"])
    assert run.wait(timeout=900).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home().metrics())
    there = render(digits / "tiny.yaml", backend="container", settings=[f"image={pinned}"])
    assert run.record.plan["job_digest"] == there.job_digest != at_home().record.plan["job_digest"]
    assert run.record.plan["unpinned"] == []


@pytest.mark.parametrize("make_world", ["kubernetes", "openshift"] if REAL is None else ["that is real"], indirect=True)
def test_an_evicted_training_ends_with_the_same_numbers(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger, LONGER, settings=world.settings)
    in_training(run)
    assert run.handle is not None
    world.preempt(run.handle)
    status = run.wait(timeout=900)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    assert resumed_in_the_middle(run), text_of(run)
    assert series(run.metrics()) == series(at_home(**LONGER).metrics())
    assert run.record.plan["job_digest"] == at_home(**LONGER).record.plan["job_digest"], "its image is not pinned"


@pytest.mark.usefixtures("rank_0_port")
def test_two_nodes_train_as_two_processes_at_home(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger, {"resources.nodes": "2"}, settings=world.settings)
    assert run.wait(timeout=900).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home(**{"resources.processes": "2"}).metrics())
    assert {line.node for line in run.logs()} == {0, 1}
    assert run.store().head("nodes/1/output/metrics.jsonl") is None, "one node writes them"


@pytest.mark.parametrize("make_world", ["openshift"] if REAL is None else ["that is real"], indirect=True)
def test_somebody_looked_before_the_pod_began(world: KubernetesWorld, ledger: Ledger, tmp_path: Path) -> None:
    """The run's folder is on the claim already, made by the pod that serves it."""
    run_id = f"looked-{secrets.token_hex(4)}"
    data = {"near": f"{world.target['output']}/_data/near"}
    write_target(tmp_path, world.target)
    selected = load_targets(tmp_path).select(target="there")
    selected.store(data["near"]).write("x", b"data")
    selected.store(f"{world.target['output']}/{run_id}").write("control/watch", b"0")
    command = [world.python(), "-c", "import os; print(os.listdir(os.environ['CVLAUNCH_DATA_NEAR']))"]
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"name": "looked", "command": command, "data": data}))
    run = submit(job, target="there", settings=world.settings, run_id=run_id, ledger=ledger)
    assert run.wait(timeout=world.patience).state is State.SUCCEEDED, text_of(run)
