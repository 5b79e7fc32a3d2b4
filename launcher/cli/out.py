"""What is printed and where: data on stdout, messages on stderr; rich on a terminal, plain text in a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.stores import Progress

__all__ = ["Column", "Out", "clean", "console", "style_of_state"]

_UNSAFE = re.compile(
    r"\x1b\[[0-9;]*m|\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STATE_STYLES = {
    "SUCCEEDED": "green",
    "RUNNING": "cyan",
    "FINALIZING": "cyan",
    "FAILED": "red",
    "ERROR": "red",
    "LOST": "red",
    "TIMED_OUT": "red",
    "CANCELLED": "dim",
    "NOT_SUBMITTED": "dim",
}


@dataclass(frozen=True)
class Column:
    """style: rich's word for a cell's text. whole: never cut on a narrow terminal."""

    title: str
    right: bool = False
    whole: bool = True
    style: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Out:
    """as_json: one JSON document instead of tables. quiet: no messages but errors."""

    as_json: bool = False
    quiet: bool = False

    def data(self, text: str) -> None:
        click.echo(text)

    def document(self, value: object) -> None:
        click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))

    def json_line(self, value: object) -> None:
        click.echo(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))

    def note(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
        rows = [[clean(cell, colours=False) for cell in row] for row in rows]
        stream = sys.stderr if err else sys.stdout
        if stream.isatty():
            _rich_table(columns, rows, stream)
        else:
            click.echo("\n".join(_aligned(columns, rows)), err=err)

    def fields(self, values: Mapping[str, str]) -> None:
        """`key  value` lines; empty values are left out."""
        shown = {key: clean(value, colours=False) for key, value in values.items() if value}
        width = max(map(len, shown), default=0)
        for key, value in shown.items():
            title = click.style(f"{key:<{width}}", bold=True) if "NO_COLOR" not in os.environ else f"{key:<{width}}"
            click.echo(f"{title}  {value}")

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """A bar on stderr where that is a terminal, else None."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Bar(*parts, TimeRemainingColumn(), console=console(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


def style_of_state(state: str) -> str:
    return _STATE_STYLES.get(state, "yellow")


def clean(text: str, *, colours: bool) -> str:
    """Without what would move a terminal's cursor or change its title; colours: sequences that only colour stay."""
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda m: m[0] if colours and _COLOUR.fullmatch(m[0]) else "", text).replace("\n", " ")


def _aligned(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [[column.title for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _rich_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=column.whole, overflow="fold"
        )
    for row in rows:
        styled = zip(row, columns, strict=True)
        table.add_row(*(Text(cell, style=column.style(cell) if column.style else "") for cell, column in styled))
    console(stream).print(table)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
