"""Fixtures for machines behind ssh. Servers are a session's own. tests/conftest.py takes them in by
`pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launcher.remote import Host
from tests.services.sshd import ALIAS, Sshd, sshd


def use(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The server as this test's user finds it: in ssh's configuration, as `cluster`."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Host(ALIAS)


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Lets us in as root."""
    with sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def csh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Lets us in as a user whose login shell is csh and whose login files print noise."""
    with sshd(tmp_path_factory.mktemp("csh"), login_shell="/bin/csh") as server:
        yield server


@pytest.fixture(scope="session")
def bash_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Lets us in as a user whose login shell is bash and whose login files print noise."""
    with sshd(tmp_path_factory.mktemp("bash"), login_shell="/bin/bash") as server:
        yield server


@pytest.fixture
def ssh_host(ssh_server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Host:
    """root on this machine, behind ssh."""
    return use(ssh_server, monkeypatch)


@pytest.fixture
def csh_host(csh_server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Host:
    return use(csh_server, monkeypatch)
