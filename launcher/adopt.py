"""Runs that somebody else has sent: a script by hand, a manifest by another tool, a colleague's."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.backends.base import Adopts, Elsewhere, Output
from launcher.contract import WEIGHTS_CHANNEL, JobFile
from launcher.digest import text_digest
from launcher.errors import ConflictError, UnsupportedError
from launcher.ledger import Ledger, RunRecord, new_run_id
from launcher.spec import JobSpec
from launcher.status import State
from launcher.stores import join_uri, path_of, scheme
from launcher.targets import Selected

__all__ = ["adopt"]


def adopt(name: str, selected: Selected, *, ledger: Ledger) -> RunRecord:
    """Enters a job that the platform knows into the ledger. name: its run id, or the platform's own id.

    What was entered before is returned as it is. SpecError if there is no such job, or none that can be taken in;
    ConflictError if the ledger has another run of this id.
    """
    backend = selected.open()
    if not isinstance(backend, Adopts):
        raise UnsupportedError(
            f"the {backend.name} backend has no jobs that another machine has sent; see: cvlaunch runs"
        )
    found = backend.adopt(name)
    job = found.job
    if found.elsewhere:
        job = dataclasses.replace(job, run_id=_run_id(job.name, found.elsewhere))
    if job.run_id in ledger:
        known = ledger.get(job.run_id)
        if known.handle == str(found.handle):
            return known
        raise ConflictError(f"there is a run {job.run_id!r} already ({known.handle}); forget it with: cvlaunch rm")
    output = _output(job.output, selected.target.reached_by)
    outputs = found.elsewhere.outputs if found.elsewhere else (Output(join_uri(output, job.run_id)),)
    record = RunRecord(
        run_id=job.run_id,
        name=job.name,
        created=found.elsewhere.created if found.elsewhere else time.time(),
        state=State.QUEUED,
        backend=backend.name,
        target_name=selected.name,
        target=selected.target.model_dump(mode="json"),
        output=output,
        owner={},
        plan={
            "text": found.text,
            "plan_sha": text_digest(found.text),
            "job_digest": job.job_digest,
            "files": [],
            "outputs": [dataclasses.asdict(output) for output in outputs],
            "notes": list(found.notes),
            "unpinned": list(_unpinned(job, elsewhere=found.elsewhere is not None)),
            "warnings": [],
        },
        job={
            "spec": {} if found.elsewhere else _spec(job, has_runner=found.has_runner).model_dump(mode="json"),
            "folder": str(Path.cwd()),
            "job_file": job.to_json(),
            "image": job.image,
        },
        handle=str(found.handle),
        tags=job.tags,
        attempt=found.attempt,
    )
    ledger.create(record)
    return record


def _run_id(name: str, job: Elsewhere) -> str:
    """The same for all who take it in, and sorted by the time when it was made."""
    number = int(hashlib.sha256(job.id.encode()).hexdigest(), 16)
    return new_run_id(name, now=job.created, randomness=number)


def _unpinned(job: JobFile, *, elsewhere: bool) -> Iterator[str]:
    yield from (f"data.{channel.name}: no manifest" for channel in job.channels if not channel.fingerprint)
    if job.image and not (job.image.get("digest") or job.image.get("config_digest")):
        yield f"image: {job.image['reference']} is not pinned"
    if elsewhere:
        yield "code: nobody knows what it ran"


def _output(written: str, reached_by: str | None) -> str:
    """As this machine reaches it: the job may have been rendered on the cluster, or behind another name of it."""
    if scheme(written) == "file":
        return f"{reached_by}{path_of(written)}" if reached_by else written
    if scheme(written) == "ssh":
        path = "/" + written.split("://", 1)[1].partition("/")[2]
        return f"{reached_by}{path}" if reached_by else f"file://{path}"
    return written


def _spec(job: JobFile, *, has_runner: bool) -> JobSpec:
    """The job as one would write it for this target, so that it can be sent again."""
    resources: dict[str, Any] = {
        "nodes": job.nodes,
        "gpus": job.gpus,
        "processes": job.processes,
        "timeout": job.timeout_s,
        "grace": job.grace_s,
    }
    data = {channel.name: _place(channel.uri) for channel in job.channels}
    train = {**job.train, "init": data.pop(WEIGHTS_CHANNEL, None)} if job.train else None
    return JobSpec.model_validate(
        {
            "name": job.name,
            "image": (job.image or {}).get("reference"),
            "runner": "auto" if has_runner else "none",
            "command": list(job.command) if job.command else None,
            "train": train,
            "env": dict(job.env),
            "secrets": dict(job.secrets),
            "code": {"root": ".", "requirements": job.code.requirements} if job.code else None,
            "data": data,
            "resources": {key: value for key, value in resources.items() if value is not None},
            "retries": job.retries,
            "max_attempts": job.max_attempts,
            "tags": dict(job.tags),
        }
    )


def _place(uri: str) -> str:
    return f"target:{path_of(uri)}" if scheme(uri) == "file" else uri
