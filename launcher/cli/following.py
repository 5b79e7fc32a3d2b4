"""Following a run: log lines as they come, one live line of metrics, and what is done when it has ended."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import click

from launcher.cli.app import Interrupted
from launcher.cli.options import find_run, json_option, run_argument, runs_argument, seconds
from launcher.cli.out import Out, clean, console, style_of_state
from launcher.cli.shapes import log_json, point_json, run_json, status_json
from launcher.errors import CvlaunchError, UnreachableError
from launcher.metrics import Point, format_value
from launcher.quantities import format_duration
from launcher.status import State, Status

if TYPE_CHECKING:
    from rich.text import Text

    from launcher.backends.base import LogLine
    from launcher.run import Run

__all__ = ["follow_run", "goes_on", "log_text", "tell_end", "wait", "watch"]


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
    from launcher.watch import intervals

    ledger, said = Ledger(), set[tuple[str, str]]()
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = list(found)
    for pause in intervals(first=0.3, most=15.0):
        unended = {run_id for run_id in pending if not found[run_id].record.state.terminal}
        silent = refresh([found[run_id].record for run_id in pending], ledger=ledger)
        for target, why in silent:
            if (target, why) not in said:
                out.warn(f"target {target} could not be asked: {why}; asking again")
        said.update(silent)
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
        with _view(run, out, data_on_stderr) as view:
            for event in run.follow():
                view.show(event)
    except KeyboardInterrupt:
        raise Interrupted(goes_on(run.id, f"watch {run.id}")) from None
    except UnreachableError as error:
        if not run.record.state.terminal:
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
    except CvlaunchError as error:
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


# -- how a run is shown -----------------------------------------------------------------------------------------------


class _View(Protocol):
    def __enter__(self) -> _View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, event: LogLine | Status | Point) -> None: ...


def _view(run: Run, out: Out, err: bool) -> _View:
    if out.as_json:
        return _JsonLines(out)
    progress = _Progress(run)
    if (sys.stderr if err else sys.stdout).isatty():
        return _Terminal(progress, err)
    return _Plain(progress, out, err)


class _Progress:
    """What the live line says."""

    def __init__(self, run: Run) -> None:
        spec = run.record.job.get("spec", {})
        self._epochs = (spec.get("train") or {}).get("epochs")
        resources = spec.get("resources", {})
        self.ranked = resources.get("nodes", 1) * max(resources.get("gpus", 0), 1) > 1
        self._values: dict[str, float] = {}
        self._epoch: int | None = None
        self._step = 0
        self.status = run.record.last_status

    def add(self, point: Point) -> bool:
        """Whether this point is worth a line of its own where lines can't be replaced."""
        news = point.split != "train" or point.epoch != self._epoch
        self._epoch, self._step = point.epoch, point.step
        self._values |= {_short(point.split, name): value for name, value in point.values.items()}
        return news

    def metrics(self) -> str:
        of = f"/{self._epochs}" if self._epochs else ""
        where = f"epoch {self._epoch}{of}" if self._epoch is not None else f"step {self._step}"
        values = (f"{name} {format_value(value)}" for name, value in sorted(self._values.items(), key=_interest))
        return " · ".join([where, *values]) if self._values else ""

    def elapsed(self) -> str:
        return format_duration(max(0.0, time.time() - self.status.started)) if self.status.started else ""


def _short(split: str, name: str) -> str:
    return name if split == "train" else f"{split} {name}"


def _interest(item: tuple[str, float]) -> tuple[int, str]:
    """Training loss first, then what was validated, then rates."""
    name = item[0]
    rank = 0 if name == "loss" else 1 if name.startswith("val ") else 2
    return rank, name


def log_text(line: LogLine, *, ranked: bool, timestamps: bool = False) -> str:
    """The runner's own lines and, where there are several processes, each line says whose it is."""
    tag = "[cvlaunch] " if line.rank == "-" and line.time is not None else f"[{line.rank}] " if ranked else ""
    node = f"node {line.node} " if ranked and line.node else ""
    when = ""
    if timestamps and line.time is not None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(line.time))
        when = f"{moment}.{int(line.time % 1 * 1000):03}Z "
    return f"{when}{node}{tag}{line.text}"


class _Terminal:
    """Log lines scroll by above one live line."""

    def __init__(self, progress: _Progress, err: bool) -> None:
        from rich.live import Live

        self._progress = progress
        self._console = console(sys.stderr if err else sys.stdout)
        self._live = Live(get_renderable=self._line, console=self._console, transient=True, refresh_per_second=4)

    def _line(self) -> Text:
        from rich.text import Text

        state = str(self._progress.status.state)
        parts = Text(no_wrap=True, overflow="ellipsis")
        parts.append(state, style=f"bold {style_of_state(state)}")
        for part in (self._progress.elapsed(), self._progress.metrics()):
            if part:
                parts.append(f" · {part}")
        return parts

    def __enter__(self) -> _Terminal:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, event: LogLine | Status | Point) -> None:
        from rich.text import Text

        if isinstance(event, Status):
            self._progress.status = event
        elif isinstance(event, Point):
            self._progress.add(event)
        else:
            text = clean(log_text(event, ranked=self._progress.ranked), colours=True)
            style = "dim" if event.rank == "-" else ""
            self._console.print(Text.from_ansi(text, style=style), soft_wrap=True)


class _Plain:
    """Lines in the order in which things happen."""

    def __init__(self, progress: _Progress, out: Out, err: bool) -> None:
        self._progress, self._out, self._err = progress, out, err

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: LogLine | Status | Point) -> None:
        if isinstance(event, Status):
            if event.state is not self._progress.status.state:
                self._out.note(f"state: {event.state}")
            self._progress.status = event
        elif isinstance(event, Point):
            if self._progress.add(event):
                self._print(f"metrics: {self._progress.metrics()}")
        else:
            self._print(clean(log_text(event, ranked=self._progress.ranked), colours=False))

    def _print(self, text: str) -> None:
        """Beside a handle, log lines are messages; --quiet leaves them out."""
        if not (self._err and self._out.quiet):
            click.echo(text, err=self._err)


class _JsonLines:
    def __init__(self, out: Out) -> None:
        self._out = out

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: LogLine | Status | Point) -> None:
        if isinstance(event, Status):
            self._out.json_line({"type": "status", **status_json(event)})
        elif isinstance(event, Point):
            self._out.json_line({"type": "metrics", **point_json(event)})
        else:
            self._out.json_line({"type": "log", **log_json(event)})
