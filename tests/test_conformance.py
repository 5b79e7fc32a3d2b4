"""Every backend that the registry knows keeps the promises of launcher.testing; one without a world fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.backends import names
from launcher.testing import World
from launcher.testing.conformance import *  # noqa: F403 the suite is its functions
from tests.services.charliecloud import mount_image
from tests.worlds.container import ContainerWorld
from tests.worlds.kubernetes import kubernetes_world
from tests.worlds.local import LocalWorld
from tests.worlds.real_cluster import REAL, RealWorld
from tests.worlds.sagemaker import sagemaker_world
from tests.worlds.slurm import SlurmWorld

MakeWorld = Callable[[pytest.FixtureRequest], Callable[[Path], World]]


def _slurm(fixture: str = "slurm_session", *, ssh: str | None = None) -> MakeWorld:
    def make(request: pytest.FixtureRequest) -> Callable[[Path], World]:
        server = request.getfixturevalue(ssh) if ssh else None
        return functools.partial(SlurmWorld, cluster=request.getfixturevalue(fixture), ssh=server)

    return make


def _slurm_in_container(request: pytest.FixtureRequest) -> Callable[[Path], World]:
    cluster, image = request.getfixturevalue("slurm_session"), request.getfixturevalue("trainer_image")

    def make(folder: Path) -> World:
        here = str(mount_image(cluster, image))
        return SlurmWorld(folder, cluster, image=here, container_command="charliecloud")

    return make


def _kubernetes(backend: str) -> MakeWorld:
    return lambda request: kubernetes_world(request, backend)


WORLDS: dict[str, MakeWorld] = {
    "container": lambda request: functools.partial(ContainerWorld, image=request.getfixturevalue("trainer_image")),
    "kubernetes": _kubernetes("kubernetes"),
    "local": lambda request: LocalWorld,
    "openshift": _kubernetes("openshift"),
    "sagemaker": sagemaker_world,
    "slurm": _slurm(),
    "slurm in a container": _slurm_in_container,
    "slurm over ssh": _slurm(ssh="slurm_login"),
    "slurm without accounting": _slurm("slurm_session_without_accounting"),
}
"""The first word is the backend's name."""
if (cluster := REAL) is not None:
    WORLDS[f"{cluster.backend} that is real"] = lambda request: functools.partial(RealWorld, cluster=cluster)
NEEDS = {
    "container": ["podman", "debootstrap"],
    "kubernetes": ["podman", "debootstrap"],
    "openshift": ["podman", "debootstrap"],
    "sagemaker": ["podman", "debootstrap"],
    "slurm": ["slurm"],
    "slurm in a container": ["slurm", "charliecloud", "podman", "debootstrap"],
    "slurm over ssh": ["slurm", "sshd"],
    "slurm without accounting": ["slurm"],
}


def test_every_backend_has_a_world() -> None:
    assert names() == sorted({name.partition(" ")[0] for name in WORLDS})


@pytest.fixture(
    scope="session",  # an image is built before a test gets a home of its own, and finds the user's caches
    params=[pytest.param(name, marks=pytest.mark.needs(*NEEDS.get(name, ()))) for name in sorted(WORLDS)],
)
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], World]:
    return WORLDS[request.param](request)


@pytest.fixture
def world(make_world: Callable[[Path], World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = make_world(tmp_path / "world")
    for name, value in getattr(made, "environment", {}).items():
        monkeypatch.setenv(name, value)
    return made
