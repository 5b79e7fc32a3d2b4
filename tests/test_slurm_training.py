"""Real trainings on a real SLURM: bare, in a container, on two nodes, preempted; what is trained is what is trained at
home. And what a job has there: GPUs, ranks, keys of an object store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher import Run, State, render, submit
from launcher.ledger import Ledger
from launcher.slurm import places
from launcher.testing.conformance import STOPPABLE, job, ledger, run_job, text_of, until
from tests.s3_fixtures import Bucket
from tests.services.charliecloud import mount_image
from tests.services.s3 import ACCESS_KEY, SECRET_KEY
from tests.services.slurm import SlurmCluster
from tests.trainings import at_home, digits, in_training, resumed_in_the_middle, series, tagged, write_target
from tests.worlds.slurm import SlurmWorld, sbatch_options

__all__ = ["at_home", "digits", "job", "ledger", "run_job"]

pytestmark = pytest.mark.needs("slurm")
in_container = pytest.mark.needs("charliecloud", "podman", "debootstrap")

LONGER = {"train.batch": "2"}
"""Epochs of several seconds, so that a preemption comes in the middle of one."""
OWN_DISKS = {"scratch": "/var/spool"}
"""Which each node of the test's cluster has for itself."""
REGISTRY = "registry.example.com/cvlaunch/trainer"

both_ways = pytest.mark.parametrize("image", ["bare", pytest.param("container", marks=in_container)], indirect=True)


def target(**keys: Any) -> pytest.MarkDecorator:
    """The test's target has these keys."""
    return pytest.mark.parametrize("world", [keys], indirect=True, ids=[""])


StartRun = Callable[..., Run]


@pytest.fixture(scope="session")  # an image is built before a test gets a home of its own
def image(request: pytest.FixtureRequest) -> str | None:
    """What jobs run in; None: in this Python, bare."""
    return request.getfixturevalue("trainer_image") if getattr(request, "param", "") == "container" else None


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, slurm: SlurmCluster, image: str | None) -> SlurmWorld:
    """output: the name of a fixture, a bucket."""
    keys = dict(getattr(request, "param", {}))
    if "output" in keys:
        bucket: Bucket = request.getfixturevalue(keys["output"])
        storage = {"endpoint": bucket.server.endpoint, "region": "us-east-1"}
        keys |= {"output": f"{bucket.uri}/runs", "storage": storage}
    if image is None:
        return SlurmWorld(tmp_path / "world", slurm, **keys)
    folder = str(mount_image(slurm, image))
    return SlurmWorld(tmp_path / "world", slurm, image=folder, container_command="charliecloud", **keys)


def train(digits: Path, target: Mapping[str, Any], ledger: Ledger, changes: Mapping[str, str] = {}) -> Run:
    """With its data where it is."""
    write_target(digits, target)
    settings = [f"{key}={value}" for key, value in changes.items()]
    return submit(digits / "tiny.yaml", target="there", settings=settings, ledger=ledger)


def write_keys() -> None:
    """As the user has them on the cluster."""
    keys = Path.home() / ".aws/credentials"
    keys.parent.mkdir()
    keys.write_text(f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n")
    keys.chmod(0o600)


def preempt_in_training(run: Run, world: SlurmWorld) -> None:
    """In its first epoch."""
    in_training(run, every=0.05)
    assert run.handle is not None
    world.preempt(run.handle)


# -- the same numbers -------------------------------------------------------------------------------------------------


def test_a_bare_training_is_the_one_at_home(
    digits: Path, world: SlurmWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger)
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home().metrics())
    assert run.record.plan["job_digest"] == at_home().record.plan["job_digest"]


@pytest.fixture
def pinned(trainer_image: str) -> Iterator[str]:
    with tagged(trainer_image, REGISTRY) as reference:
        yield reference


@in_container
def test_a_training_in_an_image_is_the_one_at_home_and_the_container_backend_s(
    digits: Path,
    slurm: SlurmCluster,
    tmp_path: Path,
    ledger: Ledger,
    at_home: Callable[..., Run],
    trainer_image: str,
    pinned: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The image stands where `targets setup --image` would have put it."""
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")
    world = SlurmWorld(tmp_path / "world", slurm, container_command="charliecloud")
    folder = places.image(world.target["root"], REGISTRY, digest=pinned.partition("@")[2], ending="")
    mount_image(slurm, trainer_image, Path(folder))
    run = train(digits, world.target, ledger, {"image": pinned})
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home().metrics())
    there = render(digits / "tiny.yaml", backend="container", settings=[f"image={pinned}"])
    assert run.record.plan["job_digest"] == there.job_digest != at_home().record.plan["job_digest"]
    assert not any("image" in line for line in run.record.plan["unpinned"])


def test_a_preempted_training_ends_with_the_same_numbers(
    digits: Path, world: SlurmWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    """Here SLURM's signal reaches the processes that load data, too."""
    changes = {**LONGER, "train.workers": "1"}
    run = train(digits, world.target, ledger, changes)
    preempt_in_training(run, world)
    status = run.wait(timeout=600)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    assert resumed_in_the_middle(run), text_of(run)
    assert series(run.metrics()) == series(at_home(**changes).metrics())


# -- several nodes ----------------------------------------------------------------------------------------------------


@target(interface="lo")
def test_two_nodes_train_as_two_processes_at_home_and_both_come_back(
    digits: Path, world: SlurmWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger, {**LONGER, "resources.nodes": "2"})
    preempt_in_training(run, world)
    status = run.wait(timeout=600)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    assert series(run.metrics()) == series(at_home(**LONGER, **{"resources.processes": "2"}).metrics())
    assert [e.path for e in run.store().list("nodes/1/output/logs")] == [
        f"nodes/1/output/logs/attempt-{attempt}.node-1.log" for attempt in (1, 2)
    ]
    lines = [line for line in run.logs() if "attempt" in line.text]
    assert {(line.text.split("attempt ")[1].partition(";")[0]) for line in lines} == {
        f"{attempt}, node {node} of 2" for attempt in (1, 2) for node in (0, 1)
    }
    assert run.store().head("nodes/1/output/metrics.jsonl") is None, "one node writes them"


TELL = """
    import os, socket
    names = ("CVLAUNCH_NODE_RANK", "CVLAUNCH_NODES", "CVLAUNCH_MASTER", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    print("HAS", socket.gethostname(), *(os.environ.get(name) for name in names))
"""


@target(interface="lo")
def test_nodes_are_told_of_each_other(run_job: StartRun, world: SlurmWorld) -> None:
    """With a port of the job's own, because jobs share nodes."""
    runs = [run_job(TELL, resources={"nodes": 2}) for _ in range(2)]
    ports = set()
    for run in runs:
        assert run.wait(timeout=world.patience).state is State.SUCCEEDED, text_of(run)
        told = sorted(line.split()[1:] for line in text_of(run).splitlines() if line.startswith("HAS"))
        port = told[0][3].rpartition(":")[2]
        assert told == [[f"node{n + 1}", str(n), "2", f"node1:{port}", "lo", "lo"] for n in (0, 1)]
        ports.add(port)
    assert len(ports) == 2


@both_ways
def test_a_cancelled_run_ends_on_both_nodes(run_job: StartRun, world: SlurmWorld) -> None:
    run = run_job(STOPPABLE, resources={"nodes": 2, "grace": "60s"})
    until(lambda: text_of(run).count("starts from None") == 2, world)
    run.cancel()
    assert run.wait(timeout=world.patience).state is State.CANCELLED
    for place in ("output/result.json", "nodes/1/output/result.json"):
        assert json.loads(run.store().read(place))["state"] == "CANCELLED", place


FAILS_ON_THE_SECOND = """
    import os, pathlib, signal, sys, time
    from launcher.contract import Layout, complete_checkpoint
    signal.signal(signal.SIGTERM, lambda *_: None)
    layout = Layout.from_environment()
    print("begins", flush=True)
    first = pathlib.Path({begun!r})
    if os.environ["CVLAUNCH_NODE_RANK"] == "1":
        while not first.exists():
            time.sleep(0.05)
        sys.exit(3)
    first.touch()
    while not layout.stop.exists():
        time.sleep(0.05)
    (layout.checkpoints / "1").mkdir(parents=True)
    complete_checkpoint(layout.checkpoints / "1", step=1)
    sys.exit(75)
"""


@pytest.mark.parametrize(
    ("world", "reason"),
    [({}, "exit code 1"), ({"output": "rclone_bucket", **OWN_DISKS}, "a node failed, and srun stopped the others")],
    indirect=["world"],
    ids=["in place", "uploaded"],
)
def test_where_one_node_fails_the_run_has_failed(
    run_job: StartRun, world: SlurmWorld, tmp_path: Path, reason: str
) -> None:
    """srun stops the other one, which saves as if it were preempted; nothing may start that again."""
    write_keys()
    script = FAILS_ON_THE_SECOND.format(begun=str(tmp_path / "begun"))
    run = run_job(script, resources={"nodes": 2, "grace": "60s"})
    status = run.wait(timeout=world.patience)
    assert (status.state, status.exit_code, status.attempt) == (State.FAILED, 1, 1), text_of(run)
    assert reason in status.reason


# -- what a job has ---------------------------------------------------------------------------------------------------


@both_ways
@target(output="rclone_bucket", **OWN_DISKS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_an_object_store_takes_the_results(run_job: StartRun, world: SlurmWorld, nodes: int) -> None:
    """With keys from a file: none are in the job's environment."""
    write_keys()
    run = run_job("import os; print('KEYS', *(n for n in os.environ if 'ACCESS_KEY' in n))", resources={"nodes": nodes})
    assert run.wait(timeout=world.patience).state is State.SUCCEEDED, text_of(run)
    assert json.loads(run.store().read("output/result.json"))["upload"] == "complete"
    assert text_of(run).splitlines().count("KEYS") == nodes


@pytest.mark.parametrize(
    ("world", "resources", "option", "there"),
    [
        ({}, {"gpus": 1}, ("gres", "gpu:1"), "0"),
        ({"gpu_option": "gpus-per-node"}, {"gpus": 2}, ("gpus-per-node", "2"), "0,1"),
        ({"gpu_types": {"A100": "a100"}}, {"gpus": 2, "gpu": ["A100"]}, ("gres", "gpu:a100:2"), "0,1"),
        ({"gpu_features": {"L40S": "l40s"}}, {"gpus": 1, "gpu": ["L40S"]}, ("constraint", "l40s"), "0"),
    ],
    indirect=["world"],
    ids=["gres", "gpus-per-node", "type", "feature"],
)
def test_gpus_are_asked_for_as_the_site_wants_it(
    run_job: StartRun, world: SlurmWorld, resources: dict[str, Any], option: tuple[str, str], there: str
) -> None:
    run = run_job("import os; print('SEES', os.environ.get('CUDA_VISIBLE_DEVICES'))", resources=resources)
    assert run.wait(timeout=world.patience).state is State.SUCCEEDED, text_of(run)
    assert f"SEES {there}" in text_of(run).splitlines()
    assert option in sbatch_options(run.record.plan["text"]).items()
