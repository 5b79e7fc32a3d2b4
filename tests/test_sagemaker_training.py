"""Real trainings on SageMaker's stand-in: one instance, spot interrupted in mid-epoch, two instances, no network. What
is trained is what is trained at home."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import Run, State, render
from launcher.ledger import Ledger
from launcher.metrics import Metrics
from launcher.testing.conformance import text_of
from tests.trainings import at_home, digits, in_training, rank_0_port, resumed_in_the_middle, series, tagged, train
from tests.worlds.sagemaker import SageMakerWorld, sagemaker_world

__all__ = ["at_home", "digits", "rank_0_port"]

pytestmark = pytest.mark.needs("podman", "debootstrap")

LONGER = {"train.batch": "2", "train.image_size": "64"}
"""Epochs of several seconds, so that an interruption comes in the middle of one."""
SPOT = {"resources.spot": "true", "resources.timeout": "1h"}
REGISTRY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/cvlaunch/pinned"


@pytest.fixture(scope="session")  # an image is built before a test has a home of its own
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], SageMakerWorld]:
    return sagemaker_world(request, **getattr(request, "param", {}))


@pytest.fixture
def world(
    make_world: Callable[[Path], SageMakerWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SageMakerWorld]:
    made = make_world(tmp_path / "world")
    for name, value in {**made.environment, "CVLAUNCH_ENGINE": "podman"}.items():
        monkeypatch.setenv(name, value)
    yield made
    made.cloud.clear()


@pytest.fixture
def pinned(trainer_image: str, world: SageMakerWorld) -> Iterator[str]:
    with tagged(trainer_image, REGISTRY) as reference:
        world.cloud.serve_image(reference, image=trainer_image)
        yield reference


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def job_name(run: Run) -> str:
    assert run.handle is not None
    return run.handle.native


def test_a_training_is_the_one_at_home_and_the_container_backend_s(
    digits: Path, world: SageMakerWorld, ledger: Ledger, at_home: Callable[..., Run], pinned: str, tmp_path: Path
) -> None:
    run = train(digits, world.target, ledger, settings=[f"image={pinned}"])
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home().metrics())
    there = render(digits / "tiny.yaml", backend="container", settings=[f"image={pinned}"])
    assert run.record.plan["job_digest"] == there.job_digest != at_home().record.plan["job_digest"]
    assert run.record.plan["unpinned"] == []
    home = run.sync(tmp_path / "home").path
    assert any((home / "model").iterdir())
    final = {item["MetricName"]: item["Value"] for item in world.cloud.job(job_name(run))["FinalMetricDataList"]}
    summary = run.metrics().summary()
    assert {name: final[name] for name in ("val/accuracy", "val/loss")} == {
        name: pytest.approx(summary[name], abs=1e-4) for name in ("val/accuracy", "val/loss")
    }


def test_an_interrupted_spot_training_ends_with_the_same_numbers(
    digits: Path, world: SageMakerWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger, {**LONGER, **SPOT}, settings=world.settings)
    in_training(run)
    world.cloud.interrupt(job_name(run))
    status = run.wait(timeout=600)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    assert resumed_in_the_middle(run), text_of(run)
    assert series(run.metrics()) == series(at_home(**LONGER).metrics())
    assert run.record.plan["job_digest"] == at_home(**LONGER).record.plan["job_digest"], "its image is not pinned"


@pytest.mark.usefixtures("rank_0_port")
def test_two_instances_train_as_two_processes_at_home(
    digits: Path, world: SageMakerWorld, ledger: Ledger, at_home: Callable[..., Run]
) -> None:
    run = train(digits, world.target, ledger, {"resources.nodes": "2"}, settings=world.settings)
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    assert series(run.metrics()) == series(at_home(**{"resources.processes": "2"}).metrics())
    assert {line.node for line in run.logs()} == {0, 1}
    assert run.store().head("nodes/1/output/metrics.jsonl") is None, "one node writes them"


@pytest.mark.parametrize("make_world", [{"network_isolation": True}], indirect=True, ids=["isolated"])
def test_a_training_without_network_comes_home(
    digits: Path, world: SageMakerWorld, ledger: Ledger, at_home: Callable[..., Run], tmp_path: Path
) -> None:
    run = train(digits, world.target, ledger, settings=world.settings)
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    home = run.sync(tmp_path / "home").path
    assert series(Metrics.from_file(home / "output/metrics.jsonl")) == series(at_home().metrics())
    assert (home / "output/result.json").exists()
    assert list((home / "model").iterdir())
