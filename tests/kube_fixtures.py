"""Fixtures for Kubernetes: a cluster of a session's own, as new for every test. tests/conftest.py takes them in by
`pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.kube import KubeCluster, kube_cluster


@pytest.fixture(scope="session")
def kube_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    with kube_cluster(tmp_path_factory.mktemp("kube") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def kube(kube_session: KubeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeCluster]:
    """A cluster which the environment of this test's processes names."""
    for name, value in kube_session.environment.items():
        monkeypatch.setenv(name, value)
    yield kube_session
    kube_session.clear()
