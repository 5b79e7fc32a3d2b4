"""Submitting exactly once, and finding out what became of a submission that was cut off.

1 run file PREPARING   2 Plan.files into the output store   3 SENDING   4 the call   5 the handle.
A crash before 3: not submitted. In 3 to 5: in doubt, and `reconcile` asks the platform. Nothing is sent again while in
doubt; should a job be sent twice all the same, the runner's claim of `owner` makes the second one harmless.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets as random_source
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher import manifest
from launcher.backends import load_backend
from launcher.backends.base import Backend, Handle, Job, Output, Plan
from launcher.contract import HEARTBEAT, MIRROR
from launcher.dataset import check_channel
from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
)
from launcher.jobfile import load_job
from launcher.ledger import Ledger, RunRecord, new_run_id, valid_run_id
from launcher.plan import job_file, load_template, make_plan
from launcher.process import ProcessId
from launcher.quantities import format_duration
from launcher.resolve import resolve
from launcher.secretfiles import require_private
from launcher.spec import JobSpec
from launcher.status import State
from launcher.stores import PlacesStore, Store, is_uri, join_uri, open_store
from launcher.targets import Selected, Targets, load_targets

__all__ = [
    "REFUSALS",
    "OpenBackends",
    "Prepared",
    "accepted",
    "account_of",
    "backend_of",
    "carry_out",
    "client_secrets",
    "fresh_run_id",
    "prepare",
    "push_channels",
    "reconcile",
    "reconcile_many",
    "record_of",
    "resend",
    "send",
    "store_of",
    "target_key",
]

_DRY_RUN_ID = "render-0000000000"


@dataclass(frozen=True)
class Prepared:
    """A resolved job and the backend that takes it. Valid inside the `prepare` block: the code archive goes with it.

    rerun_of: the earlier run whose job this is.
    """

    job: Job
    backend: Backend
    folder: Path
    template: str
    rerun_of: str | None = None

    def plan(self, run_id: str = _DRY_RUN_ID) -> Plan:
        return make_plan(self.job, self.backend, run_id, template=self.template)


@contextlib.contextmanager
def prepare(
    job: JobSpec | Path | str,
    *,
    backend: str | None = None,
    target: str | None = None,
    settings: Sequence[str] = (),
    folder: Path | None = None,
    online: bool = True,
    make: Callable[[str], None] | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Prepared]:
    """Reads and resolves. folder: what relative paths start from; that of the job file, or the current one.

    make: as in `resolve`.
    """
    path = None if isinstance(job, JobSpec) else Path(job)
    folder = folder or (path.absolute().parent if path else Path.cwd())
    spec = job if isinstance(job, JobSpec) else load_job(Path(job), settings)
    targets = load_targets(folder)
    selected = targets.select(target=target, backend=backend)
    template = load_template(selected.backend, _template_folder(selected))
    with tempfile.TemporaryDirectory(prefix="cvlaunch-") as scratch, _placing(path, targets, selected):
        resolved = resolve(
            spec,
            selected,
            folder=folder,
            targets=targets,
            scratch=Path(scratch),
            ledger=ledger or Ledger(),
            online=online,
            make=make,
        )
        yield Prepared(resolved, selected.open(), folder, template)


def _template_folder(selected: Selected) -> str | None:
    written = selected.target.templates
    return str(selected.folder / Path(written).expanduser()) if written else None


@contextlib.contextmanager
def _placing(path: Path | None, targets: Targets, selected: Selected) -> Iterator[None]:
    """Errors that name a key of the target or of the job file get the file's name and the line."""
    try:
        yield
    except SpecError as error:
        if error.file is not None or error.key is None:
            raise
        key = error.key.partition(".")[0]
        written = _placed(error, path)
        if key in type(selected.target).model_fields and (key not in JobSpec.model_fields or written.line is None):
            raise targets.placed(error, selected.name) from error
        raise written from error


def _placed(error: SpecError, path: Path | None) -> SpecError:
    if path is None or error.key is None:
        return error
    from launcher.yamlfile import read_yaml

    line = read_yaml(path).line(tuple(error.key.split(".")))
    placed = type(error)(error.message, file=path, line=line, key=error.key)
    return placed.with_traceback(error.__traceback__)


def send(prepared: Prepared, *, ledger: Ledger, run_id: str | None = None) -> RunRecord:
    """Submits. SpecError if the platform would refuse it; nothing is left behind then."""
    values = accepted(prepared)
    plan, record = _enter(prepared, ledger, run_id)
    return carry_out([plan], [record], prepared.backend, values, ledger=ledger)[0]


def accepted(prepared: Prepared) -> dict[str, str]:
    """The values of its secrets. SpecError if something is missing here, or the platform would refuse it."""
    if problem := next((p for p in prepared.backend.check(prepared.job) if p.fatal), None):
        raise SpecError(problem.message, key=problem.thing)
    values = client_secrets(prepared.job.spec, prepared.folder)
    if missing := prepared.plan().placeholders:
        raise SpecError(f"{missing[0]} must be given before this can be sent")
    return values


def _enter(prepared: Prepared, ledger: Ledger, run_id: str | None) -> tuple[Plan, RunRecord]:
    """Writes the run file under a run id that nobody has."""
    owner = ProcessId.of().to_json()
    if run_id:
        plan = prepared.plan(valid_run_id(run_id))
        record = record_of(prepared, plan, owner)
        ledger.create(record)
        return plan, record
    while True:
        plan = prepared.plan(fresh_run_id(prepared.job.spec))
        record = record_of(prepared, plan, owner)
        if not ledger.create_many([record]):
            return plan, record


def fresh_run_id(spec: JobSpec) -> str:
    return new_run_id(spec.name, now=time.time(), randomness=random_source.randbits(13))


def record_of(prepared: Prepared, plan: Plan, owner: Mapping[str, Any]) -> RunRecord:
    """The run file of a submission that begins. owner: this process."""
    job = prepared.job
    return RunRecord(
        run_id=plan.run_id,
        name=job.spec.name,
        created=time.time(),
        state=State.PREPARING,
        backend=plan.backend,
        target_name=job.target_name,
        target=job.target.model_dump(mode="json"),
        output=job.output,
        owner=owner,
        plan={
            "text": plan.text,
            "plan_sha": plan.plan_sha,
            "job_digest": plan.job_digest,
            "files": sorted(plan.files),
            "outputs": [dataclasses.asdict(output) for output in plan.outputs],
            "notes": list(plan.notes),
            "unpinned": list(plan.unpinned),
            "warnings": list(plan.warnings),
        },
        job={
            "spec": job.spec.model_dump(mode="json"),
            "folder": str(prepared.folder),
            "job_file": job_file(prepared.backend, job, plan.run_id).to_json(),
            "image": dataclasses.asdict(job.image) if job.image else None,
        },
        tags=job.spec.tags,
        rerun_of=prepared.rerun_of,
    )


def carry_out(
    plans: Sequence[Plan],
    records: Sequence[RunRecord],
    backend: Backend,
    values: Mapping[str, str],
    *,
    ledger: Ledger,
    attempt: int = 1,
) -> list[RunRecord]:
    """Steps 2 to 5 for runs that stand in the ledger, in one call of the backend.

    After an error each run is NOT_SUBMITTED, or in doubt, or was sent before the platform said no to another.
    """
    run_ids = [record.run_id for record in records]
    try:
        _store_files(plans, records, backend)
    except BaseException as error:  # Ctrl-C, too: nothing has been sent
        _note_refusal(run_ids, error, ledger)
        raise
    preparing = [record.run_id for record in records if record.state is State.PREPARING]
    ledger.update_many({run_id: {"state": State.SENDING} for run_id in preparing})
    try:
        handles = backend.submit_many(plans, values, attempt=attempt)
    except REFUSALS as error:
        _settle_refused(run_ids, error, backend, ledger)
        raise
    except BaseException as error:
        raise _in_doubt(run_ids, error, ledger) from error
    sent = _note_sent(dict(zip(run_ids, handles, strict=True)), ledger)
    return [sent[run_id] for run_id in run_ids]


REFUSALS = (SpecError, AuthError, CapacityError, ConflictError)
"""The platform has said no; after anything else, the job may have arrived."""
_STORED_AT_ONCE = 8


def _store_files(plans: Sequence[Plan], records: Sequence[RunRecord], backend: Backend) -> None:
    """Into each run's own folder, several at a time."""

    def store(plan: Plan, record: RunRecord) -> None:
        place = store_of(record, backend)
        try:
            for path, content in plan.files.items():
                place.write(path, Path(content) if isinstance(content, str) else content)
        except SpecError as error:
            raise SpecError(error.message, key=error.key or "output") from error

    if not any(plan.files for plan in plans):
        return
    if len(plans) == 1:
        store(plans[0], records[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_STORED_AT_ONCE) as pool:
        list(pool.map(store, plans, records))


def _note_sent(handles: Mapping[str, Handle], ledger: Ledger) -> dict[str, RunRecord]:
    queued: dict[str, object] = {"state": State.QUEUED, "status": {}, "owner": {}}
    return ledger.update_many({run_id: {**queued, "handle": str(handle)} for run_id, handle in handles.items()})


def _note_refusal(run_ids: Sequence[str], error: BaseException, ledger: Ledger) -> None:
    status = {"reason": str(error) or type(error).__name__}
    changes = {"state": State.NOT_SUBMITTED, "status": status, "owner": {}}
    ledger.update_many(dict.fromkeys(run_ids, changes))


def _settle_refused(run_ids: Sequence[str], error: CvlaunchError, backend: Backend, ledger: Ledger) -> None:
    """Of many, some may have been taken before one was refused. Where nobody can say, `reconcile` asks again."""
    try:
        found = backend.find(run_ids) if len(run_ids) > 1 else {}
    except (CvlaunchError, OSError):
        ledger.update_many({run_id: {"owner": {}} for run_id in run_ids})
        return
    _note_sent(found, ledger)
    _note_refusal([run_id for run_id in run_ids if run_id not in found], error, ledger)


def _in_doubt(run_ids: Sequence[str], error: BaseException, ledger: Ledger) -> BaseException:
    """Gives up ownership, so that `reconcile` may ask even while this process lives on. The error to raise."""
    ledger.update_many({run_id: {"owner": {}} for run_id in run_ids})
    if not isinstance(error, CvlaunchError | OSError):
        return error
    what, one = (run_ids[0],) * 2 if len(run_ids) == 1 else (f"each of {len(run_ids)} runs", "RUN")
    return UnreachableError(
        f"{error}; whether {what} was submitted is not known: `cvlaunch runs` will ask, "
        f"and `cvlaunch submit --resume {one}` sends it if it was not"
    )


_RESENDABLE = (State.SENDING, State.NOT_SUBMITTED, State.LOST, State.FAILED, State.ERROR)


def resend(record: RunRecord, *, ledger: Ledger) -> RunRecord:
    """Sends the stored plan again: one that did not arrive, or, as its next attempt, one that ended too early.

    A run that got somewhere goes on from its newest checkpoint.
    """
    seen = reconcile(ledger.get(record.run_id), ledger=ledger)
    seen.require_ours("it can't be resumed")
    if seen.state not in _RESENDABLE or (seen.state is State.SENDING and seen.owner_alive):
        raise SpecError(f"{seen.run_id} is {seen.state} and needs no resuming; `cvlaunch rerun` starts it afresh")
    backend = backend_of(seen)
    store = store_of(seen, backend)
    if seen.state is State.ERROR and _heard_of(account_of(seen, backend)):
        raise SpecError(f"{seen.run_id} is run by another submission, which was heard of just now; see: {seen.output}")
    missing = [path for path in seen.plan["files"] if store.head(path) is None]
    if missing:
        raise SpecError(f"{seen.run_id} was cut off before {missing[0]} was stored; submit the job file again")
    values = client_secrets(JobSpec.model_validate(seen.job["spec"]), Path(seen.job["folder"]))
    mine = _take_over(seen, ledger)
    return carry_out([_stored_plan(mine)], [mine], backend, values, ledger=ledger, attempt=mine.attempt)[0]


def _heard_of(store: Store) -> bool:
    """Whether some runner of this run is alive: heartbeats come every two minutes at least."""
    try:
        beat = json.loads(store.read(HEARTBEAT))
    except (FileNotFoundError, ValueError):
        return False
    return beat.get("phase") != "ended" and time.time() - float(beat.get("time", 0)) < _HEARTBEAT_S


_HEARTBEAT_S = 300.0


def _take_over(seen: RunRecord, ledger: Ledger) -> RunRecord:
    """Makes this process the one that sends it. SpecError if another was faster."""
    me = ProcessId.of().to_json()
    mine = ledger.update(
        seen.run_id,
        only_if=lambda now: (now.state, now.owner, now.attempt) == (seen.state, seen.owner, seen.attempt),
        state=State.PREPARING,
        owner=me,
        handle=None,
        attempt=seen.attempt + 1 if seen.handle else seen.attempt,
        unseen_since=None,
        status={},
    )
    if (mine.state, mine.owner) != (State.PREPARING, me):
        raise SpecError(f"{seen.run_id} is being resumed by another process")
    return mine


def _stored_plan(record: RunRecord) -> Plan:
    stored = record.plan
    return Plan(
        run_id=record.run_id,
        backend=record.backend,
        text=stored["text"],
        files={},
        job_digest=stored["job_digest"],
        plan_sha=stored["plan_sha"],
        outputs=tuple(Output(**output) for output in stored["outputs"]),
    )


def reconcile(record: RunRecord, *, ledger: Ledger, now: float | None = None) -> RunRecord:
    """Settles a submission that nobody carries on: adopts the job that the platform has, or says that there is none."""
    return reconcile_many([record], ledger=ledger, now=now)[0]


def reconcile_many(records: Sequence[RunRecord], *, ledger: Ledger, now: float | None = None) -> list[RunRecord]:
    """`reconcile` of runs of one target, whose platform is asked once, and only if one of them is in doubt."""
    seen = [_without_platform(record, ledger) for record in records]
    doubtful = [record for record in seen if record.state is State.SENDING and not record.owner_alive]
    if not doubtful:
        return seen
    backend = backend_of(doubtful[0])
    found = backend.find([record.run_id for record in doubtful])
    now = time.time() if now is None else now
    settled = {
        record.run_id: _by_platform(record, found.get(record.run_id), backend.doubt_s, ledger, now)
        for record in doubtful
    }
    return [settled.get(record.run_id, record) for record in seen]


def _without_platform(record: RunRecord, ledger: Ledger) -> RunRecord:
    if record.state not in (State.PREPARING, State.SENDING) or record.owner_alive:
        return record
    seen = ledger.get(record.run_id)  # it may have been finished between our reading it and its owner's end
    if seen.state is not State.PREPARING or seen.owner_alive:
        return seen
    return _settle(seen, ledger, state=State.NOT_SUBMITTED, status={"reason": _cut_off(seen)})


def _by_platform(seen: RunRecord, found: Handle | None, doubt_s: float, ledger: Ledger, now: float) -> RunRecord:
    if found is not None:
        return _settle(seen, ledger, state=State.QUEUED, handle=str(found), status={}, owner={})
    if now - (seen.unseen_since or now) >= doubt_s:
        return _settle(seen, ledger, state=State.NOT_SUBMITTED, status={"reason": _cut_off(seen)})
    if seen.unseen_since:
        return seen
    reason = f"it was cut off; whether it arrived will show within {format_duration(doubt_s)}"
    return _settle(seen, ledger, unseen_since=now, status={"reason": reason})


def _settle(seen: RunRecord, ledger: Ledger, **changes: object) -> RunRecord:
    """Unless somebody has taken the run over since it was looked at."""
    return ledger.update(seen.run_id, only_if=lambda now: (now.state, now.owner) == (seen.state, seen.owner), **changes)


def _cut_off(record: RunRecord) -> str:
    return f"the submission was cut off; send it with: cvlaunch submit --resume {record.run_id}"


def backend_of(record: RunRecord) -> Backend:
    """The backend with the target as it was when the run was submitted, by whatever version of cvlaunch."""
    backend = load_backend(record.backend)
    try:
        target = backend.Target.model_validate(_known_keys(backend.Target, record.target))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise SpecError(f"the target of {record.run_id} can't be read: {key}: {problem['msg']}") from error
    return backend(target, record.target_name)


def _known_keys(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that another version wrote."""
    known = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if field is not None:
            inner = field.annotation
            nested = isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel)
            known[name] = _known_keys(inner, value) if nested else value  # type: ignore[arg-type]
    return known


class OpenBackends:
    """Backends that are opened once for each target: to a cluster that is a log-in and a connection."""

    def __init__(self) -> None:
        self._open: dict[str, Backend] = {}

    def of(self, record: RunRecord) -> Backend:
        key = target_key(record)
        if key not in self._open:
            self._open[key] = backend_of(record)
        return self._open[key]


def target_key(record: RunRecord) -> str:
    """The same for runs whose platform is asked about all of them at once."""
    return f"{record.backend}:{record.target_name}:{record.target}"


def store_of(record: RunRecord, backend: Backend | None = None) -> Store:
    """The run's folder in the output store; of a job made elsewhere, what stands for it, to be read only."""
    backend = backend or backend_of(record)

    def opened(uri: str) -> Store:
        return backend.store(uri) or open_store(uri, backend.target.storage.options)

    if not record.made_elsewhere:
        return opened(record.folder)
    return PlacesStore(record.folder, {output["into"]: opened(output["uri"]) for output in record.plan["outputs"]})


def account_of(record: RunRecord, backend: Backend | None = None) -> Store:
    """What the runner tells of the run: its folder, or, where it reaches no store, the one that the platform takes."""
    backend = backend or backend_of(record)
    movers = (record.job.get("job_file") or {}).get("movers") or {}
    if movers.get("output") != "platform":
        return store_of(record, backend)
    uri = join_uri(record.output, record.run_id, MIRROR)
    return backend.store(uri) or open_store(uri, backend.target.storage.options)


def client_secrets(spec: JobSpec, folder: Path) -> dict[str, str]:
    """Values of `env:` and `file:` references. SpecError for one that is not there, or that others can read."""
    values = {}
    for name, reference in spec.secrets.items():
        kind, _, where = reference.partition(":")
        if kind == "env":
            if where not in os.environ:
                raise SpecError(f"the variable {where} is not set here", key=f"secrets.{name}")
            values[name] = os.environ[where]
        elif kind == "file":
            path = folder / Path(where).expanduser()
            if not path.is_file():
                raise SpecError(f"no file {path}", key=f"secrets.{name}")
            require_private(path)
            values[name] = _secret_text(path, name)
    return values


def _secret_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise SpecError(f"{path} is not text; encode it, for example with base64", key=f"secrets.{name}") from None


def push_channels(
    job: Path,
    *,
    backend: str | None,
    target: str | None,
    settings: Sequence[str],
    to: str,
    by_content: bool = False,
) -> list[str]:
    """`submit --push-data`: pushes each folder of this machine to `to/<channel>`; returns settings that point there.

    by_content: to `to/<channel>-<beginning of its fingerprint>`, where nobody's data replace anybody else's.
    """
    spec = load_job(job, settings)
    targets = load_targets(job.absolute().parent)
    selected = targets.select(target=target, backend=backend)
    changed = []
    for name, written in spec.data.items():
        folder = job.absolute().parent / Path(written).expanduser()
        if is_uri(written) or not folder.is_dir() or written.partition("/")[0] in targets.datasets:
            continue
        if spec.train is not None and name in ("train", "val"):
            check_channel(folder, spec.train, channel=name)
        pushed = _push(folder, selected, join_uri(to, name), by_content=by_content)
        changed.append(f"data.{name}={pushed}")
    return changed


def _push(folder: Path, selected: Selected, start: str, *, by_content: bool) -> str:
    """Where it is now."""

    def place(found: manifest.Manifest) -> str:
        return f"{start}-{found.fingerprint[:_FINGERPRINT]}" if by_content else start

    return place(manifest.push(folder, lambda found: selected.store(place(found))))


_FINGERPRINT = 16
"""Characters of 64: 64 bits."""
