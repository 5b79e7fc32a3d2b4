"""Real trainings in pods: one node with its data in S3, on a claim, evicted in mid-epoch, two nodes; what is trained is
what is trained at home."""

from __future__ import annotations

import functools
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Metrics, Run, State, manifest, render, submit
from launcher.ledger import Ledger
from launcher.stores import open_store
from launcher.submission import push_channels
from launcher.targets import load_targets
from launcher.testing.conformance import text_of
from tests.services.podman import locked, podman
from tests.worlds.kubernetes import KubernetesWorld, kubernetes_world
from tests.worlds.real_cluster import REAL, RealWorld

pytestmark = pytest.mark.needs(*(("podman", "debootstrap") if REAL is None else ()))

DIGITS = Path(__file__).parents[1] / "examples/digits"
LONGER = {"train.batch": "2", "train.image_size": "64"}
"""Epochs of several seconds, so that an eviction comes in the middle of one."""

REGISTRY = "registry.example.com/cvlaunch/kubernetes"

Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its data, in a folder of its own."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("make_data.py", "tiny.yaml"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    subprocess.run([sys.executable, str(folder / "make_data.py")], check=True, capture_output=True)
    for name in ("tiny-train", "tiny-val"):
        data = folder / "data" / name
        manifest.write(open_store(str(data)), manifest.scan(data))
    return folder


@pytest.fixture(scope="module")
def at_home(digits: Path) -> Callable[..., Run]:
    """The same training on this machine, not interrupted; once for each change of it."""

    @functools.cache
    def trained(changes: tuple[tuple[str, str], ...]) -> Run:
        where = {"backend": "local", "output": str(digits / "output"), "root": str(digits / "root")}
        write_target(digits, where)
        settings = [f"{key}={value}" for key, value in changes]
        run = submit(digits / "tiny.yaml", target="there", settings=settings, ledger=Ledger(digits / "ledger"))
        assert run.wait(timeout=300).state is State.SUCCEEDED
        return run

    return lambda **changes: trained(tuple(changes.items()))


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
    """The trainer image by a digest, as one that was pulled from a registry."""
    name = f"{REGISTRY}:{trainer_image.rpartition(':')[2]}"
    with locked("images"):
        podman("tag", trainer_image, name)
    reference = f"{REGISTRY}@{podman('image', 'inspect', '--format={{.Digest}}', trainer_image)}"
    world.cluster.serve_image(reference, image=trainer_image)
    yield reference
    with locked("images"):
        podman("untag", trainer_image, name, check=False)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def write_target(folder: Path, target: Mapping[str, Any]) -> None:
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"there": {**target}}}))


def train(
    digits: Path, world: KubernetesWorld, ledger: Ledger, changes: Mapping[str, str] = {}, *, image: str | None = None
) -> Run:
    write_target(digits, world.target)
    settings = [
        *([f"image={image}"] if image else world.settings),
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    to = f"{world.target['output']}/_data"
    pushed = push_channels(digits / "tiny.yaml", backend=None, target="there", settings=settings, to=to)
    return submit(digits / "tiny.yaml", target="there", settings=[*settings, *pushed], ledger=ledger)


def series(metrics: Metrics) -> Series:
    """All that does not depend on the clock."""
    return {name: metrics.series(name) for name in metrics.names if not name.endswith("per_second")}


def in_training(run: Run) -> None:
    """Returns in the first epoch, or a later one."""
    deadline = time.monotonic() + 120
    while not run.metrics().points:
        assert not run.status().state.terminal and time.monotonic() < deadline, text_of(run)
        run.store().write("control/watch", str(time.time()).encode())  # as `cvlaunch watch` says
        time.sleep(0.1)


def test_a_training_is_the_one_at_home_and_the_container_backend_s(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run], pinned: str
) -> None:
    run = train(digits, world, ledger, image=pinned)
    assert run.wait(timeout=300).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home().metrics())
    there = render(digits / "tiny.yaml", backend="container", settings=[f"image={pinned}"])
    assert run.record.plan["job_digest"] == there.job_digest != at_home().record.plan["job_digest"]
    assert run.record.plan["unpinned"] == []


@pytest.mark.parametrize("make_world", ["kubernetes", "openshift"] if REAL is None else ["that is real"], indirect=True)
def test_an_evicted_training_ends_with_the_same_numbers(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world, ledger, LONGER)
    in_training(run)
    assert run.handle is not None
    world.preempt(run.handle)
    status = run.wait(timeout=300)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    lines = [line for line in text_of(run).splitlines() if line.startswith("resuming from step")]
    assert len(lines) == 1 and "step 0 in it" not in lines[0], text_of(run)
    assert series(run.metrics()) == series(at_home(**LONGER).metrics())
    assert run.record.plan["job_digest"] == at_home(**LONGER).record.plan["job_digest"], "its image is not pinned"


def test_two_nodes_train_as_two_processes_at_home(
    digits: Path, world: KubernetesWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world, ledger, {"resources.nodes": "2"})
    assert run.wait(timeout=300).state is State.SUCCEEDED, text_of(run)
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
