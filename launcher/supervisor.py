"""Stays with a run on this machine after the CLI has gone: restarts, ends and remembers it.

`python -m launcher.supervisor FOLDER` reads `FOLDER/plan.json` (Plan.text), which says whether a process or a container
runs, and leaves in FOLDER

    supervisor.json   who supervises and runs, which attempt     exit.json     how it ended
    lock              held as long as it runs                    runner.log    what the runner printed
    job.json          what the runner reads                      notice/       why the runner started nothing
    cancelled         put there to cancel: nothing starts again  container.id  of the newest container

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
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from launcher import contract, gpus, paths
from launcher.attempts import Attempt, Ended, Order, ProcessAttempt, last_line
from launcher.containers import ContainerAttempt, container_root, known_id, run_engine
from launcher.contract import read_json
from launcher.errors import CapacityError, ConflictError, CvlaunchError
from launcher.process import ProcessId, adopt_orphans
from launcher.secretfiles import secret_lines

__all__ = ["Record", "SupervisorFolder", "start"]

_KILL_AFTER_GRACE_S = 15.0
"""The runner keeps the grace itself; later than this it is stuck."""
_AGAIN_S = 1.0
"""Between two kills of something that is still there."""
_END_S = 30.0
"""How long a supervisor that fails goes on killing."""
_LOOK_S = 0.1
"""How often it is seen whether a container has been made; after that nothing is polled."""
_KILLED = 137

_LOCK_PATIENCE_S = 30.0
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
        return self.path / "notice/notice.json"

    def read_plan(self) -> Mapping[str, Any]:
        """Empty if there is none."""
        return read_json(self.plan) or {}

    @property
    def root(self) -> Path | None:
        """Where the job's folders stand on this machine; None if there is no plan, or the job has none here."""
        plan = self.read_plan()
        if plan.get("image"):
            return container_root(plan)
        root = plan.get("env", {}).get("CVLAUNCH_ROOT")
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
    """supervisor.json. phase: starting, running or restarting. started: Unix seconds of the first attempt, resumed or
    not. runner: or the client that started the container. engine: that has the container; empty for a process."""

    supervisor: ProcessId
    runner: ProcessId | None
    attempt: int
    phase: str
    started: float
    engine: str = ""

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
        attempt, phase, started = int(value["attempt"]), str(value["phase"]), float(value["started"])
        return cls(supervisor, runner, attempt, phase, started, str(value.get("engine", "")))


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
    try:
        with folder.log.open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "launcher.supervisor", str(folder.path)],
                input=secret_lines(secrets),
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
        raise CapacityError(f"the supervisor of {folder.path.name} did not start: {last_line(folder.log)}") from error


def main() -> int:
    folder = SupervisorFolder(Path(sys.argv[1]))
    secrets = sys.stdin.buffer.read()
    plan = json.loads(folder.plan.read_bytes())
    if os.fork():
        return 0
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
        self._began = time.monotonic()
        self._asked_at: float | None = None
        self._timed_out = False
        self._events: SimpleQueue[Ended | Exception | None] = SimpleQueue()
        self._attempt: Attempt | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first one counts. It wakes the loop, which passes it on."""
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._events.put(None)

    def run(self) -> int:
        """The exit code. Whatever goes wrong here, nothing is left running that nobody knows of."""
        try:
            return self._run()
        except CvlaunchError as error:  # of the engine
            sys.stdout.write(f"{error}\n")
            sys.stdout.flush()
            if self._attempt is None:  # else the container may go on without us
                self._folder.write_exit(code=1, attempt=self._number, state="ERROR", reason=str(error))
        except Exception as error:  # a full disk, a bug
            self._end_attempt()
            reason = f"its supervisor failed: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                self._folder.write_exit(code=1, attempt=self._number, state="FAILED", reason=reason)
            with contextlib.suppress(OSError):
                traceback.print_exc()
        return 1

    def _run(self) -> int:
        self._clear_away()
        while True:
            with gpus.reserved(self._plan["limits"]["gpus"], paths.data_folder() / "gpus") as reserved:
                ended = self._run_once(reserved)
            again = ended.code == contract.EXIT_PREEMPTED and self._number < self._plan["limits"]["attempts"]
            if not again or self._asked_at is not None or self._folder.cancelled:
                break
            self._number += 1
            self._record("restarting")
            self._remove()
        self._folder.write_exit(code=ended.code, attempt=self._number, **self._end(ended))
        self._remove()
        return ended.code

    def _end_attempt(self) -> None:
        """A client that is killed may have made a container before, so that one look is not enough."""
        deadline = time.monotonic() + _END_S
        while self._attempt and time.monotonic() < deadline:
            self._attempt.kill()
            with contextlib.suppress(Empty):
                if self._events.get(timeout=_AGAIN_S) is not None:
                    break
        self._remove()

    def _clear_away(self) -> None:
        """The container that an earlier supervisor of this folder has left; for processes, become their parent."""
        if not self._plan.get("image"):
            adopt_orphans()
        elif left := known_id(self._folder.path):
            run_engine(self._plan).remove(left)

    def _remove(self) -> None:
        if self._attempt:
            self._attempt.remove()

    def _run_once(self, reserved: Sequence[gpus.Gpu]) -> Ended:
        self._folder.notice.unlink(missing_ok=True)
        devices = _device_names(reserved, container=bool(self._plan.get("image")))
        self._attempt = None
        order = Order(self._folder.path, self._plan, self._number, _native_id(self._me), devices, self._secrets)
        try:
            self._attempt = ContainerAttempt(order) if self._plan.get("image") else ProcessAttempt(order)
        except OSError as error:
            reason = f"{error.filename or self._plan['argv'][0]} can't be started: {error.strerror}"
            sys.stdout.write(reason + "\n")
            sys.stdout.flush()
            return Ended(contract.EXIT_BAD_CONFIG, reason)
        threading.Thread(target=self._wait, args=(self._attempt,), daemon=True).start()
        self._record("running" if self._attempt.started else "starting")
        if self._folder.cancelled:  # before there was a record by which we can be told
            self._ask_to_stop()
        return self._follow(self._attempt)

    def _wait(self, attempt: Attempt) -> None:
        try:
            self._events.put(attempt.wait())
        except Exception as error:
            self._events.put(error)

    def _follow(self, attempt: Attempt) -> Ended:
        """Until it has ended: by itself, asked to, or killed."""
        told, starting = False, not attempt.started
        while True:
            if self._asked_at is not None and not told:
                told = True
                threading.Thread(target=attempt.ask_to_stop, daemon=True).start()
            event = self._next_event(starting)
            if isinstance(event, Ended):
                return event
            if isinstance(event, Exception):
                raise event
            if starting and attempt.started:
                starting = False
                self._record("running")
            if (left := self._left()) is not None and left <= 0:
                self._time_is_up(attempt)

    def _next_event(self, starting: bool) -> Ended | Exception | None:
        """None: there is something else to do."""
        left = self._left()
        pause = None if left is None else max(left, _AGAIN_S)
        try:
            return self._events.get(timeout=_LOOK_S if starting else pause)
        except Empty:
            return None

    def _left(self) -> float | None:
        """Seconds until something must be done; None if nothing."""
        limits = self._plan["limits"]
        if self._asked_at is not None:
            return float(self._asked_at + limits["grace_s"] + _KILL_AFTER_GRACE_S - time.monotonic())
        timeout = limits.get("timeout_s")
        return None if timeout is None else float(self._began + timeout - time.monotonic())

    def _time_is_up(self, attempt: Attempt) -> None:
        if self._asked_at is not None:
            attempt.kill()
        else:
            self._timed_out, self._asked_at = True, time.monotonic()

    def _record(self, phase: str) -> None:
        engine = self._attempt.engine if self._attempt else ""
        runner = self._attempt.process if self._attempt and phase != "restarting" else None
        self._folder.write_record(Record(self._me, runner, self._number, phase, self._started, engine))

    def _end(self, ended: Ended) -> dict[str, object]:
        """The runner's own account of the end; without one, what is known here."""
        if account := self._folder.account(self._number, _native_id(self._me)):
            killed = ended.killed if account.get("exit_code") == _KILLED else ""
            return {"state": account.get("state"), "reason": killed or account.get("reason") or ""}
        if self._timed_out:
            return {"state": "TIMED_OUT", "reason": "the timeout (resources.timeout) is used up"}
        if self._folder.cancelled:
            return {"state": "CANCELLED", "reason": "cancelled"}
        return {"state": ended.state, "reason": ended.reason}


def _device_names(reserved: Sequence[gpus.Gpu], *, container: bool) -> list[str]:
    """CUDA takes the user's own numbers; an engine counts by itself, and UUIDs are the same for all."""
    return [gpu.uuid if container and gpu.uuid.startswith(("GPU-", "MIG-")) else gpu.device for gpu in reserved]


if __name__ == "__main__":
    sys.exit(main())
