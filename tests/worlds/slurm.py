"""A real SLURM of two nodes on this machine, from its login node or through a real sshd, bare or in a container."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.backends.base import Handle
from launcher.backends.slurm import inline_job
from launcher.slurm import places
from launcher.testing import ContainerFacts
from tests.services.slurm import SlurmCluster
from tests.services.sshd import ALIAS, Sshd

__all__ = ["SlurmWorld", "sbatch_options"]


class SlurmWorld:
    """ssh: the way to the cluster; then this test's processes find no SLURM without it. keys: of the target, besides
    where it is."""

    backend = "slurm"
    patience = 240.0

    def __init__(
        self, folder: Path, cluster: SlurmCluster, *, ssh: Sshd | None = None, image: str | None = None, **keys: Any
    ) -> None:
        self._root = folder / "root"
        self._cluster = cluster
        self._ssh = ssh
        self._image = image
        self._keys = {"partition": "low", "python": sys.executable, **keys}
        self._root.mkdir(parents=True, exist_ok=True)
        _link_library(self._root)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the commands of this test's processes need."""
        if self._ssh is None:
            return self._cluster.environment
        return {**self._ssh.environment, "SLURM_CONF": "/nowhere/slurm.conf"}

    @property
    def target(self) -> Mapping[str, Any]:
        way = {"ssh": ALIAS} if self._ssh else {}
        return {"backend": "slurm", "root": str(self._root), **way, **self._keys}

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"image={self._image}",) if self._image else ()

    def python(self) -> str:
        return "/opt/venv/bin/python" if self._image else sys.executable

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        options = sbatch_options(text)
        command = shlex.split(text.partition("\ncommand=(\n")[2].partition("\n)\n")[0])
        memory = options.get("mem")
        return ContainerFacts(
            argv=command,
            env={},
            job=inline_job(text).to_json(),
            gpus=int(options["gres"].rpartition(":")[2]) if "gres" in options else 0,
            nodes=int(options["nodes"]),
            image=next((word for word in command if word == self._image), None),
            cpus=float(options["cpus-per-task"]) if "cpus-per-task" in options else None,
            memory=int(memory.removesuffix("M")) << 20 if memory else None,
            shm=None,
            disk=None,
            grace_s=float(options["signal"].removeprefix("B:USR1@")),
            timeout_s=_seconds(options["time"]) if "time" in options else None,
            secrets=None,
        )

    def sent(self, handle: Handle) -> str:
        """As SLURM itself has it."""
        copy = self._root / f"sent-{_job(handle)}"
        self._cluster.run("scontrol", "write", "batch_script", _job(handle), str(copy))
        return copy.read_text(encoding="utf-8")

    def submit_again(self, handle: Handle) -> None:
        job = self._cluster.submit(Path(places.record(str(self._root), _run(handle)), "job.sh").read_text())
        self._cluster.wait_for_state(job, "COMPLETED")

    def preempt(self, handle: Handle) -> None:
        """A job of a better partition wants the whole node."""
        node = self._cluster.run("squeue", "--noheader", "--jobs", _job(handle), "--format=%N").strip()
        script = "#!/bin/bash\nsleep 2\n"
        job = self._cluster.submit(
            script, "--partition=main", "--exclusive", f"--nodelist={node}", "--output=/dev/null"
        )
        self._cluster.wait_for_state(job, "COMPLETED")


def sbatch_options(script: str) -> dict[str, str]:
    """Of the lines for SLURM, as sbatch reads them: `--name=value` with a shell's quotes, before the first command."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH ")):
                name, _, value = word.removeprefix("--").partition("=")
                found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def _seconds(time_limit: str) -> float:
    days, hours, minutes, seconds = map(int, re.split("[-:]", time_limit))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _job(handle: Handle) -> str:
    return handle.native.partition(".")[0]


def _run(handle: Handle) -> str:
    return handle.native.partition(".")[2]


def _link_library(root: Path) -> None:
    """This checkout is what `targets setup` would bring there; its own tests are elsewhere."""
    library = Path(places.library(str(root)))
    if not library.exists():
        library.symlink_to(Path(__file__).parents[2])
