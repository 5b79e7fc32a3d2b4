"""What a run is doing, in the same words for every platform."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["State", "Status"]


class State(StrEnum):
    """Waiting for hardware, admission or quota is QUEUED. An unknown word of a platform is UNKNOWN, never an end."""

    PREPARING = "PREPARING"
    SENDING = "SENDING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"
    FINALIZING = "FINALIZING"
    STOPPING = "STOPPING"
    UNKNOWN = "UNKNOWN"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    ERROR = "ERROR"
    LOST = "LOST"
    NOT_SUBMITTED = "NOT_SUBMITTED"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset(
    {
        State.SUCCEEDED,
        State.FAILED,
        State.CANCELLED,
        State.TIMED_OUT,
        State.ERROR,
        State.LOST,
        State.NOT_SUBMITTED,
    }
)


@dataclass(frozen=True)
class Status:
    """One look at a run.

    native: the platform's own word, kept beside ours. started, ended: Unix seconds. attempt: 1 is the first.
    """

    state: State
    native: str = ""
    reason: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    node: str = ""
    attempt: int = 1
