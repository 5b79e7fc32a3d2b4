"""Podman on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.backends.base import Handle
from launcher.supervisor import SupervisorFolder
from launcher.testing import ContainerFacts
from tests.services.podman import podman
from tests.worlds.supervised import supervise_again


class ContainerWorld:
    backend = "container"
    patience = 240.0

    def __init__(self, folder: Path, image: str) -> None:
        self._folder = folder
        self._image = image

    @property
    def target(self) -> Mapping[str, Any]:
        """The host's network, because one of their own is what containers can't have everywhere."""
        return {
            "backend": "container",
            "engine": "podman",
            "network": "host",
            "output": str(self._folder / "output"),
            "root": str(self._folder / "container"),
        }

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"image={self._image}",)

    def python(self) -> str:
        return "/opt/venv/bin/python"

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        plan = json.loads(text)
        return ContainerFacts(
            argv=plan["argv"],
            env=plan["env"],
            job=plan["job"],
            gpus=plan["limits"]["gpus"],
            nodes=1,
            image=plan["image"],
            cpus=plan["limits"]["cpus"],
            memory=plan["limits"]["memory"],
            shm=plan["shm"],
            disk=None,
            grace_s=plan["limits"]["grace_s"],
            timeout_s=plan["limits"]["timeout_s"],
            secrets=None,
        )

    def sent(self, handle: Handle) -> str:
        return self._supervisor(handle).plan.read_text()

    def submit_again(self, handle: Handle) -> None:
        supervise_again(self._folder / "again" / handle.native, self.sent(handle))

    def preempt(self, handle: Handle) -> None:
        podman("kill", "--signal", "TERM", handle.native)

    def _supervisor(self, handle: Handle) -> SupervisorFolder:
        return SupervisorFolder(self._folder / "container" / handle.native)
