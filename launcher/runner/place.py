"""Entering a run: folders, the output store, `started.json`, the cancel mark, the claim. No data is fetched before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher import contract
from launcher._version import __version__
from launcher.contract import (
    CANCEL,
    EXIT_CANCELLED,
    EXIT_DONE,
    JOB,
    STARTED,
    JobFile,
    Layout,
    canonical_json,
    write_json,
)
from launcher.errors import SpecError
from launcher.runner.claim import COUNTED, COUNTS, Owner, claim, owner_here
from launcher.runner.job import JobSource
from launcher.runner.logs import RunLog
from launcher.runner.ranks import Ranks, find_ranks
from launcher.runner.root import choose_root, make_folders, run_folder
from launcher.stores import StorageOptions, Store, copy_into_place, open_store, path_of, scheme

__all__ = ["NothingToRun", "Place", "enter", "find_place"]


@dataclass(frozen=True)
class Place:
    """layout: what the command sees. home: where this node's own files stand. where: their prefix in the store.

    code: the archive that the platform mounted; None: it is in the store.
    """

    job: JobFile
    layout: Layout
    home: Layout
    store: Store
    ranks: Ranks
    where: str
    code: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this is node 0, which owns the run's files."""
        return self.ranks.node_rank == 0


class NothingToRun(Exception):  # noqa: N818 - no error
    """Another submission runs this run (ERROR), or it is CANCELLED: the word for whoever started the runner.

    The exit code of a doubled submission is 0, so that no platform starts it again.
    """

    def __init__(self, state: str, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.state = state
        self.exit_code = exit_code


def find_place(source: JobSource, environ: Mapping[str, str], log: RunLog) -> Place:
    """SpecError or AuthError if the output can't be written, naming the permission."""
    job = _within_grace_given(source.job, environ)
    layout, remark = choose_root(job, environ)
    if remark:
        log.say(remark)
    store = open_store(run_folder(job, layout), StorageOptions.from_mapping(job.storage))
    store.check_writable()
    ranks = find_ranks(job.nodes, environ, layout.root)
    where = f"nodes/{ranks.node_rank}/" if ranks.node_rank else ""
    return Place(job, layout, Layout(layout.root / where), store, ranks, where, _mounted_code(source))


def _mounted_code(source: JobSource) -> Path | None:
    """Where no store is reached, the run's `input/` is mounted, with config/job.json and code.tar.gz."""
    if source.job.movers.get("output") != "platform" or scheme(source.place) != "file":
        return None
    return path_of(source.place).absolute().parent.parent / Path(contract.CODE).name


def _within_grace_given(job: JobFile, environ: Mapping[str, str]) -> JobFile:
    """With no more grace than the platform gives ($CVLAUNCH_GRACE, in seconds), whatever the job asks for."""
    text = environ.get("CVLAUNCH_GRACE") or "inf"
    try:
        given = float(text)
    except ValueError:
        given = -1.0
    if not given > 0:
        raise SpecError(f"CVLAUNCH_GRACE is {text!r}; expected seconds")
    return replace(job, grace_s=min(job.grace_s, given))


def enter(place: Place, data: bytes, environ: Mapping[str, str]) -> Owner:
    """Who runs this run: us. NothingToRun if it is cancelled or another's. data: the bytes of job.json."""
    try:
        return _enter(place, data, environ)
    except NothingToRun as reason:
        _leave_notice(environ, reason)
        raise


def _enter(place: Place, data: bytes, environ: Mapping[str, str]) -> Owner:
    me = _owner_here(place.job, environ)
    facts = {"contract": contract.CONTRACT, "cvlaunch": __version__, "root": str(place.layout.root), **asdict(me)}
    with contextlib.suppress(FileExistsError):  # of an earlier attempt
        place.store.write(place.where + STARTED, canonical_json(facts) + b"\n", if_absent=True)
    if place.store.head(CANCEL) is not None:
        raise NothingToRun("CANCELLED", f"{me.run_id} is cancelled; nothing is started", exit_code=EXIT_CANCELLED)
    owner = _claim(place, me, environ)
    if owner is None:
        message = f"another submission runs this run: {me.run_id} was submitted twice; nothing is started"
        raise NothingToRun("ERROR", message, exit_code=EXIT_DONE)
    if owner.attempt > place.job.max_attempts:
        raise SpecError(f"attempt {owner.attempt} is more than max_attempts, {place.job.max_attempts}")
    make_folders(place.layout)
    _keep_job_file(place, data)
    return owner


def _claim(place: Place, me: Owner, environ: Mapping[str, str]) -> Owner | None:
    if not place.first and any(name in environ for name in COUNTED):
        return me
    return claim(place.store, me, counted="CVLAUNCH_ATTEMPT" in environ, where=place.where)


def _keep_job_file(place: Place, data: bytes) -> None:
    """Where the command reads it, and with the results."""
    if not place.layout.job.exists() or place.layout.job.read_bytes() != data:
        with copy_into_place(place.layout.job) as file:  # another node may be reading it
            file.write(data)
    if place.first:
        with contextlib.suppress(FileExistsError):  # in place, of an earlier attempt, or stored by the client
            place.store.write(JOB, data, if_absent=True)


def _leave_notice(environ: Mapping[str, str], reason: NothingToRun) -> None:
    """For whoever asks for it by $CVLAUNCH_NOTICE: result.json, if there is one, is another submission's."""
    if path := environ.get("CVLAUNCH_NOTICE"):
        write_json(Path(path), {"state": reason.state, "reason": str(reason)})


def _owner_here(job: JobFile, environ: Mapping[str, str]) -> Owner:
    try:
        return owner_here(job.run_id, job.job_digest, environ, now=time.time())
    except ValueError as error:
        name = next(n for n in COUNTS if not environ.get(n, "1").isdecimal())
        raise SpecError(f"{name} is {environ[name]!r}; expected a number") from error
