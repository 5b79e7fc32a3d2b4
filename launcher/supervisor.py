"""Stays with a process of this machine after the CLI has gone: restarts, ends and remembers it.

`python -m launcher.supervisor FOLDER` reads `FOLDER/plan.json` (Plan.text) and leaves in FOLDER

    supervisor.json   who supervises and runs, which attempt     exit.json   how it ended
    lock              held as long as it runs                    runner.log  what the runner printed

The lock is inherited from the submitting process, so that at no moment a run is under way that nobody holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import contract, gpus
from launcher.contract import read_json
from launcher.errors import ConflictError
from launcher.process import ProcessId, adopt_orphans, kill_descendants

__all__ = ["Record", "SupervisorFolder", "start"]

_KILL_AFTER_GRACE_S = 15.0
"""The runner keeps the grace itself; later than this it is stuck."""


@dataclass(frozen=True)
class SupervisorFolder:
    """The files of one supervised run."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets.env"

    @property
    def log(self) -> Path:
        return self.path / "runner.log"

    def record(self) -> Record | None:
        content = read_json(self.path / "supervisor.json")
        return Record.from_json(content) if content else None

    def write_record(self, record: Record) -> None:
        contract.write_json(self.path / "supervisor.json", record.to_json())

    def exit(self) -> Mapping[str, Any] | None:
        return read_json(self.path / "exit.json")

    def write_exit(self, **facts: object) -> None:
        contract.write_json(self.path / "exit.json", {**facts, "ended": time.time()})

    def environment(self) -> Mapping[str, str]:
        """The environment in the plan, empty if there is no plan."""
        return dict((read_json(self.plan) or {}).get("env", {}))

    def locked(self) -> bool:
        """Whether a supervisor, or a submission that is starting one, is alive."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


@dataclass(frozen=True)
class Record:
    """supervisor.json. phase: running or restarting. started: Unix seconds of the first attempt."""

    supervisor: ProcessId
    runner: ProcessId | None
    attempt: int
    phase: str
    started: float

    def to_json(self) -> dict[str, Any]:
        runner = self.runner.to_json() if self.runner else None
        return {**vars(self), "supervisor": self.supervisor.to_json(), "runner": runner}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        runner = ProcessId.from_json(value["runner"]) if value["runner"] else None
        supervisor = ProcessId.from_json(value["supervisor"])
        return cls(supervisor, runner, int(value["attempt"]), str(value["phase"]), float(value["started"]))


def start(folder: SupervisorFolder, plan_text: str, secrets: Mapping[str, str], *, again: bool = False) -> bool:
    """Starts a supervisor for this plan; False if one has it already. ConflictError if the folder is another plan's.

    again: also when it has ended; attempts are counted on.
    """
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        free = _try_lock(lock)
        if not free or (not again and (folder.record() or folder.exit())):
            _same_plan(folder, plan_text)
            return False
        part = folder.plan.with_name("plan.json.part")
        part.write_text(plan_text)
        part.replace(folder.plan)
        (folder.path / "exit.json").unlink(missing_ok=True)
        if secrets:
            _write_secrets(folder.secrets, secrets)
        _spawn(folder, lock)
    finally:
        os.close(lock)
    return True


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_plan(folder: SupervisorFolder, plan_text: str) -> None:
    for _ in range(50):  # whoever holds the lock may be about to write it
        if folder.plan.exists():
            break
        time.sleep(0.1)
    if not folder.plan.exists() or folder.plan.read_text() != plan_text:
        raise ConflictError(f"{folder.path.name} is taken by another job; choose another --run-id")


def _write_secrets(path: Path, secrets: Mapping[str, str]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.writelines(f"{name}={json.dumps(value)}\n" for name, value in secrets.items())


def _spawn(folder: SupervisorFolder, lock: int) -> None:
    """The process that is started forks and ends at once, so that the supervisor is no child of ours."""
    with folder.log.open("ab") as log:
        subprocess.run(
            [sys.executable, "-m", "launcher.supervisor", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,
            cwd="/",
            check=True,
        )


def main() -> int:
    if os.fork():
        return 0
    folder = SupervisorFolder(Path(sys.argv[1]))
    plan = json.loads(folder.plan.read_text())
    adopt_orphans()
    supervision = _Supervision(folder, plan)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, supervision.on_signal)
    try:
        return supervision.run()
    finally:
        folder.secrets.unlink(missing_ok=True)


class _Supervision:
    """The loop of attempts. After a stop signal no further one is started."""

    def __init__(self, folder: SupervisorFolder, plan: Mapping[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._me = ProcessId.of()
        self._root = Path(plan["env"]["CVLAUNCH_ROOT"])
        self._started = time.time()
        self._asked = False
        self._runner: subprocess.Popen[bytes] | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Passes the first one on to the runner and sets the clock for its end."""
        if self._asked:
            return
        self._asked = True
        signal.signal(signal.SIGALRM, lambda *_: kill_descendants(os.getpid()))
        signal.setitimer(signal.ITIMER_REAL, self._plan["limits"]["grace_s"] + _KILL_AFTER_GRACE_S, 1.0)
        if self._runner is not None:
            self._runner.send_signal(signal.SIGTERM)

    def run(self) -> int:
        before = self._folder.record()
        attempt = before.attempt + 1 if before else 1
        while True:
            code = self._attempt(attempt)
            again = code == contract.EXIT_PREEMPTED and attempt < self._plan["limits"]["attempts"]
            if not again or self._asked or (self._root / contract.CANCEL).exists():
                break
            attempt += 1
            self._record(None, attempt, "restarting")
        self._folder.write_exit(code=code, attempt=attempt, **self._end(code, attempt))
        return code

    def _attempt(self, attempt: int) -> int:
        argv = self._plan["argv"]
        environ = self._environment(attempt)
        try:
            self._runner = subprocess.Popen(argv, env=environ, cwd=self._plan["cwd"], start_new_session=True)
        except OSError as error:
            sys.stdout.write(f"{argv[0]} can't be started: {error.strerror}\n")
            sys.stdout.flush()
            return contract.EXIT_BAD_CONFIG
        self._record(ProcessId.of(self._runner.pid), attempt, "running")
        if self._asked:  # the stop came between two attempts, or while this one was being started
            self._runner.send_signal(signal.SIGTERM)
        code = self._runner.wait()
        kill_descendants(os.getpid())
        return code if code >= 0 else 128 - code

    def _environment(self, attempt: int) -> dict[str, str]:
        """The user's, the plan's, and what only a start can know."""
        job = self._folder.path / "job.json"
        job.write_bytes(contract.canonical_json(self._plan["job"]) + b"\n")
        python_folder = str(Path(self._plan["argv"][0]).parent)  # so that `python` in a command is the target's
        environ = {
            **os.environ,
            **self._plan["env"],
            "PATH": os.pathsep.join([python_folder, os.environ.get("PATH", os.defpath)]),
            "CUDA_VISIBLE_DEVICES": ",".join(gpus.least_used(self._plan["limits"]["gpus"])),
            "CVLAUNCH_JOB": str(job),
            "CVLAUNCH_NATIVE_ID": f"{self._me.pid}-{self._me.start}",
            "CVLAUNCH_ATTEMPT": str(attempt),
        }
        if self._folder.secrets.exists():
            environ["CVLAUNCH_SECRETS_FILE"] = str(self._folder.secrets)
        return environ

    def _record(self, runner: ProcessId | None, attempt: int, phase: str) -> None:
        self._folder.write_record(Record(self._me, runner, attempt, phase, self._started))

    def _end(self, code: int, attempt: int) -> dict[str, object]:
        """The runner's own account of the end, if it left one for this attempt."""
        result = read_json(self._root / contract.RESULT) or {}
        if result.get("attempt") != attempt:
            return {"state": None, "reason": _last_line(self._folder.log) if code else ""}
        return {"state": result.get("state"), "reason": result.get("reason") or ""}


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:1024] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
