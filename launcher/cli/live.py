"""How a run is shown while somebody follows it: a live line on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import click

from launcher.cli.out import Out, clean, console, style_of_state
from launcher.cli.shapes import log_json, point_json, status_json
from launcher.metrics import Point, format_value
from launcher.quantities import format_duration
from launcher.status import Status

if TYPE_CHECKING:
    from rich.text import Text

    from launcher.backends.base import LogLine
    from launcher.ledger import RunRecord
    from launcher.run import Run

__all__ = ["View", "has_ranks", "log_text", "view_of"]


class View(Protocol):
    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, event: LogLine | Status | Point) -> None: ...


def view_of(run: Run, out: Out, *, err: bool) -> View:
    """err: show it on stderr, because stdout belongs to somebody else."""
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
        self.ranked = has_ranks(run.record)
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

    def why(self) -> str:
        """What it waits for. Why it has ended is told at the end."""
        return "" if self.status.state.terminal else clean(self.status.reason, colours=False)


def _short(split: str, name: str) -> str:
    return name if split == "train" else f"{split} {name}"


def _interest(item: tuple[str, float]) -> tuple[int, str]:
    """Training loss first, then what was validated, then rates."""
    name = item[0]
    rank = 0 if name == "loss" else 1 if name.startswith("val ") else 2
    return rank, name


def has_ranks(record: RunRecord) -> bool:
    """Whether several processes write its log."""
    job = record.job.get("job_file", {})
    return bool(job.get("nodes", 1) * job.get("processes", 1) > 1)


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
        why = self._progress.why()
        parts = Text() if why else Text(no_wrap=True, overflow="ellipsis")  # reasons are read to their end
        parts.append(state, style=f"bold {style_of_state(state)}")
        for part in (self._progress.elapsed(), self._progress.metrics(), why):
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
        self._progress, self._out, self._err, self._why = progress, out, err, ""

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: LogLine | Status | Point) -> None:
        if isinstance(event, Status):
            changed = event.state is not self._progress.status.state
            self._progress.status = event
            why = self._progress.why()
            if changed or (why and why != self._why):
                self._out.note(f"state: {event.state}{f': {why}' if why else ''}")
            self._why = why
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
