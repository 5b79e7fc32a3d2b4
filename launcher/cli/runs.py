"""`runs`, `status`, `cancel`, `rm`: what the ledger and the platforms know."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from launcher.cli.options import (
    ask,
    complete_backends,
    complete_targets,
    find_run,
    json_option,
    pairs,
    quiet_option,
    run_argument,
    runs_argument,
    seconds,
)
from launcher.cli.out import Column, Out, style_of_state
from launcher.cli.shapes import run_json, summary_json
from launcher.ledger import Ledger, RunRecord, RunSummary
from launcher.quantities import format_duration, format_size
from launcher.status import State

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["cancel", "rm", "runs", "status"]


@click.command()
@click.option("--state", "states", type=click.Choice([s.value for s in State], case_sensitive=False), multiple=True,
              metavar="STATE", help="RUNNING, FAILED, ... May be repeated.")  # fmt: skip
@click.option("--target", metavar="NAME", shell_complete=complete_targets)
@click.option("--backend", metavar="NAME", shell_complete=complete_backends)
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="May be repeated; all must fit.")
@click.option("--since", callback=seconds, metavar="TIME", help="Submitted within 7d, 12h, ...")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--no-refresh", is_flag=True, help="Don't ask the platforms; show what was last seen.")
@json_option
def runs(
    *,
    states: tuple[str, ...],
    target: str | None,
    backend: str | None,
    tags: tuple[str, ...],
    since: float | None,
    limit: int,
    no_refresh: bool,
    out: Out,
) -> None:
    """List runs, the newest first.

    Asks the platforms about runs that have not ended, in one question for each target.
    """
    wanted_tags = pairs(tags, "--tag")
    oldest = 0.0 if since is None else time.time() - since

    def fits(run: RunSummary) -> bool:
        return (
            target in (None, run.target_name)
            and backend in (None, run.backend)
            and run.created >= oldest
            and wanted_tags.items() <= run.tags.items()
        )

    ledger = Ledger()
    found = [run for run in ledger.summaries() if fits(run)]
    if not no_refresh:
        found = _refreshed(found, ledger, out)
    found = [run for run in found if not states or run.state in states]
    _print_runs(found[:limit], out)
    if len(found) > limit and not out.as_json:
        out.note(f"{len(found) - limit} older runs; show them with --limit {len(found)}")


def _refreshed(found: Sequence[RunSummary], ledger: Ledger, out: Out) -> list[RunSummary]:
    open_ones = {run.run_id for run in found if not run.state.terminal or run.state is State.LOST}
    if not open_ones:
        return list(found)
    from launcher.run import refresh

    for name, why in refresh([run for run in found if run.run_id in open_ones], ledger=ledger):
        out.warn(f"target {name} could not be asked: {why}")
    now = {run_id: RunSummary.of(ledger.get(run_id)) for run_id in open_ones if run_id in ledger}
    return [now.get(run.run_id, run) for run in found if run.run_id not in open_ones or run.run_id in now]


def _print_runs(found: Sequence[RunSummary], out: Out) -> None:
    if out.as_json:
        out.document([summary_json(run) for run in found])
        return
    if not found:
        out.note("no runs")
        return
    now = time.time()
    columns = [
        Column("RUN"),
        Column("STATE", style=style_of_state),
        Column("AGE", right=True),
        Column("TARGET"),
        Column("REASON", whole=False),
    ]
    rows = [_row(run, now) for run in found]
    if any("sweep" in run.tags for run in found):
        columns.insert(-1, Column("SETTINGS", whole=False))
        rows = [(*row[:-1], run.tags.get("settings", ""), row[-1]) for row, run in zip(rows, found, strict=True)]
    out.table(columns, rows)


def _row(run: RunSummary, now: float) -> tuple[str, ...]:
    age = format_duration(max(0.0, now - run.created))
    target = run.target_name if run.target_name == run.backend else f"{run.target_name} ({run.backend})"
    return (run.run_id, str(run.state), age, target, run.reason)


@click.command()
@run_argument
@json_option
def status(*, run: str, out: Out) -> None:
    """Say what a run is doing.

    Asks its platform. The platform's own word stands in parentheses.
    """
    from launcher.run import refresh

    ledger = Ledger()
    record = find_run(run).record
    for name, why in refresh([record], ledger=ledger):
        out.warn(f"target {name} could not be asked: {why}; this is what was last seen")
    record = ledger.get(record.run_id)
    if out.as_json:
        out.document(run_json(record))
    else:
        out.fields(_facts(record))


def _facts(record: RunRecord) -> dict[str, str]:
    seen, facts = record.last_status, run_json(record)
    return {
        "run": record.run_id,
        "name": record.name if not record.run_id.startswith(record.name) else "",
        "state": f"{seen.state} ({seen.native})" if seen.native else str(seen.state),
        "reason": seen.reason,
        "exit code": "" if seen.exit_code is None else str(seen.exit_code),
        "attempt": str(seen.attempt) if seen.attempt > 1 else "",
        "submitted": _moment(record.created),
        "started": _moment(seen.started),
        "ended": _moment(seen.ended),
        "took": _took(seen.started, seen.ended),
        "node": seen.node,
        "target": f"{record.target_name} ({record.backend})",
        "handle": record.handle or "",
        "rerun of": record.rerun_of or "",
        "output": facts["output"],
        "synced to": record.synced or "",
        "job digest": facts["job_digest"],
        "unpinned": "; ".join(facts["unpinned"]),
        "tags": ", ".join(f"{key}={value}" for key, value in record.tags.items()),
    }


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)) if seconds else ""


def _took(started: float | None, ended: float | None) -> str:
    if not started:
        return ""
    return format_duration(max(0.0, (ended or time.time()) - started)) + ("" if ended else " so far")


@click.command()
@runs_argument
@json_option
def cancel(*, run: tuple[str, ...], out: Out) -> None:
    """Stop runs for good.

    A cancelled run gets its time to write a checkpoint and never comes back. Cancelling an ended run changes nothing.
    """
    found = [find_run(text) for text in run]
    for one in found:
        was = one.record.state
        status = one.cancel()
        if was.terminal:
            out.note(f"{one.id} has ended already: {status.state}")
        elif status.state.terminal:
            out.note(f"{one.id} {status.state}")
        else:
            out.note(f"{one.id} {status.state}; its end: cvlaunch wait {one.id}")
    if out.as_json:
        out.document([run_json(one.record) for one in found])


@click.command()
@runs_argument
@click.option("--remote", is_flag=True, help="Also delete what the platform and the output store hold.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@quiet_option
def rm(*, run: tuple[str, ...], remote: bool, yes: bool, out: Out) -> None:
    """Forget runs, and delete what is left of them.

    Asks first, and says what goes. Without --remote the results stay where they are; what was synced to this machine
    always stays.
    """
    found = [find_run(text) for text in run]
    for one in found:
        one.check_removable(remote=remote)
    for one in found:
        click.echo(_what_goes(one, remote), err=True)
    if not yes:
        ask(f"remove {'this run' if len(found) == 1 else f'these {len(found)} runs'}?")
    for one in found:
        one.remove(remote=remote)
        out.note(f"removed {one.id}")


def _what_goes(run: Run, remote: bool) -> str:
    if not remote:
        return f"{run.id} is to be forgotten here; its results stay in {run.output}"
    sizes = [entry.size for entry in run.store().list()]
    handle = f", and what {run.handle} left" if run.handle else ""
    return f"{run.id}: {len(sizes)} files ({format_size(sum(sizes))}) in {run.output} go{handle}"
