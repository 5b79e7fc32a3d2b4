"""Podman on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.backends.base import Handle
from launcher.supervisor import SupervisorFolder
from launcher.testing import ContainerFacts
from tests.services.podman import podman


class ContainerWorld:
    backend = "container"
    patience = 90.0

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
        """A second supervisor with the same plan, in a folder where the first one's lock does not stop it."""
        again = SupervisorFolder(self._folder / "again" / handle.native)
        again.path.mkdir(parents=True)
        again.plan.write_text(self.sent(handle))
        command = [sys.executable, "-m", "launcher.supervisor", str(again.path)]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        while again.exit() is None:
            time.sleep(0.05)

    def preempt(self, handle: Handle) -> None:
        podman("kill", "--signal", "TERM", handle.native)

    def _supervisor(self, handle: Handle) -> SupervisorFolder:
        return SupervisorFolder(self._folder / "container" / handle.native)
