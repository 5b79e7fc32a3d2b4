"""This machine is its own world."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.backends.base import Handle
from launcher.supervisor import SupervisorFolder
from launcher.testing import ContainerFacts
from tests.worlds.supervised import supervise_again


class LocalWorld:
    backend = "local"
    settings = ()
    patience = 120.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def target(self) -> Mapping[str, Any]:
        return {"backend": "local", "output": str(self._folder / "output"), "root": str(self._folder / "local")}

    def python(self) -> str:
        return sys.executable

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        plan = json.loads(text)
        return ContainerFacts(
            argv=plan["argv"],
            env=plan["env"],
            job=plan["job"],
            gpus=plan["limits"]["gpus"],
            nodes=1,
            image=None,
            cpus=None,
            memory=None,
            shm=plan["shm"],
            disk=None,
            grace_s=plan["limits"]["grace_s"],
            timeout_s=None,
            secrets=None,
        )

    def sent(self, handle: Handle) -> str:
        return self._supervisor(handle).plan.read_text()

    def submit_again(self, handle: Handle) -> None:
        supervise_again(self._folder / "again" / handle.native, self.sent(handle))

    def preempt(self, handle: Handle) -> None:
        record = None
        while record is None or record.runner is None:
            record = self._supervisor(handle).record()
            time.sleep(0.05)
        os.kill(record.runner.pid, signal.SIGTERM)

    def _supervisor(self, handle: Handle) -> SupervisorFolder:
        return SupervisorFolder(self._folder / "local" / handle.native)
