"""Tells somebody that a watched run has ended: a command with the end as JSON on its input, a webhook with it as POST.

What goes wrong here is a warning and never changes how the run ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.backends.base import Notify

__all__ = ["End", "send_end"]

_COMMAND_LIMIT_S = 30.0
_WEBHOOK_LIMIT_S = 10.0


@dataclass(frozen=True)
class End:
    """What is told. started, ended: Unix seconds. metrics: full name → last value."""

    run_id: str
    name: str
    state: str
    reason: str
    exit_code: int | None
    backend: str
    target: str
    handle: str | None
    output: str
    started: float | None
    ended: float | None
    job_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """A value that is no finite number is null."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        facts = {**dataclasses.asdict(dataclasses.replace(self, metrics={})), "metrics": metrics}
        return json.dumps(facts, ensure_ascii=False, allow_nan=False).encode()


def send_end(notify: Notify, end: End) -> list[str]:
    """Does what the target asks for; a sentence for each thing that failed."""
    problems = [
        _run(notify.command, end.to_json()) if notify.command else None,
        _post(notify.webhook, end.to_json()) if notify.webhook else None,
    ]
    return [problem for problem in problems if problem]


def _run(command: Sequence[str], data: bytes) -> str | None:
    try:
        done = subprocess.run(
            list(command),
            input=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_COMMAND_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"notify.command {command[0]} was stopped after {_COMMAND_LIMIT_S:g} s"
    except OSError as error:
        return f"notify.command {command[0]} can't be started: {error.strerror}"
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"notify.command {command[0]} exited with {done.returncode}" + (f": {said[-1]}" if said else "")


def _post(url: str, data: bytes) -> str | None:
    """The message names the host only: such an address often holds its password."""
    host = urllib.parse.urlsplit(url).hostname
    request = urllib.request.Request(  # noqa: S310 the target's model takes http and https only
        url, data, {"Content-Type": "application/json", "User-Agent": "cvlaunch"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=_WEBHOOK_LIMIT_S):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"notify.webhook at {host} answered {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return f"notify.webhook at {host} was not reached: {getattr(error, 'reason', error)}"
