"""`watch` and `wait`: following runs, and what is done when they have ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.app import Interrupted
from launcher.cli.live import view_of
from launcher.cli.options import find_run, json_option, run_argument, runs_argument, seconds
from launcher.cli.out import Out, clean
from launcher.cli.shapes import run_json
from launcher.errors import AuthError, CvlaunchError, UnreachableError
from launcher.quantities import format_duration
from launcher.status import State, Status

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["follow_run", "goes_on", "tell_end", "wait", "watch"]


@click.command()
@run_argument
@click.option("--sync", "sync_to", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
              metavar="FOLDER", help="Where its files are brought at the end.")  # fmt: skip
@click.option("--no-sync", is_flag=True, help="Leave its files where they are.")
@json_option
def watch(*, run: str, sync_to: Path, no_sync: bool, out: Out) -> int:
    """Follow a run to its end and bring its results.

    Shows log lines and a live line of metrics. Ctrl-C stops the watching, not the run. Exits with 1 unless the run
    succeeded.
    """
    return follow_run(find_run(run), out, sync_to=None if no_sync else sync_to)


@click.command()
@runs_argument
@click.option("--timeout", callback=seconds, metavar="TIME", help="Give up after 2h, 90m, ...; exit code 124.")
@json_option
def wait(*, run: tuple[str, ...], timeout: float | None, out: Out) -> int:
    """Wait until runs have ended.

    Prints a line for each as it ends. Exits with 1 unless all have succeeded.
    """
    found = {one.id: one for one in map(find_run, run)}
    ended: dict[str, Run] = {}
    try:
        for one in _as_they_end(found, timeout, out):
            ended[one.id] = one
            if not out.as_json:
                status = one.record.last_status
                out.data("  ".join(filter(None, [one.id, str(status.state), clean(status.reason, colours=False)])))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped waiting; {_running(found, ended)} on") from None
    if out.as_json:
        out.document([run_json(one.record) for one in found.values()])
    if len(ended) < len(found):
        click.echo(f"cvlaunch: time is up; {_running(found, ended)} on", err=True)
        return 124
    return 0 if all(one.record.state is State.SUCCEEDED for one in ended.values()) else 1


def _running(found: Mapping[str, Run], ended: Mapping[str, Run]) -> str:
    left = [run_id for run_id in found if run_id not in ended]
    return f"{', '.join(left)} {'goes' if len(left) == 1 else 'go'}"


def _as_they_end(found: dict[str, Run], timeout: float | None, out: Out) -> Iterator[Run]:
    """One question for all runs of a target each time; keeps `found` up to date; stops early when the time is up."""
    from launcher.ledger import Ledger
    from launcher.run import Run, refresh
    from launcher.submission import OpenBackends
    from launcher.watch import intervals

    ledger, backends, said = Ledger(), OpenBackends(), set[tuple[str, str]]()
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = list(found)
    for pause in intervals(first=0.3, most=15.0):
        unended = {run_id for run_id in pending if not found[run_id].record.state.terminal}
        for target, why in refresh([found[run_id].record for run_id in pending], ledger=ledger, backends=backends):
            if isinstance(why, AuthError):  # asking again does not help; the runs go on
                raise AuthError(f"target {target} could not be asked: {why}; then: cvlaunch wait {' '.join(pending)}")
            if (target, str(why)) not in said:
                out.warn(f"target {target} could not be asked: {why}; asking again")
            said.add((target, str(why)))
        for run_id in list(pending):
            found[run_id] = Run(ledger.get(run_id), ledger)
            if found[run_id].record.state.terminal:
                pending.remove(run_id)
                if run_id in unended:
                    tell_end(found[run_id], out)
                yield found[run_id]
        if not pending or (deadline is not None and time.monotonic() >= deadline):
            return
        time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))


def follow_run(run: Run, out: Out, *, sync_to: Path | None, data_on_stderr: bool = False) -> int:
    """Shows a run until it has ended; then notifies, syncs and prints its metrics. The exit code.

    data_on_stderr: stdout belongs to somebody else (`submit` prints its handle there).
    """
    ended_before = run.record.state.terminal
    try:
        with view_of(run, out, err=data_on_stderr) as view:
            for event in run.follow():
                view.show(event)
    except KeyboardInterrupt:
        raise Interrupted(goes_on(run.id, f"watch {run.id}")) from None
    except CvlaunchError as error:  # such as a login that ran out
        if not run.record.state.terminal:
            out.note(goes_on(run.id, f"watch {run.id}"))
            raise
        out.warn(f"its last lines could not be read: {error}")
    if not ended_before:
        tell_end(run, out)
    folder = _bring(run, sync_to, out) if sync_to is not None else None
    status = run.record.last_status
    if out.as_json:
        out.json_line({"type": "end", **run_json(run.record)})
    else:
        _print_end(run, status, folder, out, err=data_on_stderr)
    return 0 if status.state is State.SUCCEEDED else 1


def _bring(run: Run, to: Path, out: Out) -> Path | None:
    """The folder with its files; None, with a warning, where they can't be had: how the run ended is the news."""
    if run.record.state is State.NOT_SUBMITTED:
        return None
    try:
        with out.progress(f"syncing {run.id}") as progress:
            run.sync(to, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(f"{run.id} has ended; bring its files with: cvlaunch sync {run.id} {to}") from None
    except (CvlaunchError, OSError) as error:
        out.warn(f"its files could not be brought: {error}; later: cvlaunch sync {run.id} {to}")
        return None
    return to / run.id


def _print_end(run: Run, status: Status, folder: Path | None, out: Out, *, err: bool) -> None:
    from launcher.cli.results import print_metrics

    with contextlib.suppress(UnreachableError):
        print_metrics(run.metrics(), out, err=err)
    took = f" after {format_duration(status.ended - status.started)}" if status.started and status.ended else ""
    reason = f": {clean(status.reason, colours=False)}" if status.reason else ""
    out.note(f"{run.id} {status.state}{took}{reason}")
    if status.state is not State.SUCCEEDED and status.state is not State.CANCELLED:
        out.note(f"its log: cvlaunch logs {run.id}")
    out.note(f"results: {folder if folder is not None else run.output}")


def goes_on(run_id: str, again: str) -> str:
    """What is said when somebody stops looking."""
    return f"{run_id} goes on\n  look again:  cvlaunch {again}\n  stop it:     cvlaunch cancel {run_id}"


def tell_end(run: Run, out: Out) -> None:
    """Does what the target's `notify` asks for."""
    from launcher.notify import End, send_end
    from launcher.submission import backend_of

    record, status = run.record, run.record.last_status
    notify = backend_of(record).target.notify
    if notify.command is None and notify.webhook is None:
        return
    summary: Mapping[str, float] = {}
    with contextlib.suppress(CvlaunchError, OSError):
        summary = run.metrics().summary()
    end = End(
        run_id=run.id,
        name=record.name,
        state=str(status.state),
        reason=status.reason,
        exit_code=status.exit_code,
        backend=record.backend,
        target=record.target_name,
        handle=record.handle,
        output=run.output,
        started=status.started,
        ended=status.ended,
        job_digest=str(record.plan["job_digest"]),
        metrics=summary,
        tags=dict(record.tags),
    )
    for problem in send_end(notify, end):
        out.warn(problem)
