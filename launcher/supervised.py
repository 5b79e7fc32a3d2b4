"""What backends of this machine share: a supervisor's folder says how a run is doing, a process or a container."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from launcher.attempts import Ended
from launcher.backends.base import LogLine
from launcher.contract import EXIT_BAD_CONFIG, EXIT_CANCELLED, EXIT_PREEMPTED, Layout
from launcher.errors import SpecError
from launcher.logfiles import PRINTED, follow_logs, printed_lines
from launcher.process import ProcessId
from launcher.status import State, Status
from launcher.stores import open_store
from launcher.supervisor import Record, SupervisorFolder

__all__ = [
    "Leftovers",
    "absolute_folder",
    "cancel",
    "ended_state",
    "free_space",
    "is_alive",
    "is_known",
    "logs",
    "require_running",
    "send_signal",
    "status",
]

_WORDS = {
    "SUCCEEDED": State.SUCCEEDED,
    "FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED,
    "TIMED_OUT": State.TIMED_OUT,
    "PREEMPTED": State.FAILED,
    "ERROR": State.ERROR,
}
"""The runner's word in result.json or in its notice, and the supervisor's → ours. A preemption that nobody restarts is
a failure."""

_CODE_STATES = {0: State.SUCCEEDED, EXIT_CANCELLED: State.CANCELLED}
"""Exit code → state, where nobody left a word; any other is FAILED."""

_CODE_REASONS = {
    EXIT_BAD_CONFIG: "bad configuration",
    EXIT_PREEMPTED: "preempted with a checkpoint; nothing was left to restart it",
}

_PHASES = {"starting": State.STARTING, "restarting": State.RESTARTING}
_START_S = 5.0
"""How long a new supervisor has until its record says who it is."""


class Leftovers(Protocol):
    """What goes on, or has ended, without a supervisor."""

    def running(self) -> bool: ...

    def stop(self) -> None:
        """Asks it to end; what can't save anything any more is killed."""
        ...

    def end(self) -> Ended | None:
        """How it ended; None if nobody knows."""
        ...


def absolute_folder(value: str) -> str:
    """A target's key. ValueError for what depends on where one stands."""
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ValueError(f"expected an absolute path or one that starts with ~, found {value!r}")
    return str(path)


def free_space(folder: Path) -> int:
    """Bytes, where it is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_known(folder: SupervisorFolder) -> bool:
    """Exact: a submission holds the lock from before it starts the supervisor until the run has ended."""
    return bool(folder.record() or folder.exit() or folder.locked())


# -- state ------------------------------------------------------------------------------------------------------------


def status(folder: SupervisorFolder, left: Leftovers) -> Status:
    """left: is asked only where the supervisor is gone."""
    end = folder.exit()
    if end is None:
        if living := _living(folder, left):
            return living
        end = folder.exit()  # it may have come to its end meanwhile
    record = folder.record()
    if end is not None:
        return _ended(record, end)
    if record is None:
        return Status(State.LOST, native="gone", reason=f"no trace of it in {folder.path}")
    return _without_supervisor(folder, record, left)


def _living(folder: SupervisorFolder, left: Leftovers) -> Status | None:
    """None if nothing of it runs; UNKNOWN where that can't be seen from here."""
    record = folder.record()
    if record and not record.supervisor.here:
        return Status(State.UNKNOWN, native="elsewhere", reason=f"it runs on {record.supervisor.host}; ask there")
    if record and record.supervisor.alive:
        return _running(folder, record, record.phase)
    if folder.locked():  # a new supervisor has not written its record yet
        return Status(State.STARTING, native="starting")
    return _running(folder, record, "unsupervised") if left.running() else None


def _running(folder: SupervisorFolder, record: Record | None, native: str) -> Status:
    state = _PHASES.get(native, State.RUNNING)
    stopped = native != "restarting" and folder.root is not None and Layout(folder.root).stop.exists()
    if folder.cancelled or stopped:
        state = State.STOPPING
    if record is None:
        return Status(state, native)
    return Status(state, native, started=record.started, node=record.supervisor.host, attempt=record.attempt)


def _ended(record: Record | None, end: Mapping[str, object]) -> Status:
    code = int(str(end["code"]))
    return Status(
        ended_state(end.get("state"), code),
        native=f"exited {code}",
        reason=str(end.get("reason") or _CODE_REASONS.get(code, "")),
        exit_code=code,
        started=record.started if record else None,
        ended=float(str(end["ended"])),
        node=record.supervisor.host if record else "",
        attempt=int(str(end["attempt"])),
    )


def ended_state(word: object, code: int) -> State:
    """word: the runner's or the supervisor's, if it left one."""
    return _WORDS.get(str(word)) or _CODE_STATES.get(code, State.FAILED)


def _without_supervisor(folder: SupervisorFolder, record: Record, left: Leftovers) -> Status:
    """It was killed. The run may have gone on to its end; where nobody knows of that, it is lost."""
    lost = Status(State.LOST, "gone", started=record.started, node=record.supervisor.host, attempt=record.attempt)
    account = folder.account(record.attempt, record.native_id) or {}
    if account.get("state") in _WORDS:
        return dataclasses.replace(
            lost,
            state=_WORDS[str(account["state"])],
            native="unsupervised",
            reason=str(account.get("reason") or ""),
            exit_code=account.get("exit_code"),
            ended=account.get("ended"),
        )
    if folder.cancelled:
        return dataclasses.replace(lost, state=State.CANCELLED, reason="cancelled")
    restarted = record.supervisor.boot != ProcessId.of().boot
    end = None if restarted else left.end()
    if end is not None:
        state, reason = ended_state(end.state, end.code), end.reason or _CODE_REASONS.get(end.code, "")
        return dataclasses.replace(lost, state=state, native="unsupervised", reason=reason, exit_code=end.code)
    reason = (
        "the machine was restarted" if restarted else f"its supervisor (process {record.supervisor.pid}) was killed"
    )
    return dataclasses.replace(lost, reason=f"{reason}; go on with: cvlaunch submit --resume {folder.path.name}")


def require_running(run_id: str, status: Status) -> None:
    """SpecError if no command can run there now."""
    if status.state.terminal:
        raise SpecError(f"{run_id} is {status.state}; nothing runs there any more")
    if status.state not in (State.RUNNING, State.STOPPING):
        raise SpecError(f"{run_id} is {status.state}; try again when it is RUNNING")


# -- cancel -----------------------------------------------------------------------------------------------------------


def cancel(folder: SupervisorFolder, left: Leftovers) -> None:
    """Through the supervisor, which keeps the grace; without one, what is left is told directly."""
    if folder.exit() or not folder.path.is_dir():
        return
    folder.cancel()
    record = _record_once_started(folder)
    if record and is_alive(record.supervisor):
        send_signal(record.supervisor.pid, signal.SIGTERM)
    else:
        left.stop()


def is_alive(process: ProcessId) -> bool:
    return process.here and process.alive


def send_signal(pid: int, number: signal.Signals) -> None:
    """One that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _record_once_started(folder: SupervisorFolder) -> Record | None:
    deadline = time.monotonic() + _START_S
    while True:
        record = folder.record()
        known = record is not None and (record.supervisor.alive or not record.supervisor.here)
        if known or not folder.locked() or time.monotonic() > deadline:
            return record
        time.sleep(0.02)


# -- logs -------------------------------------------------------------------------------------------------------------


def logs(
    folder: SupervisorFolder, ended: Callable[[], bool], *, follow: bool, since: str, runner: bool = True
) -> Iterator[LogLine]:
    """The runner's log; what was printed, where it ended before it could write one, or where there is no runner."""
    if folder.root is None:
        return
    seen = False
    if runner and not since.startswith(PRINTED):
        until_end = ended if follow or ended() else None
        for line in follow_logs(open_store(str(folder.root)), ended=until_end, since=since):
            seen = True
            yield line
    if not runner or (not seen and (not since or since.startswith(PRINTED)) and ended()):
        yield from printed_lines(lambda: _bytes_of(folder.log), ended, follow=follow, since=since)


def _bytes_of(log: Path) -> bytes:
    return log.read_bytes() if log.exists() else b""
