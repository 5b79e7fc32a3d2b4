"""The front: submit a job, and ask a Run about it from any process on any day."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import contract
from launcher.adopt import adopt
from launcher.backends.base import Backend, Feature, Handle, LogLine, Plan, features_missing
from launcher.compare import Comparison, Surroundings, compare
from launcher.errors import AuthError, CvlaunchError, JobFailedError, SpecError, UnreachableError, UnsupportedError
from launcher.ledger import Ledger, RunRecord, RunSummary, valid_run_id
from launcher.logfiles import follow_logs
from launcher.metrics import Metrics, Point, Reader
from launcher.quantities import format_duration
from launcher.rerun import prepare_again
from launcher.runner.stop import within
from launcher.spec import JobSpec
from launcher.status import State, Status
from launcher.stores import Store, open_store
from launcher.submission import OpenBackends, account_of, prepare, reconcile_many, resend, send, store_of, target_key
from launcher.supervised import ended_state
from launcher.sweep import prepare_many, send_many
from launcher.sync import Cursor, SyncReport, read_appended, sync_run, unpack_tar
from launcher.targets import load_targets
from launcher.watch import UNSEEN_LIMIT_S, intervals, watch

__all__ = ["Run", "attach", "refresh", "render", "runs", "submit", "submit_many"]

_MARK_S = 20.0
"""How long a cancellation may take to leave its mark, before the platform is told all the same."""


def submit(
    job: JobSpec | Path | str,
    *,
    backend: str | None = None,
    target: str | None = None,
    settings: Sequence[str] = (),
    run_id: str | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
    ledger: Ledger | None = None,
) -> Run:
    """Sends a job and returns at once.

    job: a job file, or a JobSpec whose relative paths start from `folder` (the current one).
    settings: like `--set`: `["train.epochs=3"]`. Raises SpecError for anything that would be refused.
    progress: gets a line at a time while an image is built, pulled or pushed.
    """
    ledger, make = ledger or Ledger(), progress or _silently
    with prepare(
        job, backend=backend, target=target, settings=settings, folder=folder, make=make, ledger=ledger
    ) as prepared:
        return Run(send(prepared, ledger=ledger, run_id=run_id), ledger)


def submit_many(
    job: JobSpec | Path | str,
    settings: Sequence[Sequence[str]],
    *,
    backend: str | None = None,
    target: str | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
    ledger: Ledger | None = None,
) -> list[Run]:
    """Sends a sweep: the same job once for each list of settings, in as few calls as the platform allows.

    settings: like `submit` has them: `[["train.seed=0"], ["train.seed=1"]]`. Each run gets the tags `sweep`, the same
    for all (the job may have one), and `settings`, what is its own. SpecError before anything is sent; CapacityError
    and AuthError may come when a part has been sent, and say so.
    """
    ledger, make = ledger or Ledger(), progress or _silently
    with prepare_many(
        job, settings, backend=backend, target=target, folder=folder, make=make, ledger=ledger
    ) as prepared:
        return [Run(record, ledger) for record in send_many(prepared, ledger=ledger)]


def _silently(line: str) -> None:
    """Progress that nobody looks at."""


def render(
    job: JobSpec | Path | str,
    *,
    backend: str | None = None,
    target: str | None = None,
    settings: Sequence[str] = (),
    run_id: str | None = None,
    folder: Path | None = None,
    online: bool = False,
) -> Plan:
    """What `submit` would send, without sending it. online: also read what is not on this machine."""
    chosen = {"run_id": valid_run_id(run_id)} if run_id else {}
    with prepare(job, backend=backend, target=target, settings=settings, folder=folder, online=online) as prepared:
        return prepared.plan(**chosen)


def attach(name: str, *, target: str | None = None, backend: str | None = None, ledger: Ledger | None = None) -> Run:
    """A run that somebody else has sent: a rendering by hand, a colleague's, a job of SageMaker made elsewhere.

    name: its run id, or the platform's own id of the job. SpecError if there is none.
    """
    ledger = ledger or Ledger()
    return Run(adopt(name, load_targets(Path.cwd()).select(target=target, backend=backend), ledger=ledger), ledger)


def runs(*, ledger: Ledger | None = None) -> list[Run]:
    """All runs of this user, the newest first, as last seen; `Run.status()` asks again."""
    ledger = ledger or Ledger()
    return [Run(record, ledger) for record in ledger.all()]


class Run:
    """One run. Its id is the first column of `cvlaunch runs`; a Run can be made from it, or from a handle."""

    def __init__(self, run: RunRecord | str, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self._record = self._ledger.find(run) if isinstance(run, str) else run
        self._backends = OpenBackends()

    @property
    def id(self) -> str:
        return self._record.run_id

    @property
    def record(self) -> RunRecord:
        """The run file, as last read."""
        return self._record

    @property
    def handle(self) -> Handle | None:
        """None as long as the platform has not taken the job."""
        return self._record.parsed_handle

    @property
    def output(self) -> str:
        """URI of the run's folder in the output store; of a job made elsewhere, the place of its results."""
        return self._record.folder

    def __repr__(self) -> str:
        return f"Run({self._record.handle or self.id}, {self._record.state})"

    def _repr_html_(self) -> str:
        status = self._record.last_status
        rows = {"run": self.id, "state": status.state, "reason": status.reason, "handle": self._record.handle or ""}
        rows |= {"output": self.output, "digest": str(self._record.plan["job_digest"])[:12]}
        with contextlib.suppress(OSError, SpecError, UnreachableError):
            rows |= {name: f"{value:.4g}" for name, value in self.metrics().summary().items()}
        cells = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items() if v)
        return f"<table>{''.join(cells)}</table>"

    def status(self) -> Status:
        """Asks the platform, once. The run itself goes on, whatever happens to us.

        UnreachableError if it does not answer, or can't be asked; AuthError if it does not know us any more.
        """
        silent = refresh([self._record], ledger=self._ledger, backends=self._backends)
        self._record = self._ledger.get(self.id)
        if silent:
            target, error = silent[0]
            kind = AuthError if isinstance(error, AuthError) else UnreachableError
            raise kind(f"target {target} could not be asked: {error}") from error
        return self._record.last_status

    def _status_or_last(self) -> Status:
        """While waiting, a platform that does not answer is asked again later."""
        with contextlib.suppress(UnreachableError):
            return self.status()
        return self._record.last_status

    def wait(self, *, timeout: float | None = None, check: bool = False) -> Status:
        """Until the run has ended. TimeoutError after `timeout` seconds; check: JobFailedError unless it succeeded."""
        *_, status = watch(self._status_or_last, timeout=timeout)
        if check and status.state is not State.SUCCEEDED:
            raise JobFailedError(f"{self.id} is {status.state}: {status.reason}; see: cvlaunch logs {self.id}")
        return status

    def logs(self, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """From the platform; from the output store where the platform has none any more."""
        handle, seen = self.handle, False
        if handle is not None:
            for line in self._open_backend().logs(handle, follow=follow, since=since):
                seen = True
                yield line
        if not seen and not since:
            yield from follow_logs(self._account())

    def follow(self, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[LogLine | Status | Point]:
        """Everything new as it comes: log lines, metrics and changes of state; the end of the run is the last."""
        reader, metrics_at, logs_at, watched = Reader(), Cursor(), "", 0.0
        last: Status | None = None
        for pause in intervals(first=0.3, most=3.0):
            status = self._status_or_last()
            watched = self._say_watched(watched)
            if status != last and not status.state.terminal:
                yield status
            try:
                for line in self._new_logs(logs_at):
                    logs_at = line.cursor or logs_at
                    yield line
                data, metrics_at = read_appended(self._account(), contract.METRICS, since=metrics_at)
                yield from reader.feed(data)
            except UnreachableError:  # the next look may find it again
                if status.state.terminal:
                    raise
            if status.state.terminal:
                yield status
                return
            last = status
            sleep(pause)

    def _new_logs(self, since: str) -> Iterator[LogLine]:
        handle = self.handle
        return self._open_backend().logs(handle, since=since) if handle else iter(())

    def _say_watched(self, last: float) -> float:
        """Tells the runner that somebody looks, so that it uploads every few seconds."""
        store = self.store()
        if self._record.made_elsewhere or store.local_path() is not None or time.time() - last < 30:
            return last
        with contextlib.suppress(UnreachableError, AuthError):  # who may only read gets the news later
            store.write(contract.WATCH, str(time.time()).encode())
        return time.time()

    def cancel(self) -> Status:
        """Leaves the mark that nothing restarts, then tells the platform. Cancelling an ended run changes nothing.

        A run that the platform knows ends without the mark, too: its output may be what it waits for.
        """
        status = self.status()
        if status.state.terminal:
            return status
        handle = self.handle
        if handle is None and self._record.owner_alive:
            raise SpecError(f"{self.id} is being submitted by another process; cancel it when that is done")
        if handle is None:  # in doubt: should it appear, the mark is there already
            self.store().write(contract.CANCEL, b"cancelled\n")
            return status
        if not self._record.made_elsewhere:
            within(_MARK_S, lambda: self.store().write(contract.CANCEL, b"cancelled\n"))
        self._open_backend().cancel(handle)
        return self.status()

    def sync(
        self,
        to: Path | str = "runs",
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> SyncReport:
        """Brings the run's files to `to/<run_id>/`, those that are new or changed. Works while it runs, too."""
        folder = Path(to).expanduser().absolute() / self.id
        report = sync_run(self.store(), folder, include=include, exclude=exclude, progress=progress)
        for output in self._record.plan["outputs"]:
            if output["form"] == "tar":
                self._unpack(output["uri"], folder / output["into"])
        self._record = self._ledger.update(self.id, synced=str(folder))
        return report

    def _unpack(self, uri: str, folder: Path) -> None:
        base, _, name = uri.rpartition("/")
        store = self._open_backend().store(base) or open_store(base, self._open_backend().target.storage.options)
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(FileNotFoundError):
            archive = Path(scratch) / "archive"
            store.download(name, archive)
            unpack_tar(archive, folder)

    def metrics(self) -> Metrics:
        """From the output store, while it runs, too; from the synced folder where the store has nothing any more."""
        data, _ = read_appended(self._account(), contract.METRICS)
        synced = Path(self._record.synced or "") / contract.METRICS
        if not data and self._record.synced and synced.is_file():
            data = synced.read_bytes()
        return Metrics.from_bytes(data)

    def environment(self) -> dict[str, Any] | None:
        """What environment.json says of the image, the packages and the machine; None as long as it says nothing.

        From the output store; from the synced folder where the store has it no more, or does not answer.
        """
        synced = contract.read_json(Path(self._record.synced) / contract.ENVIRONMENT) if self._record.synced else None
        try:
            found = json.loads(self._account().read(contract.ENVIRONMENT))
        except (FileNotFoundError, ValueError):
            return synced
        except UnreachableError:
            if synced is None:
                raise
            return synced
        return found if isinstance(found, dict) else synced

    def diff(self, other: Run) -> Comparison:
        """Whether the other is the same job, and what else differs: what a run had around it counts for no job."""
        return compare(self._record, other._record, (self._surroundings(), other._surroundings()))

    def _surroundings(self) -> Surroundings:
        try:
            found = self.environment()
        except (CvlaunchError, OSError) as error:
            return Surroundings(why_not=f"{self.id}: {error}")
        if found is None:
            return Surroundings(why_not=f"{self.id}: no {contract.ENVIRONMENT} in {self.output}")
        return Surroundings.from_json(found)

    def report(self, to: Path | str | None = None) -> Path:
        """Syncs what a report needs and writes a self-contained HTML page; its path."""
        from launcher.report import write_report

        folder = self.synced_folder()
        return write_report([folder], Path(to) if to else folder / "report.html")

    def synced_folder(self) -> Path:
        """The folder of this machine with the results, brought up to date; without checkpoints."""
        folder = Path(self._record.synced).parent if self._record.synced else Path("runs")
        self.sync(folder, exclude=["checkpoints/**", "model/*.pt"])
        return folder.absolute() / self.id

    def resume(self) -> Run:
        """Sends it again: what did not arrive, or what ended too early and goes on from its newest checkpoint."""
        return Run(resend(self._record, ledger=self._ledger), self._ledger)

    def rerun(
        self,
        *,
        backend: str | None = None,
        target: str | None = None,
        settings: Sequence[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> Run:
        """Sends its job afresh as a run of its own, to the same target unless another is given.

        The code is the archive that was sent, unless a setting begins with `code`; data and image are looked up again,
        so that `diff` may tell of changes. progress: as for `submit`.
        """
        how = {"backend": backend, "target": target}
        make = progress or _silently
        with prepare_again(
            self._record, self.store(), **how, settings=settings, make=make, ledger=self._ledger
        ) as prepared:
            return Run(send(prepared, ledger=self._ledger), self._ledger)

    def exec(self, command: Sequence[str], *, tty: bool | None = None) -> int:
        """Runs a command beside this run, with its environment and our standard streams; the command's exit code.

        tty: give it a terminal; None does so if standard input and output are one. SpecError for a run that is not
        going on, UnsupportedError for a backend that can't.
        """
        backend = self._open_backend()
        for _, reason in features_missing(type(backend), [Feature.EXEC]):
            raise UnsupportedError(f"the {backend.name} backend runs no command beside a run: {reason}")
        if isinstance(command, str) or not command:
            raise SpecError(f"{command!r} is not a command; a command looks like ['nvidia-smi', '-L']")
        status = self.status()
        if status.state.terminal:
            raise SpecError(f"{self.id} has ended: {status.state}; a command runs only beside a run that is going on")
        if self.handle is None:
            raise SpecError(f"{self.id} is {status.state}; a command runs only beside a run that is going on")
        tty = sys.stdin.isatty() and sys.stdout.isatty() if tty is None else tty
        return backend.exec(self.handle, command, tty=tty)

    def remove(self, *, remote: bool = False) -> None:
        """Forgets an ended run; remote: also deletes what the platform and the output store hold of it."""
        self.check_removable(remote=remote)
        if remote:
            self._remove_remote()
        self._ledger.delete(self.id)

    def check_removable(self, *, remote: bool = False) -> None:
        """SpecError if `remove` would refuse it."""
        status = self.status()
        if not status.state.terminal:
            raise SpecError(f"{self.id} is {status.state}; cancel it first: cvlaunch cancel {self.id}")
        if remote:
            self._record.require_ours("its job and results are not deleted; leave out --remote to forget it here")

    def _remove_remote(self) -> None:
        store = self.store()
        if (folder := store.local_path()) is not None:
            if folder.exists():
                shutil.rmtree(folder)
        else:
            store.delete([entry.path for entry in store.list()])
        if self.handle:
            self._open_backend().remove(self.handle)

    def store(self) -> Store:
        """The run's folder in the output store."""
        return store_of(self._record, self._open_backend())

    def _account(self) -> Store:
        return account_of(self._record, self._open_backend())

    def _open_backend(self) -> Backend:
        return self._backends.of(self._record)


def refresh(
    records: Iterable[RunRecord | RunSummary],
    *,
    ledger: Ledger,
    backends: OpenBackends | None = None,
    now: Callable[[], float] = time.time,
) -> list[tuple[str, CvlaunchError]]:
    """Asks about all that have not ended, in one call for each target, and keeps the answers.

    backends: of whoever asks again and again. Returns (target, why) for targets that could not be asked.
    """
    groups: dict[str, list[RunRecord]] = defaultdict(list)
    silent: list[tuple[str, CvlaunchError]] = []
    for known in records:
        if _settled_for_good(known.state):
            continue
        with _silence_noted(known.target_name, silent):
            if known.run_id in ledger:
                record = ledger.get(known.run_id)
                groups[target_key(record)].append(record)
    for group in groups.values():
        with _silence_noted(group[0].target_name, silent):
            _refresh_group(group, ledger, now(), backends=backends or OpenBackends())
    return silent


def _settled_for_good(state: State) -> bool:
    return state.terminal and state is not State.LOST


@contextlib.contextmanager
def _silence_noted(target: str, silent: list[tuple[str, CvlaunchError]]) -> Iterator[None]:
    """One target that can't be asked, or whose plug-in is gone, hides no other."""
    try:
        yield
    except CvlaunchError as error:
        silent.append((target, error))


def _refresh_group(group: Sequence[RunRecord], ledger: Ledger, now: float, *, backends: OpenBackends) -> None:
    """group: runs of one target."""
    known = reconcile_many([run for run in group if not _settled_for_good(run.state)], ledger=ledger, now=now)
    handles = {record.run_id: Handle.parse(record.handle) for record in known if record.handle}
    if not handles:
        return
    backend = backends.of(known[0])
    answers = backend.status(list(handles.values()))
    asked = [record for record in known if record.run_id in handles and record.run_id in ledger]
    found = {r.run_id: _with_evidence(r, answers[handles[r.run_id]], backend) for r in asked}
    _keep({r.run_id: (r, _settled(r, found[r.run_id], now)) for r in asked}, ledger, now)


def _with_evidence(record: RunRecord, status: Status, backend: Backend) -> Status:
    """What the run left in its output store tells of its end where the platform knows it no more."""
    if status.state is not State.UNKNOWN or status.native != "gone":
        return status
    with contextlib.suppress(CvlaunchError, OSError, ValueError, KeyError, TypeError):  # of a file that isn't ours, too
        with contextlib.suppress(FileNotFoundError):
            left = json.loads(account_of(record, backend).read(contract.RESULT))
            if left.get("state") != "PREEMPTED":  # that one was to go on somewhere, unless it was cancelled
                state, code = ended_state(left.get("state"), int(left["exit_code"])), int(left["exit_code"])
                reason, attempt = str(left.get("reason") or ""), int(left.get("attempt") or 1)
                return dataclasses.replace(
                    status, state=state, reason=reason, exit_code=code, attempt=attempt, ended=left.get("ended")
                )
        if store_of(record, backend).head(contract.CANCEL) is not None:
            return dataclasses.replace(status, state=State.CANCELLED, reason="cancelled")
    return status


def _settled(record: RunRecord, status: Status, now: float) -> Status:
    """UNKNOWN for ten minutes is LOST."""
    if status.state is not State.UNKNOWN or status.native == "elsewhere":
        return status
    if now - (record.unseen_since or now) < UNSEEN_LIMIT_S:
        return status
    waited = format_duration(now - (record.unseen_since or now))
    return dataclasses.replace(
        status, state=State.LOST, reason=status.reason or f"the platform has not known it for {waited}"
    )


def _keep(found: Mapping[str, tuple[RunRecord, Status]], ledger: Ledger, now: float) -> None:
    unseen: dict[str, dict[str, object]] = {}
    for run_id, (record, status) in found.items():
        if status.state is State.UNKNOWN and record.unseen_since is None:
            unseen[run_id] = {"unseen_since": now}
        elif status.state not in (State.UNKNOWN, State.LOST) and record.unseen_since is not None:
            unseen[run_id] = {"unseen_since": None}
    ledger.update_many(unseen)
    ledger.record_statuses({run_id: (status, record.attempt) for run_id, (record, status) in found.items()})
