"""How a run ended: exit code, state, reason, and the files that say so."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from launcher import contract
from launcher.contract import (
    EXIT_BAD_CONFIG,
    EXIT_CANCELLED,
    EXIT_DONE,
    EXIT_LOST,
    EXIT_PREEMPTED,
    Layout,
    write_json,
)
from launcher.quantities import format_duration
from launcher.runner.loaders import shm_reason
from launcher.runner.stop import Reason

__all__ = [
    "End",
    "Outcome",
    "Result",
    "Word",
    "complete_checkpoints",
    "exit_code_of",
    "judge",
    "last_metrics",
    "leave_word",
    "read_exit_file",
    "write_failure",
]

_FAILURE_LENGTH = 1024
_LONGEST_WORD = 4000
"""Bytes; Kubernetes keeps 4,096 of a container's last message."""


class Word(StrEnum):
    """`state` in result.json."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    PREEMPTED = "PREEMPTED"


@dataclass(frozen=True)
class Outcome:
    state: Word
    exit_code: int
    reason: str = ""


@dataclass(frozen=True)
class End:
    """How the command ended. left: what rank 0 left in exit.json (code, reason), which wins over the process's code.

    saved: whether a complete checkpoint is newer than the start of the runner. last_lines: what it printed at last.
    """

    code: int
    left: tuple[int, str] | None = None
    saved: bool = False
    last_lines: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        return self.left[0] if self.left else self.code

    @property
    def reason(self) -> str:
        given = self.left[1] if self.left else ""
        lines = (line for text in (given, *self.last_lines) for line in text.splitlines())
        return shm_reason(self.exit_code, lines) or given or _reason_of_code(self.exit_code)


@dataclass(frozen=True)
class Result:
    """result.json. started, ended: Unix seconds. upload: complete, incomplete or in_place.

    native_id: the platform's own name of this job, as it gave it to the runner; empty if it gave none.
    """

    run_id: str
    native_id: str
    state: Word
    exit_code: int
    reason: str
    attempt: int
    restarts: int
    started: float
    ended: float
    upload: str
    metrics: Mapping[str, float | None]
    contract: int = contract.CONTRACT

    def write(self, layout: Layout) -> None:
        write_json(layout.root / contract.RESULT, asdict(self))


def judge(end: End, stop: Reason | None, *, timeout_s: float | None) -> Outcome:
    """A cancel mark wins over everything; a command that is done is done; then comes the reason of the stop."""
    code = end.exit_code
    if stop is Reason.CANCELLED:
        return Outcome(Word.CANCELLED, EXIT_CANCELLED, "cancelled")
    if code == EXIT_BAD_CONFIG:
        return Outcome(Word.FAILED, code, end.reason)
    if stop is Reason.TIMEOUT and not (end.left and code == EXIT_DONE):
        limit = format_duration(timeout_s) if timeout_s else "unlimited"
        return Outcome(Word.TIMED_OUT, 1, f"the timeout of {limit} is used up")
    if stop is Reason.PREEMPTED:
        return _judge_preempted(end)
    if code == EXIT_DONE:
        return Outcome(Word.SUCCEEDED, code)
    if code == EXIT_PREEMPTED:
        return Outcome(Word.PREEMPTED, code, end.reason)
    return Outcome(Word.FAILED, code, end.reason)


def _judge_preempted(end: End) -> Outcome:
    code = end.exit_code
    if end.left and code == EXIT_DONE:
        return Outcome(Word.SUCCEEDED, code)
    if code == EXIT_PREEMPTED or end.saved:
        return Outcome(Word.PREEMPTED, EXIT_PREEMPTED, "preempted with a checkpoint")
    if code == EXIT_DONE:
        return Outcome(Word.SUCCEEDED, code)
    return Outcome(Word.PREEMPTED, code, f"preempted before a checkpoint; {end.reason}")


def exit_code_of(outcome: Outcome, environ: Mapping[str, str]) -> int:
    """The runner's own. Where a platform keeps our last word ($CVLAUNCH_TERMINATION), that has the command's code, and
    the platform's rules see only ours: 75 to be started again, and never what it says itself of a lost container."""
    if not environ.get("CVLAUNCH_TERMINATION"):
        return outcome.exit_code
    if outcome.state is Word.PREEMPTED:
        return EXIT_PREEMPTED
    return 1 if outcome.exit_code == EXIT_LOST else outcome.exit_code


def _reason_of_code(code: int) -> str:
    if code > 128:
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            return f"exit code {code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return {EXIT_BAD_CONFIG: "bad configuration (exit code 64)", EXIT_PREEMPTED: "preempted with a checkpoint"}.get(
        code, f"exit code {code}"
    )


def read_exit_file(path: Path, *, since: float = 0.0) -> tuple[int, str] | None:
    """What rank 0 left after `since` (Unix seconds); None if there is nothing, or nothing that can be read."""
    try:
        if path.stat().st_mtime < since:
            return None
        content = json.loads(path.read_text())
        code, reason = content["code"], content.get("reason") or ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (code, str(reason)) if isinstance(code, int) and 0 <= code <= 255 else None


def complete_checkpoints(checkpoints: Path) -> frozenset[tuple[str, int]]:
    """(step, time of completion) of each; compared with an earlier look, because clocks of file servers differ."""
    found = set()
    for path in checkpoints.glob(f"*/{contract.COMPLETE}"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.add((path.parent.name, path.stat().st_mtime_ns))
    return frozenset(found)


def last_metrics(path: Path) -> dict[str, float | None]:
    """`split/name` → last value, None for what is no finite number; empty without the file."""
    import math

    from launcher.metrics import Metrics

    try:
        values = Metrics.from_file(path).summary()
    except OSError:
        return {}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def leave_word(environ: Mapping[str, str], state: str, code: int, reason: str, *, attempt: int | None = None) -> None:
    """How it ended, as a line of JSON in the file that the platform shows: $CVLAUNCH_TERMINATION."""
    path = environ.get("CVLAUNCH_TERMINATION")
    if not path:
        return
    content = {"state": state, "exit_code": code, "reason": reason[:_FAILURE_LENGTH], "attempt": attempt}
    while len(line := json.dumps(content)) > _LONGEST_WORD:
        content["reason"] = str(content["reason"])[: len(str(content["reason"])) // 2]
    with contextlib.suppress(OSError):
        Path(path).write_text(line + "\n", encoding="ascii")


def write_failure(path: Path, reason: str, last_lines: Sequence[str]) -> None:
    """The reason and as many of the last lines as fit; SageMaker shows the first 1024 characters."""
    text = reason[:_FAILURE_LENGTH]
    chosen: list[str] = []
    left = _FAILURE_LENGTH - len(text)
    for line in reversed(last_lines):
        if left < len(line) + 1:
            break
        left -= len(line) + 1
        chosen.insert(0, line)
    if not chosen and last_lines and left > 1:
        chosen = [last_lines[-1][-(left - 1) :]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([text, *chosen]))
