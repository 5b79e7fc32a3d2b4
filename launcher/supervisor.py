"""Stays with a process of this machine after the CLI has gone: restarts, ends and remembers it.

`python -m launcher.supervisor FOLDER` reads `FOLDER/plan.json` (Plan.text) and leaves in FOLDER

    supervisor.json   who supervises and runs, which attempt     exit.json     how it ended
    lock              held as long as it runs                    runner.log    what the runner printed
    job.json          what the runner reads                      notice.json   why the runner started nothing
    cancelled         put there to cancel: nothing starts again

The lock is inherited from the submitting process, so that at no moment a run is under way that nobody holds.
Secrets come through standard input, stay in memory, and go to each attempt's runner through its standard input.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import contract, gpus, paths
from launcher.contract import read_json
from launcher.errors import CapacityError, ConflictError
from launcher.process import ProcessId, adopt_orphans, exit_code, kill_descendants, send_kill

__all__ = ["Record", "SupervisorFolder", "start"]

_SIGNALLED = 128
"""A process that signal n ended has the exit code 128 + n."""
_KILL_AFTER_GRACE_S = 15.0
"""The runner keeps the grace itself; later than this it is stuck."""

_LOCK_PATIENCE_S = 3.0
"""Whoever asks for the lock has it for an instant, and a supervisor for a moment after it has written exit.json."""


@dataclass(frozen=True)
class SupervisorFolder:
    """The files of one supervised run."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def log(self) -> Path:
        return self.path / "runner.log"

    @property
    def notice(self) -> Path:
        """$CVLAUNCH_NOTICE, where a runner that starts nothing says why: `{"state": …, "reason": …}`."""
        return self.path / "notice.json"

    @property
    def root(self) -> Path | None:
        """Where the job's folders stand; None if there is no plan."""
        root = (read_json(self.plan) or {}).get("env", {}).get("CVLAUNCH_ROOT")
        return Path(root) if root else None

    def record(self) -> Record | None:
        content = read_json(self.path / "supervisor.json")
        return Record.from_json(content) if content else None

    def write_record(self, record: Record) -> None:
        contract.write_json(self.path / "supervisor.json", record.to_json())

    def exit(self) -> Mapping[str, Any] | None:
        return read_json(self.path / "exit.json")

    def write_exit(self, **facts: object) -> None:
        contract.write_json(self.path / "exit.json", {**facts, "ended": time.time()})

    def account(self, attempt: int, native_id: str) -> Mapping[str, Any] | None:
        """What the runner of this attempt says of its end; another submission's result.json is no account of it."""
        if notice := read_json(self.notice):
            return notice
        result = (read_json(self.root / contract.RESULT) if self.root else None) or {}
        ours = result.get("attempt") == attempt and result.get("native_id") == native_id
        return result if ours else None

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked for that; not whether it has ended."""
        marks = [self._cancel_mark, *([self.root / contract.CANCEL] if self.root else [])]
        return any(mark.exists() for mark in marks)

    def cancel(self) -> None:
        """Leaves the mark: an attempt that ends without a word of its own was cancelled, and none comes after it."""
        self._cancel_mark.touch()

    @property
    def _cancel_mark(self) -> Path:
        return self.path / "cancelled"

    def clear(self) -> None:
        """Away with the end of an earlier start."""
        for path in (self.path / "exit.json", self.notice, self._cancel_mark):
            path.unlink(missing_ok=True)

    def locked(self) -> bool:
        """Whether a supervisor, or a submission that is starting one, is alive.

        A shared lock: two that ask don't take each other for a supervisor.
        """
        try:
            fd = os.open(self.path / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Record:
    """supervisor.json. phase: running or restarting. started: Unix seconds of the first attempt, resumed or not."""

    supervisor: ProcessId
    runner: ProcessId | None
    attempt: int
    phase: str
    started: float

    @property
    def native_id(self) -> str:
        """What the runner is told as CVLAUNCH_NATIVE_ID: another one after every `start`."""
        return _native_id(self.supervisor)

    def to_json(self) -> dict[str, Any]:
        runner = self.runner.to_json() if self.runner else None
        return {**vars(self), "supervisor": self.supervisor.to_json(), "runner": runner}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        runner = ProcessId.from_json(value["runner"]) if value["runner"] else None
        supervisor = ProcessId.from_json(value["supervisor"])
        return cls(supervisor, runner, int(value["attempt"]), str(value["phase"]), float(value["started"]))


def _native_id(supervisor: ProcessId) -> str:
    return f"{supervisor.pid}-{supervisor.start}"


def start(folder: SupervisorFolder, plan_text: str, secrets: Mapping[str, str], *, again: bool = False) -> bool:
    """Starts a supervisor for this plan; False if a living one has it already.

    again: also when an earlier one has ended; attempts are counted on. ConflictError if the folder is another plan's,
    or, without `again`, that of a run that is over. CapacityError if no process can be started.
    """
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _lock(folder, lock):
            _same_plan(folder, plan_text)
            return False
        if not again and (folder.record() or folder.exit()):
            raise ConflictError(
                f"{folder.path.name} was run here before and {folder.path} remembers it; choose another --run-id"
            )
        part = folder.plan.with_name("plan.json.part")
        part.write_bytes(plan_text.encode())
        part.replace(folder.plan)
        folder.clear()
        _spawn(folder, lock, secrets)
    finally:
        os.close(lock)
    return True


def _lock(folder: SupervisorFolder, lock: int) -> bool:
    """False if a supervisor has it, or a submission that is starting one."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while not _try_lock(lock, fcntl.LOCK_EX):
        record = folder.record()
        if (record and record.supervisor.alive and not folder.exit()) or time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_plan(folder: SupervisorFolder, plan_text: str) -> None:
    for _ in range(50):  # whoever holds the lock may be about to write it
        if folder.plan.exists():
            break
        time.sleep(0.1)
    if not folder.plan.exists() or folder.plan.read_bytes() != plan_text.encode():
        raise ConflictError(f"{folder.path.name} is taken by another job; choose another --run-id")


def _spawn(folder: SupervisorFolder, lock: int, secrets: Mapping[str, str]) -> None:
    """The process that is started forks and ends at once, so that the supervisor is no child of ours."""
    lines = "".join(f"{name}={json.dumps(value)}\n" for name, value in secrets.items())
    try:
        with folder.log.open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "launcher.supervisor", str(folder.path)],
                input=lines.encode(),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,
                cwd="/",
                check=True,
            )
    except OSError as error:
        raise CapacityError(f"no process could be started for {folder.path.name}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CapacityError(f"the supervisor of {folder.path.name} did not start: {_last_line(folder.log)}") from error


def main() -> int:
    folder = SupervisorFolder(Path(sys.argv[1]))
    secrets = sys.stdin.buffer.read()
    plan = json.loads(folder.plan.read_bytes())
    if os.fork():
        return 0
    adopt_orphans()
    supervision = _Supervision(folder, plan, secrets)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, supervision.on_signal)
    return supervision.run()


class _Supervision:
    """The loop of attempts. After a stop signal no further one is started.

    secrets: NAME=JSON string, one a line, as the runner reads them.
    """

    def __init__(self, folder: SupervisorFolder, plan: Mapping[str, Any], secrets: bytes) -> None:
        before = folder.record()
        self._folder = folder
        self._plan = plan
        self._secrets = secrets
        self._me = ProcessId.of()
        self._started = before.started if before else time.time()
        self._number = before.attempt + 1 if before else 1
        self._asked = False
        self._runner: subprocess.Popen[bytes] | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Passes the first one on to the runner and sets the clock for its end."""
        if self._asked:
            return
        self._asked = True
        signal.signal(signal.SIGALRM, lambda *_: send_kill(os.getpid()))
        signal.setitimer(signal.ITIMER_REAL, self._plan["limits"]["grace_s"] + _KILL_AFTER_GRACE_S, 1.0)
        if self._runner is not None:
            self._runner.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """The exit code. Whatever goes wrong here, nothing is left running that nobody knows of."""
        try:
            return self._run()
        except Exception as error:  # a full disk, a bug
            kill_descendants(os.getpid())
            reason = f"its supervisor failed: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                self._folder.write_exit(code=1, attempt=self._number, state="FAILED", reason=reason)
            with contextlib.suppress(OSError):
                traceback.print_exc()
            return 1

    def _run(self) -> int:
        while True:
            with gpus.reserved(self._plan["limits"]["gpus"], paths.data_folder() / "gpus") as reserved:
                code = self._attempt([gpu.device for gpu in reserved])
            again = code == contract.EXIT_PREEMPTED and self._number < self._plan["limits"]["attempts"]
            if not again or self._asked or self._folder.cancelled:
                break
            self._number += 1
            self._record(None, "restarting")
        self._folder.write_exit(code=code, attempt=self._number, **self._end(code))
        return code

    def _attempt(self, devices: Sequence[str]) -> int:
        argv, environ = self._plan["argv"], self._environment(devices)
        self._folder.notice.unlink(missing_ok=True)
        try:
            self._runner = subprocess.Popen(
                argv,
                env=environ,
                cwd=self._plan["cwd"],
                stdin=subprocess.PIPE if self._secrets else subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            sys.stdout.write(f"{argv[0]} can't be started: {error.strerror}\n")
            sys.stdout.flush()
            return contract.EXIT_BAD_CONFIG
        self._record(ProcessId.of(self._runner.pid), "running")
        if self._asked:  # the stop came between two attempts, or while this one was being started
            self._runner.send_signal(signal.SIGTERM)
        self._hand_secrets(self._runner)
        code = self._runner.wait()
        kill_descendants(os.getpid())
        return exit_code(code)

    def _hand_secrets(self, runner: subprocess.Popen[bytes]) -> None:
        if runner.stdin is not None:
            with contextlib.suppress(BrokenPipeError), runner.stdin as pipe:  # it may end before it asks for them
                pipe.write(self._secrets)

    def _environment(self, devices: Sequence[str]) -> dict[str, str]:
        """The user's, the plan's, and what only a start can know."""
        job = self._folder.path / "job.json"
        job.write_bytes(contract.canonical_json(self._plan["job"]) + b"\n")
        python_folder = str(Path(self._plan["argv"][0]).parent)  # so that `python` in a command is the target's
        environ = {
            **os.environ,
            **self._plan["env"],
            "PATH": os.pathsep.join([python_folder, os.environ.get("PATH", os.defpath)]),
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            "CVLAUNCH_JOB": str(job),
            "CVLAUNCH_NATIVE_ID": _native_id(self._me),
            "CVLAUNCH_ATTEMPT": str(self._number),
            "CVLAUNCH_NOTICE": str(self._folder.notice),
        }
        return {**environ, "CVLAUNCH_SECRETS_FILE": "-"} if self._secrets else environ

    def _record(self, runner: ProcessId | None, phase: str) -> None:
        self._folder.write_record(Record(self._me, runner, self._number, phase, self._started))

    def _end(self, code: int) -> dict[str, object]:
        """The runner's own account of the end; without one, what is known here."""
        if account := self._folder.account(self._number, _native_id(self._me)):
            return {"state": account.get("state"), "reason": account.get("reason") or ""}
        if self._folder.cancelled:
            return {"state": "CANCELLED", "reason": "cancelled"}
        return {"state": None, "reason": self._guess(code)}

    def _guess(self, code: int) -> str:
        """Without a word of the runner."""
        if code > _SIGNALLED:
            return f"the runner was killed by signal {code - _SIGNALLED} ({signal.strsignal(code - _SIGNALLED)})"
        return _last_line(self._folder.log) if code else ""


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:1024] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
