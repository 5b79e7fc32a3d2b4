"""`logs`, `metrics`, `diff`, `sync`, `report`: what a run left, and what it is leaving."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.app import Interrupted
from launcher.cli.options import complete_runs, find_run, json_option, run_argument, runs_argument
from launcher.cli.out import Column, Out, clean
from launcher.errors import SpecError
from launcher.metrics import Metrics, Point, format_value
from launcher.quantities import format_size

if TYPE_CHECKING:
    from launcher.compare import Comparison, Difference
    from launcher.run import Run

__all__ = ["diff", "logs", "metrics", "print_metrics", "report", "sync"]

_MOST_PACKAGES = 10


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--rank", metavar="R", help="Only lines of this process (0, 1, ...); - is cvlaunch's own.")
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with its time (UTC).")
@json_option
def logs(*, run: str, follow: bool, rank: str | None, timestamps: bool, out: Out) -> None:
    """Print a run's log.

    --json prints a JSON object a line.
    """
    from launcher.cli.live import has_ranks, log_text
    from launcher.cli.shapes import log_json

    found = find_run(run)
    ranked = has_ranks(found.record)
    if rank is not None and rank != "-" and not rank.isdigit():
        raise SpecError(f"{rank!r} is not a rank; give 0, 1, ..., or - for cvlaunch's own lines", key="--rank")
    with _detached(found, "logs --follow"):
        for line in found.logs(follow=follow):
            if rank not in (None, line.rank):
                continue
            if out.as_json:
                out.json_line(log_json(line))
            else:
                out.data(clean(log_text(line, ranked=ranked, timestamps=timestamps), colours=sys.stdout.isatty()))


@contextlib.contextmanager
def _detached(run: Run, how: str) -> Iterator[None]:
    from launcher.cli.following import goes_on

    try:
        yield
    except KeyboardInterrupt:
        if run.status().state.terminal:
            raise
        raise Interrupted(goes_on(run.id, f"{how} {run.id}")) from None


@click.command()
@run_argument
@click.option("--csv", "as_csv", is_flag=True, help="Print a table with a line for each step.")
@click.option("-f", "--follow", is_flag=True, help="Print values as they come, until the run has ended.")
@json_option
def metrics(*, run: str, as_csv: bool, follow: bool, out: Out) -> None:
    """Print a run's metrics by epoch.

    --json prints every value by step; with --follow, a JSON object a line. Works while the run goes on.
    """
    if as_csv and (follow or out.as_json):
        raise SpecError("--csv goes with neither --follow nor --json")
    found = find_run(run)
    if follow:
        with _detached(found, "metrics --follow"):
            _follow_metrics(found, out)
    elif as_csv:
        click.echo(found.metrics().to_csv(), nl=False)
    elif out.as_json:
        out.data(found.metrics().to_json())
    else:
        print_metrics(found.metrics(), out)


def _follow_metrics(run: Run, out: Out) -> None:
    from launcher.cli.shapes import point_json

    for event in run.follow():
        if not isinstance(event, Point):
            continue
        if out.as_json:
            out.json_line(point_json(event))
        else:
            epoch = f"epoch {event.epoch} " if event.epoch is not None else ""
            values = "  ".join(f"{name} {format_value(value)}" for name, value in event.values.items())
            out.data(f"{epoch}step {event.step} {event.split}: {values}")


def print_metrics(found: Metrics, out: Out, *, err: bool = False) -> None:
    """A row an epoch. On a terminal, the columns that fit it; the others are named below."""
    rows = found.by_epoch()
    if not rows:
        out.note("no metrics yet")
        return
    counted = "EPOCH" if rows[0].epoch is not None else "STEP"
    cells = {
        name: [format_value(row.values[name]) if name in row.values else "" for row in rows] for name in found.names
    }
    stream = sys.stderr if err else sys.stdout
    shown, left = _that_fit(cells, shutil.get_terminal_size().columns if stream.isatty() else 10**6)
    columns = [Column(counted, right=True), *(Column(name, right=True) for name in shown)]
    first = [str(row.step if row.epoch is None else row.epoch) for row in rows]
    if not (err and out.quiet):
        out.table(columns, list(zip(first, *(cells[name] for name in shown), strict=True)), err=err)
    if left:
        out.note(f"{len(left)} more: {', '.join(left)}; all: cvlaunch metrics --csv")


def _that_fit(cells: dict[str, list[str]], width: int) -> tuple[list[str], list[str]]:
    """Names in their order, those of least interest left out: what was validated counts most, rates least."""
    room = width - 7
    chosen: list[str] = []
    for name in sorted(cells, key=_interest):
        need = 2 + max(len(name), *map(len, cells[name]))
        if need <= room or not chosen:
            chosen.append(name)
            room -= need
    return [name for name in cells if name in chosen], [name for name in cells if name not in chosen]


def _interest(name: str) -> int:
    from launcher.metrics import Goal, goal_of

    return (goal_of(name) is Goal.NONE) * 2 + (not name.startswith("val/") and name != "train/loss")


@click.command()
@click.argument("one", metavar="RUN", shell_complete=complete_runs)
@click.argument("other", metavar="RUN", shell_complete=complete_runs)
@click.option("--all", "all_packages", is_flag=True, help="Name every package that differs, however many.")
@json_option
def diff(*, one: str, other: str, all_packages: bool, out: Out) -> int:
    """Say whether two runs are the same job.

    Exits with 0 if they are, with 1 and a list of the differences if they are not. What they were told besides, and
    what they had around them (machine, versions, packages), is told apart; what no digest covers is listed as unpinned.
    """
    found = find_run(one).diff(find_run(other))
    if out.as_json:
        out.document(found.to_json())
    else:
        _print_comparison(found, out, all_packages=all_packages)
    return 0 if found.identical else 1


def _print_comparison(found: Comparison, out: Out, *, all_packages: bool) -> None:
    out.data("identical job" if found.identical else "different jobs")
    _print_differences("", found.differences, out)
    _print_differences("elsewhere", found.elsewhere, out)
    around = [str(difference) for difference in found.surroundings]
    around += _package_lines(found.packages, all_packages=all_packages)
    _print_differences("same job, other surroundings" if found.identical else "other surroundings", around, out)
    for reason in found.not_compared:
        out.data(clean(f"surroundings not compared: {reason}", colours=False))
    for reason in found.unpinned:
        out.data(f"unpinned: {reason}")


def _print_differences(title: str, differences: Sequence[Difference | str], out: Out) -> None:
    if differences and title:
        out.data(f"{title}:")
    for difference in differences:
        out.data(clean(f"  {difference}", colours=False))


def _package_lines(packages: Sequence[Difference], *, all_packages: bool) -> list[str]:
    if len(packages) > _MOST_PACKAGES and not all_packages:
        return [f"packages: {len(packages)} differ; --all names them"]
    return [f"package {difference}" for difference in packages]


@click.command()
@run_argument
@click.argument("to", metavar="[FOLDER]", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--include", metavar="PATTERN", multiple=True, help="Only these: model/*. May be repeated.")
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Not these: checkpoints/**. May be repeated.")
@json_option
def sync(*, run: str, to: Path, include: tuple[str, ...], exclude: tuple[str, ...], out: Out) -> None:
    """Bring a run's files to this machine.

    They go to FOLDER/RUN (runs/RUN): only what is new or changed, also while it runs. Prints that folder.
    """
    found = find_run(run)
    with out.progress(f"syncing {found.id}") as progress:
        result = found.sync(to, include=include, exclude=exclude, progress=progress)
    folder = to / found.id
    if out.as_json:
        counted = {"files": result.files, "bytes": result.bytes, "skipped": result.skipped}
        out.document({"run_id": found.id, "folder": str(folder.absolute()), **counted})
    else:
        out.data(str(folder))
        out.note(f"{result.files} files, {format_size(result.bytes)}; {result.skipped} were there already")


@click.command()
@runs_argument
@click.option("--out", "to", type=click.Path(path_type=Path), metavar="FILE", help="Where the page is written.")
@json_option
def report(*, run: tuple[str, ...], to: Path | None, out: Out) -> None:
    """Write an HTML page about one run or several.

    Brings what it needs first. Several runs stand side by side with their differences. Prints the page's path.
    """
    from launcher.report import write_report

    found = [find_run(text) for text in run]
    folders = []
    for one in found:
        out.note(f"syncing {one.id}")
        folders.append(one.synced_folder())
    path = write_report(folders, to or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html")))
    if out.as_json:
        out.document({"report": str(path.absolute()), "runs": [one.id for one in found]})
    else:
        out.data(str(path))
