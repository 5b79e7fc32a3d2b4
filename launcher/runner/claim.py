"""Who runs this run: the file `owner`, put if absent, makes a doubled submission harmless."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.contract import OWNER, canonical_json
from launcher.stores import Store

__all__ = ["Owner", "claim", "owner_here"]

_NATIVE_IDS = ("CVLAUNCH_NATIVE_ID", "SLURM_JOB_ID", "CLOUD_ML_JOB_ID", "TRAINING_JOB_ARN")
"""The platform's own name of this job; the same when the platform starts it again."""


@dataclass(frozen=True)
class Owner:
    """time: Unix seconds."""

    run_id: str
    native_id: str
    attempt: int
    host: str
    pid: int
    time: float

    def to_bytes(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def owner_here(run_id: str, environ: Mapping[str, str], now: float) -> Owner:
    native_id = next((environ[name] for name in _NATIVE_IDS if environ.get(name)), "")
    attempt = int(environ.get("CVLAUNCH_ATTEMPT") or 1)
    return Owner(run_id, native_id, attempt, socket.gethostname(), os.getpid(), now)


def claim(store: Store, me: Owner, *, counted: bool) -> Owner | None:
    """The owner that we now are, None if another submission runs this run.

    counted: our attempt was given; otherwise a platform that starts the same job again gets the next number.
    """
    with contextlib.suppress(FileExistsError):
        store.write(OWNER, me.to_bytes(), if_absent=True)
        return me
    other = _read(store)
    same_job = bool(me.native_id) and other.get("native_id") == me.native_id
    earlier = _attempt(other) < me.attempt
    if other and not same_job and not earlier:
        return None
    if same_job and not counted:
        me = replace(me, attempt=_attempt(other) + 1)
    store.write(OWNER, me.to_bytes())
    return me


def _read(store: Store) -> Mapping[str, Any]:
    """Empty if it can't be read: what nobody can read, nobody owns."""
    try:
        owner = json.loads(store.read(OWNER))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _attempt(owner: Mapping[str, Any]) -> int:
    attempt = owner.get("attempt")
    return attempt if isinstance(attempt, int) else 0
