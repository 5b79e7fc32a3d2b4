"""What containers find on SageMaker, from submission to end: no region but the job's ARN, and folders of root's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Run, State, submit
from launcher.ledger import Ledger
from launcher.testing.conformance import text_of
from tests.services.aws import AwsCloud
from tests.services.podman import locked, podman
from tests.worlds.sagemaker import SageMakerWorld

pytestmark = pytest.mark.needs("podman", "debootstrap")


@pytest.fixture
def world(aws: AwsCloud, trainer_image: str) -> SageMakerWorld:
    return SageMakerWorld(aws, image=trainer_image)


def submitted(world: SageMakerWorld, folder: Path, command: str, **target: Any) -> Run:
    """target: keys of it; None takes one away."""
    keys = {name: value for name, value in {**world.target, **target}.items() if value is not None}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"aws": keys}}))
    job = {"name": "small", "command": [world.python(), "-c", command]}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return submit(folder / "job.yaml", target="aws", settings=world.settings, ledger=Ledger(folder / "ledger"))


def test_a_target_need_not_name_the_region(world: SageMakerWorld, tmp_path: Path) -> None:
    run = submitted(world, tmp_path, "import os; print('in', os.environ['AWS_REGION'])", region=None)
    assert run.wait(timeout=world.patience).state is State.SUCCEEDED, text_of(run)
    assert "in eu-west-1" in text_of(run)


@pytest.fixture
def someone_s(trainer_image: str, tmp_path: Path) -> Iterator[str]:
    """The trainer image, but for its USER."""
    tag = f"localhost/cvlaunch-test-someone:{os.getpid()}"
    (tmp_path / "Dockerfile").write_text(f"FROM {trainer_image}\nUSER 1000\n")
    with locked("images"):
        podman("build", "--tag", tag, "--file", tmp_path / "Dockerfile", tmp_path)
    yield tag
    with locked("images"):
        podman("rmi", "--force", tag)


def test_an_image_whose_user_is_not_root_is_told_so(aws: AwsCloud, someone_s: str, tmp_path: Path) -> None:
    """Its checkpoints and its model would be lost: nothing is started."""
    world = SageMakerWorld(aws, image=someone_s)
    run = submitted(world, tmp_path, "print('ran')")
    status = run.wait(timeout=world.patience)
    assert (status.state, status.exit_code) == (State.FAILED, 64)
    said = text_of(run)
    assert "uid 1000 can't write to /opt/ml" in said and "`USER 0`" in said and "\nran" not in said
