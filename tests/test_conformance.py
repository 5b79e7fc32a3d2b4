"""Every backend that the registry knows keeps the promises of launcher.testing; one without a world fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.backends import names
from launcher.testing import World
from launcher.testing.conformance import *  # noqa: F403 the suite is its functions
from tests.worlds.local import LocalWorld

WORLDS: dict[str, Callable[[Path], World]] = {"local": LocalWorld}


def test_every_backend_has_a_world() -> None:
    assert names() == sorted(WORLDS)


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return WORLDS[request.param](tmp_path / "world")
