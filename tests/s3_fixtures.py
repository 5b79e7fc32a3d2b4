"""Fixtures for S3, one server a session and one bucket a test. tests/conftest.py takes them in by
`pytest_plugins = ["tests.s3_fixtures"]`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.stores import Store, open_store
from tests.services.s3 import S3Server, moto_server, rclone_server

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of one test; the environment holds the keys."""

    server: S3Server
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def store(self, folder: str = "runs/shapes-1", *, patience_s: float = 5) -> Store:
        return open_store(f"{self.uri}/{folder}", self.server.options, patience_s=patience_s)


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_server(tmp_path_factory.mktemp("rclone") / "buckets") as server:
        yield server


@pytest.fixture
def clean_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No AWS or Google identity in the environment; the home folder of the test."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return home


def _bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_NUMBERS)}"
    server.make_bucket(name)
    return Bucket(server, name)


@pytest.fixture
def moto_bucket(moto_s3: S3Server, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return _bucket(moto_s3, monkeypatch)


@pytest.fixture
def rclone_bucket(rclone_s3: S3Server, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return _bucket(rclone_s3, monkeypatch)
