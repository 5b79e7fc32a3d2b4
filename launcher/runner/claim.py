"""Who runs this run. A claim, put if absent for each attempt, makes a doubled submission harmless.

owner-1   owner-2   …   who has that attempt, never overwritten     owner   the newest of them, to be read
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.contract import OWNER, canonical_json
from launcher.errors import SpecError
from launcher.stores import Store

__all__ = ["COUNTED", "COUNTS", "Owner", "claim", "native_id_of", "owner_here"]

_NATIVE_IDS = ("CVLAUNCH_NATIVE_ID", "SLURM_JOB_ID", "CLOUD_ML_JOB_ID", "TRAINING_JOB_ARN")
"""The platform's own name of this job; the same when the platform starts it again."""

COUNTS = ("CVLAUNCH_ATTEMPT", "CVLAUNCH_SUBMISSION", "SLURM_RESTART_COUNT")
"""Variables that hold numbers: the attempt from 1, the submission from 1, SLURM's own restarts from 0."""

COUNTED = ("CVLAUNCH_ATTEMPT", "SLURM_RESTART_COUNT")
"""Those that give all nodes of a job the same attempt; without one each node counts its own."""

_BEING_WRITTEN_S = 2.0
"""A folder without hard links shows a claim before all of it is written."""


@dataclass(frozen=True)
class Owner:
    """time: Unix seconds. submission: 1 for the first time that the run was sent, one more for each `--resume`."""

    run_id: str
    job_digest: str
    native_id: str
    attempt: int
    host: str
    pid: int
    time: float
    submission: int = 1

    def to_bytes(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def native_id_of(environ: Mapping[str, str]) -> str:
    """Empty where no platform names its jobs."""
    return next((environ[name] for name in _NATIVE_IDS if environ.get(name)), "")


def owner_here(run_id: str, job_digest: str, environ: Mapping[str, str], *, now: float) -> Owner:
    given, submission, restarts = (int(environ.get(name) or 0) for name in COUNTS)
    attempt, submission = given or restarts + 1, submission or 1
    return Owner(run_id, job_digest, native_id_of(environ), attempt, socket.gethostname(), os.getpid(), now, submission)


def claim(store: Store, me: Owner, *, counted: bool, where: str = "") -> Owner | None:
    """The owner that we now are, None if another submission runs this run. SpecError if it is another job's folder.

    where: prefix in the store, for a node that keeps its own account.
    counted: our attempt was given; otherwise a platform that starts the same job again gets the next number, and so
    does a job that was sent later on purpose.
    """
    newest = _read(store, where + OWNER)
    _same_job(store, me, newest)
    ours = _same_submission(me, newest) or me.submission > _number(newest, "submission", 1)
    if ours and not counted:
        me = replace(me, attempt=_attempt(newest) + 1)
    elif not ours and newest and (not counted or _attempt(newest) > me.attempt):
        return None
    try:
        store.write(f"{where}{OWNER}-{me.attempt}", me.to_bytes(), if_absent=True)
    except FileExistsError:
        holder = _holder(store, f"{where}{OWNER}-{me.attempt}")
        _same_job(store, me, holder)
        if not _same_submission(me, holder):
            return None
    store.write(where + OWNER, me.to_bytes())
    return me


def _same_job(store: Store, me: Owner, other: Mapping[str, Any]) -> None:
    digest = other.get("job_digest") or me.job_digest
    if digest != me.job_digest:
        raise SpecError(
            f"{store.uri} belongs to another job of the same name (digest {str(digest)[:12]}, ours is "
            f"{me.job_digest[:12]}); choose another --run-id, or remove that run"
        )


def _same_submission(me: Owner, other: Mapping[str, Any]) -> bool:
    return bool(me.native_id) and other.get("native_id") == me.native_id


def _holder(store: Store, path: str) -> Mapping[str, Any]:
    """Empty if it can't be read: somebody's it is all the same."""
    deadline = time.monotonic() + _BEING_WRITTEN_S
    while not (holder := _read(store, path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder


def _read(store: Store, path: str) -> Mapping[str, Any]:
    """Empty if it is not there, or can't be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        owner = json.loads(store.read(path))
        return owner if isinstance(owner, dict) else {}
    return {}


def _attempt(owner: Mapping[str, Any]) -> int:
    return _number(owner, "attempt", 0)


def _number(owner: Mapping[str, Any], key: str, default: int) -> int:
    value = owner.get(key)
    return value if isinstance(value, int) else default
