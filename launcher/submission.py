"""Submitting exactly once, and finding out what became of a submission that was cut off.

1 run file PREPARING   2 Plan.files into the output store   3 SENDING   4 the call   5 the handle.
A crash before 3: not submitted. In 3 to 5: in doubt, and `reconcile` asks the platform. Nothing is sent again while in
doubt; should a job be sent twice all the same, the runner's claim of `owner` makes the second one harmless.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets as random_source
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import manifest
from launcher.backends import load_backend
from launcher.backends.base import Backend, Job, Output, Plan
from launcher.dataset import check_channel
from launcher.errors import ConflictError, CvlaunchError, SpecError, UnreachableError
from launcher.jobfile import load_job
from launcher.ledger import Ledger, RunRecord, new_run_id, valid_run_id
from launcher.plan import job_file, load_template, make_plan, placeholders
from launcher.process import ProcessId
from launcher.resolve import resolve
from launcher.secretfiles import require_private
from launcher.spec import JobSpec
from launcher.status import State
from launcher.stores import StorageOptions, Store, is_uri, join_uri, open_store
from launcher.targets import Selected, load_targets

__all__ = [
    "Prepared",
    "backend_of",
    "client_secrets",
    "prepare",
    "push_channels",
    "reconcile",
    "resend",
    "send",
    "store_of",
]

_DRY_RUN_ID = "render-0000000000"


@dataclass(frozen=True)
class Prepared:
    """A resolved job and the backend that takes it. Valid inside the `prepare` block: the code archive goes with it."""

    job: Job
    backend: Backend
    folder: Path
    template: str

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
    ledger: Ledger | None = None,
) -> Iterator[Prepared]:
    """Reads and resolves. folder: what relative paths start from; that of the job file, or the current one."""
    path = None if isinstance(job, JobSpec) else Path(job)
    folder = folder or (path.absolute().parent if path else Path.cwd())
    spec = job if isinstance(job, JobSpec) else load_job(Path(job), settings)
    targets = load_targets(folder)
    selected = targets.select(target=target, backend=backend)
    template = load_template(selected.backend, _template_folder(selected))
    with tempfile.TemporaryDirectory(prefix="cvlaunch-") as scratch:
        try:
            resolved = resolve(
                spec,
                selected,
                folder=folder,
                targets=targets,
                scratch=Path(scratch),
                ledger=ledger or Ledger(),
                online=online,
            )
        except SpecError as error:
            raise _placed(error, path) from error
        yield Prepared(resolved, selected.open(), folder, template)


def _template_folder(selected: Selected) -> str | None:
    written = selected.target.templates
    return str(selected.folder / Path(written).expanduser()) if written else None


def _placed(error: SpecError, path: Path | None) -> SpecError:
    """The same error with the job file's name and line, where it names a key of it."""
    if path is None or error.file is not None or error.key is None:
        return error
    from launcher.yamlfile import read_yaml

    line = read_yaml(path).line(tuple(error.key.split(".")))
    placed = type(error)(error.message, file=path, line=line, key=error.key)
    return placed.with_traceback(error.__traceback__)


def send(prepared: Prepared, *, ledger: Ledger, run_id: str | None = None) -> RunRecord:
    """Submits. SpecError if the platform would refuse it; nothing is left behind then."""
    problems = [p for p in prepared.backend.check(prepared.job) if p.fatal]
    if problems:
        raise SpecError(problems[0].message, key=problems[0].thing)
    values = client_secrets(prepared.job.spec, prepared.folder)
    plan, record = _enter(prepared, ledger, run_id)
    if missing := placeholders(plan.text):
        ledger.delete(plan.run_id)
        raise SpecError(
            f"{missing[0]} stands for a value that target {prepared.job.target_name!r} must give; see its keys"
        )
    return _carry_out(plan, record, prepared.backend, values, ledger)


def _enter(prepared: Prepared, ledger: Ledger, run_id: str | None) -> tuple[Plan, RunRecord]:
    """Writes the run file under a run id that nobody has."""
    while True:
        chosen = (
            valid_run_id(run_id)
            if run_id
            else new_run_id(prepared.job.spec.name, now=time.time(), randomness=random_source.randbits(13))
        )
        plan = prepared.plan(chosen)
        record = _record(prepared, plan)
        try:
            ledger.create(record)
        except ConflictError:
            if run_id:
                raise
            continue
        return plan, record


def _record(prepared: Prepared, plan: Plan) -> RunRecord:
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
        owner=ProcessId.of().to_json(),
        plan={
            "text": plan.text,
            "plan_sha": plan.plan_sha,
            "job_digest": plan.job_digest,
            "files": sorted(plan.files),
            "outputs": [dataclasses.asdict(output) for output in plan.outputs],
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
    )


def _carry_out(plan: Plan, record: RunRecord, backend: Backend, values: Mapping[str, str], ledger: Ledger) -> RunRecord:
    run_id = record.run_id
    try:
        if plan.files:
            store = store_of(record, backend)
            for path, content in plan.files.items():
                store.write(path, Path(content) if isinstance(content, str) else content)
        ledger.update(run_id, state=State.SENDING)
        handle = backend.submit(plan, values, attempt=record.attempt)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; whether {run_id} was submitted is not known: `cvlaunch runs` will ask, "
            f"and `cvlaunch submit --resume {run_id}` sends it if it was not"
        ) from error
    except (CvlaunchError, OSError) as error:
        ledger.update(run_id, state=State.NOT_SUBMITTED, status={"reason": str(error)})
        raise
    return ledger.update(run_id, state=State.QUEUED, handle=str(handle), status={})


_RESENDABLE = (State.SENDING, State.NOT_SUBMITTED, State.LOST, State.FAILED, State.ERROR)


def resend(record: RunRecord, *, ledger: Ledger) -> RunRecord:
    """Sends the stored plan again: one that did not arrive, or, as its next attempt, one that ended too early.

    A run that got somewhere goes on from its newest checkpoint.
    """
    record = reconcile(record, ledger=ledger)
    if record.state not in _RESENDABLE or (record.state is State.SENDING and record.owner_alive):
        raise SpecError(f"{record.run_id} is {record.state} and needs no resuming; `cvlaunch rerun` starts it afresh")
    backend = backend_of(record)
    store = store_of(record, backend)
    missing = [path for path in record.plan["files"] if store.head(path) is None]
    if missing:
        raise SpecError(f"{record.run_id} was cut off before {missing[0]} was stored; submit the job file again")
    spec = JobSpec.model_validate(record.job["spec"])
    values = client_secrets(spec, Path(record.job["folder"]))
    attempt = record.attempt + 1 if record.handle else record.attempt
    record = ledger.update(
        record.run_id,
        state=State.PREPARING,
        owner=ProcessId.of().to_json(),
        attempt=attempt,
        unseen_since=None,
        status={},
    )
    return _carry_out(_stored_plan(record), record, backend, values, ledger)


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
    """Settles a submission whose process is dead: adopts the job that the platform has, or says that there is none."""
    if record.state not in (State.PREPARING, State.SENDING) or record.owner_alive:
        return record
    record = ledger.get(record.run_id)  # it may have been finished between our reading it and its owner's end
    if record.state is State.PREPARING:
        return _not_submitted(record, ledger)
    if record.state is not State.SENDING:
        return record
    backend = backend_of(record)
    found = backend.find([record.run_id]).get(record.run_id)
    if found is not None:
        return ledger.update(record.run_id, state=State.QUEUED, handle=str(found), status={})
    now = time.time() if now is None else now
    if now - (record.unseen_since or now) >= backend.doubt_s:
        return _not_submitted(record, ledger)
    return record if record.unseen_since else ledger.update(record.run_id, unseen_since=now)


def _not_submitted(record: RunRecord, ledger: Ledger) -> RunRecord:
    reason = f"the submission was cut off; send it with: cvlaunch submit --resume {record.run_id}"
    return ledger.update(record.run_id, state=State.NOT_SUBMITTED, status={"reason": reason})


def backend_of(record: RunRecord) -> Backend:
    """The backend with the target as it was when the run was submitted."""
    backend = load_backend(record.backend)
    return backend(backend.Target.model_validate(record.target), record.target_name)


def store_of(record: RunRecord, backend: Backend | None = None) -> Store:
    """The run's folder in the output store."""
    backend = backend or backend_of(record)
    uri = join_uri(record.output, record.run_id)
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
            values[name] = path.read_text().rstrip("\n")
    return values


def push_channels(job: Path, *, backend: str | None, target: str | None, settings: Sequence[str], to: str) -> list[str]:
    """`submit --push-data`: pushes each folder of this machine to `to/<channel>`; returns settings that point there."""
    spec = load_job(job, settings)
    targets = load_targets(job.absolute().parent)
    options: StorageOptions = targets.select(target=target, backend=backend).target.storage.options
    changed = []
    for name, written in spec.data.items():
        folder = job.absolute().parent / Path(written).expanduser()
        if is_uri(written) or not folder.is_dir() or written.partition("/")[0] in targets.datasets:
            continue
        if spec.train is not None and name in ("train", "val"):
            check_channel(folder, spec.train, channel=name)
        uri = join_uri(to, name)
        manifest.push(folder, open_store(uri, options))
        changed.append(f"data.{name}={uri}")
    return changed
