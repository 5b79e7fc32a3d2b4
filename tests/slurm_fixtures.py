"""Fixtures for SLURM: clusters of a session's own (a test may stop the controller or a node), each as new for every
test. tests/conftest.py takes them in by `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.slurm import SlurmCluster, slurm_cluster
from tests.services.sshd import Sshd, sshd


@pytest.fixture(scope="session")
def slurm_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster", accounting=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_session_without_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster", accounting=False) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_login(slurm_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Lets us in as root on the login node of `slurm_session`."""
    with sshd(tmp_path_factory.mktemp("login"), variables=slurm_session.environment) as server:
        yield server


@pytest.fixture
def slurm(slurm_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A cluster with accounting, which the environment of this test's processes names."""
    yield from _lent(slurm_session, monkeypatch)


@pytest.fixture
def slurm_without_accounting(
    slurm_session_without_accounting: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    """The same, but `sacct` fails."""
    yield from _lent(slurm_session_without_accounting, monkeypatch)


def _lent(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.clear()
