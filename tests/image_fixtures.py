"""Fixtures for container images: the base, the trainer image and a registry. tests/conftest.py takes them in by
`pytest_plugins`. The images are built once for all workers; a registry is a session's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.services import base, image
from tests.services.podman import locked
from tests.services.registry import Registry, registry_server

Test = TypeVar("Test", bound=Callable[..., None])


@pytest.fixture(scope="session")
def base_image() -> str:
    """Reference of a Debian without anything else."""
    return base.base_image()


@pytest.fixture(scope="session")
def trainer_image() -> str:
    """Reference of the real image, in podman's storage on this machine."""
    return image.trainer_image().reference


@pytest.fixture
def trainer_image_here(trainer_image: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, and `image: cvlaunch-trainer` in a job file is this one."""
    for name, value in image.build_environment().items():
        monkeypatch.setenv(name, value)
    return trainer_image


@pytest.fixture(scope="session")
def registry_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def registry(registry_process: Registry, monkeypatch: pytest.MonkeyPatch) -> str:
    """host:port of an open registry that podman and buildah may talk to without TLS."""
    for name, value in registry_process.environment.items():
        monkeypatch.setenv(name, value)
    return registry_process.address


def with_images(test: Test) -> Test:
    """A test with an engine and a registry that builds, pushes or removes images."""
    needs = pytest.mark.needs("podman", "debootstrap", "docker-registry")
    return pytest.mark.usefixtures("images_alone")(needs(test))


@pytest.fixture
def images_alone() -> Iterator[None]:
    """For a test that builds or removes images itself: no other worker does meanwhile, which Podman 4.3 can't stand."""
    with locked("images"):
        yield
