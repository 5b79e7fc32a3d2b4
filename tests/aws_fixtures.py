"""Fixtures for AWS: an account of a session's own, as new for every test but for buckets, roles and images.
tests/conftest.py takes them in by `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.aws import AwsCloud, aws_cloud


@pytest.fixture(scope="session")
def aws_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsCloud]:
    with aws_cloud(tmp_path_factory.mktemp("aws") / "cloud") as cloud:
        yield cloud


@pytest.fixture
def aws(aws_session: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsCloud]:
    """An account whose keys the environment of this test's processes holds."""
    for name, value in aws_session.environment.items():
        monkeypatch.setenv(name, value)
    yield aws_session
    aws_session.clear()
