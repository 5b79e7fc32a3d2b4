"""One attempt of a supervised run: what starts, how it is asked to end, made to end, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launcher import contract
from launcher.process import ProcessId, exit_code, kill_descendants, send_kill

__all__ = ["SIGNALLED", "Attempt", "Ended", "Order", "ProcessAttempt", "hand_over", "last_line", "signal_words"]

SIGNALLED = 128
"""A process that signal n ended has the exit code 128 + n."""


@dataclass(frozen=True)
class Order:
    """What is to be started. folder: the supervisor's. plan: Plan.text, parsed. gpus: names of the devices it gets.

    native_id: what the runner is told as CVLAUNCH_NATIVE_ID. secrets: NAME=JSON string, one a line, as it reads them.
    """

    folder: Path
    plan: Mapping[str, Any]
    number: int
    native_id: str
    gpus: Sequence[str] = ()
    secrets: bytes = field(default=b"", repr=False)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "runner.log"

    @property
    def notice(self) -> Path:
        """In a folder of its own, which a container may write to."""
        return self.folder / "notice/notice.json"

    def write_job_file(self) -> Path:
        path = self.folder / "job.json"
        path.write_bytes(contract.canonical_json(self.plan["job"]) + b"\n")
        path.chmod(0o644)  # a container's user reads it; in front of others stands the folder
        return path

    def variables(self, *, job: str, notice: str) -> dict[str, str]:
        """What only a start can know, for the runner. job, notice: paths as it sees them."""
        variables = {
            "CVLAUNCH_JOB": job,
            "CVLAUNCH_NOTICE": notice,
            "CVLAUNCH_NATIVE_ID": self.native_id,
            "CVLAUNCH_ATTEMPT": str(self.number),
        }
        return {**variables, "CVLAUNCH_SECRETS_FILE": "-"} if self.secrets else variables


@dataclass(frozen=True)
class Ended:
    """What is known without the runner's own account.

    state: a word of result.json or ERROR, where the code alone doesn't say it. killed: why, if the kernel killed the
    command, which the runner may not know.
    """

    code: int
    reason: str = ""
    state: str | None = None
    killed: str = ""


class Attempt(Protocol):
    """Under way. `wait` may be called from another thread than the others."""

    @property
    def process(self) -> ProcessId: ...

    @property
    def engine(self) -> str:
        """That has the container; empty for a process."""
        ...

    @property
    def started(self) -> bool:
        """False while an image is still being fetched."""
        ...

    def wait(self) -> Ended: ...

    def ask_to_stop(self) -> None:
        """TERM, once, to the first process of the job."""
        ...

    def kill(self) -> None:
        """At once, with all that it started; may be repeated."""
        ...

    def remove(self) -> None:
        """What is left of it, when its end is written down."""
        ...


class ProcessAttempt:
    """The runner as a process of this machine. OSError if it can't be started."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._process = subprocess.Popen(
            order.plan["argv"],
            env=_environment(order),
            cwd=order.plan["cwd"],
            stdin=subprocess.PIPE if order.secrets else subprocess.DEVNULL,
            start_new_session=True,
        )
        self.process = ProcessId.of(self._process.pid)
        self.engine = ""
        self.started = True

    def wait(self) -> Ended:
        hand_over(self._process, self._order.secrets)
        code = exit_code(self._process.wait())
        kill_descendants(os.getpid())
        return Ended(code, signal_words("the runner", code) or (last_line(self._order.log) if code else ""))

    def ask_to_stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        send_kill(os.getpid())

    def remove(self) -> None:
        """Its processes are gone."""


def _environment(order: Order) -> dict[str, str]:
    """The user's, the plan's, and what only a start can know."""
    python_folder = str(Path(order.plan["argv"][0]).parent)  # so that `python` in a command is the target's
    return {
        **os.environ,
        **order.plan["env"],
        "PATH": os.pathsep.join([python_folder, os.environ.get("PATH", os.defpath)]),
        "CUDA_VISIBLE_DEVICES": ",".join(order.gpus),
        **order.variables(job=str(order.write_job_file()), notice=str(order.notice)),
    }


def hand_over(process: subprocess.Popen[bytes], secrets: bytes) -> None:
    """Through its standard input; it may end before it asks for them."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(secrets)


def signal_words(what: str, code: int) -> str:
    """Empty for a code that no signal gives."""
    number = code - SIGNALLED
    known = number in signal.valid_signals()
    return f"{what} was killed by signal {number} ({signal.strsignal(number)})" if known else ""


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:1024] if lines else ""
