"""A real runner in a process of its own, with small Python programs as jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.contract import JobFile
from launcher.stores import file_uri

__all__ = ["AS_SOMEONE", "RUNNER", "Ended", "RunnerWorld", "Running", "folder_of_another", "python", "until"]

RUNNER = (sys.executable, "-m", "launcher.runner")
AS_SOMEONE = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
"""A uid without an entry in passwd and without a home, as OpenShift and OVH give; what root owns is its own."""
_NOBODY = 65534
IN_PLACE = {"checkpoints": "in_place", "model": "in_place", "output": "in_place"}
UPLOADED = {"checkpoints": "runner", "model": "runner", "output": "runner"}

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
from launcher.contract import Layout, complete_checkpoint, write_json
ml = Layout.from_environment()
def checkpoint(step):
    folder = ml.checkpoints / str(step)
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"weights of step {step}")
    complete_checkpoint(folder, step=step)
def leave(code, reason=""):
    write_json(ml.exit, {"code": code, "reason": reason})
def ready():
    print("ready", flush=True)
def metrics(step, **values):
    ml.metrics.parent.mkdir(parents=True, exist_ok=True)
    with ml.metrics.open("a") as file:
        file.write(json.dumps({"step": step, "epoch": step, "time": 0, "split": "val", "values": values}) + "\\n")
"""


def python(code: str) -> tuple[str, ...]:
    """A command that runs `code`, with a few helpers of a well-behaved job at hand."""
    return (sys.executable, "-c", PRELUDE + code)


def folder_of_another(path: Path) -> Path:
    path.mkdir()
    os.chown(path, _NOBODY, _NOBODY)
    return path


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@dataclass(frozen=True)
class Ended:
    """A runner that has ended: its exit code, what it printed, how long it took."""

    code: int
    output: str
    seconds: float


@dataclass
class Running:
    process: subprocess.Popen[str]
    log: Path
    since: float = field(default_factory=time.monotonic)

    def printed(self, text: str) -> Running:
        until(lambda: text in self.log.read_text() or self.process.poll() is not None)
        assert text in self.log.read_text(), self.log.read_text()
        return self

    def signal(self, number: int = signal.SIGTERM) -> Running:
        self.since = time.monotonic()
        self.process.send_signal(number)
        return self

    def end(self, seconds: float = 120.0) -> Ended:
        """seconds counts from the signal, if one was sent."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        return Ended(code, self.log.read_text(), time.monotonic() - self.since)


class RunnerWorld:
    """One run `shapes-1`. in_place: root is the run's folder; else root is elsewhere and the runner uploads."""

    def __init__(self, folder: Path, *, in_place: bool = True, output: str | None = None, name: str = "a") -> None:
        self.folder = folder
        self.in_place = in_place
        self.output = output or file_uri(folder / "runs")
        self.run = folder / "runs" / "shapes-1"
        self.root = self.run if in_place else folder / f"machine-{name}"
        self._count = 0

    def job(self, command: tuple[str, ...] | None = None, **changes: Any) -> JobFile:
        facts: dict[str, Any] = {
            "run_id": "shapes-1",
            "name": "shapes",
            "job_digest": "0" * 64,
            "output": self.output,
            "command": command,
            "grace_s": 100.0,
            "movers": IN_PLACE if self.in_place else UPLOADED,
        }
        return JobFile(**{**facts, **changes})

    def start(
        self,
        job: JobFile,
        *,
        env: Mapping[str, str] = {},
        prefix: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> Running:
        self._count += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        job_file = self.folder / f"job-{self._count}.json"
        job_file.write_bytes(job.to_bytes())
        log = self.folder / f"stdout-{self.root.name}-{self._count}"
        environ = {**os.environ, "CVLAUNCH_JOB": str(job_file), "CVLAUNCH_ROOT": str(self.root), **env}
        with log.open("w") as out:
            process = subprocess.Popen(
                [*prefix, *RUNNER, *arguments],
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
            )
        return Running(process, log)

    def end(self, job: JobFile, *, env: Mapping[str, str] = {}, prefix: tuple[str, ...] = ()) -> Ended:
        return self.start(job, env=env, prefix=prefix).end()

    def read(self, path: str) -> str:
        """A file of the run's folder in the output store."""
        return (self.run / path).read_text()

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.read("output/result.json"))

    def log(self, attempt: int = 1, node: int = 0) -> str:
        return self.read(f"output/logs/attempt-{attempt}.node-{node}.log")
