"""Puts read folders on a page. The template draws; here is decided what is shown and how runs compare.

The page needs no script and loads nothing: its Content-Security-Policy forbids both, so a run's text stays text.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.metrics import Goal, Row, format_value, goal_of
from launcher.quantities import format_duration
from launcher.report import charts
from launcher.report.folder import RunFolder, read_folder
from launcher.status import State

__all__ = ["render_report", "write_report"]

_MOST_CHARTS = 48
_MOST_ROWS = 200
_HEADLINES = 3
_SAME_JOB_ANYWAY = ("output", "movers", "storage", "cvlaunch", "contract", "tags")
"""Keys of job.json that say where and by what a run was handled, not what it does."""
_TONES = {
    State.SUCCEEDED: "good",
    State.FAILED: "bad",
    State.ERROR: "bad",
    State.TIMED_OUT: "bad",
    State.LOST: "bad",
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it. label: unique on the page. job_letter: equal letters are identical jobs."""

    run: RunFolder
    label: str
    colour: int
    dashed: bool
    tone: str
    started: str
    duration: str
    job_letter: str


@dataclass(frozen=True)
class MetricRow:
    """One metric of one run, as text."""

    name: str
    last: str
    best: str
    best_step: str
    values: str


@dataclass(frozen=True)
class Compared:
    """A cell of the side-by-side table: `text`, smaller `note`, and whether it is the best of its row."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Difference:
    """A key in which runs differ; a run without it has an empty text."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """Are these the same job? tone: `good`, `neutral` or `unsure`."""

    tone: str
    text: str


def render_report(folders: Sequence[Path]) -> str:
    """HTML of one run in full, or of several side by side. What a folder lacks is said on the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    views = _views([read_folder(folder) for folder in folders])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = _one(views[0]) if len(views) == 1 else _several(views)
    page = environment.get_template("page.html.j2").render(context, runs=views, geometry=charts)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", page).encode(errors="replace").decode()


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Writes the page and returns its path: `to`, or `report.html` in it if it is a folder. OSError if it can't."""
    path = to / "report.html" if to.is_dir() else to
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(render_report(folders), encoding="utf-8", newline="\n")
    return part.replace(path)


def _views(runs: Sequence[RunFolder]) -> list[RunView]:
    letters: dict[str, str] = {}
    for run in runs:
        if run.job_digest:
            letters.setdefault(run.job_digest, _letter(len(letters)))
    ids = [run.run_id for run in runs]
    return [
        RunView(
            run=run,
            label=run.run_id if ids.count(run.run_id) == 1 else f"{run.run_id} #{index + 1}",
            colour=index % charts.COLOURS,
            dashed=index >= charts.COLOURS,
            tone=_tone(run),
            started=_moment(run.started),
            duration="" if run.duration is None else format_duration(run.duration),
            job_letter=letters.get(run.job_digest, ""),
        )
        for index, run in enumerate(runs)
    ]


def _one(view: RunView) -> Mapping[str, object]:
    run = view.run
    splits = sorted({name.split("/", 1)[0] for name in run.metrics.names}, key=lambda s: (s != "train", s != "val", s))
    colours = {split: index for index, split in enumerate(splits)}
    drawn = [
        charts.draw(
            quantity,
            [charts.Curve(split, colours[split], run.metrics.series(f"{split}/{quantity}")) for split in group],
        )
        for quantity, group in _by_quantity(run.metrics.names).items()
    ]
    return {
        "title": run.name,
        "view": view,
        "charts": _shown(drawn),
        "metric_rows": _metric_rows(run),
        "headlines": _headlines(run),
        "epochs": _sampled(run.metrics.by_epoch()),
        "number": format_value,
    }


def _several(views: Sequence[RunView]) -> Mapping[str, object]:
    names = list(dict.fromkeys(name for view in views for name in view.run.metrics.names))
    drawn = [
        charts.draw(
            name, [charts.Curve(v.label, i, v.run.metrics.series(name)) for i, v in enumerate(views) if _has(v, name)]
        )
        for name in sorted(names, key=_chart_order)
    ]
    jobs = [{k: t for k, t in v.run.job.items() if k.split(".")[0] not in _SAME_JOB_ANYWAY} for v in views]
    return {
        "title": f"{len(views)} runs" if views else "No runs",
        "view": None,
        "charts": _shown(drawn),
        "compared": [(name, _compared(views, name)) for name in sorted(_all_names(views), key=_chart_order)],
        "identity": _identity(views),
        "job_differences": _differences(jobs),
        "environment_differences": _differences([view.run.environment for view in views]),
        "package_differences": sorted(_differences([view.run.packages for view in views]), key=lambda d: d.key),
    }


def _by_quantity(names: Iterable[str]) -> dict[str, list[str]]:
    """Quantity → splits: `loss` → [`val`, `train`]."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_chart_order):
        split, quantity = name.split("/", 1)
        groups.setdefault(quantity, []).append(split)
    return groups


def _chart_order(name: str) -> tuple[int, str, int]:
    """Loss, then what should rise, then other losses, then rates and times; validation before training."""
    quantity = name.split("/", 1)[-1]
    rank = 0 if quantity == "loss" else {Goal.HIGH: 1, Goal.LOW: 2, Goal.NONE: 3}[goal_of(name)]
    return rank, quantity, int(name.startswith("train/"))


def _shown(drawn: Sequence[charts.Chart | None]) -> list[charts.Chart]:
    return [chart for chart in drawn if chart is not None][:_MOST_CHARTS]


def _metric_rows(run: RunFolder) -> list[MetricRow]:
    """From metrics.jsonl; without it, the final values of result.json."""
    if not run.metrics.points:
        return [MetricRow(name, format_value(value), "", "", "") for name, value in run.final.items()]
    rows = []
    for name in sorted(run.metrics.names, key=_chart_order):
        best_step, best = run.metrics.best(name)
        neutral = goal_of(name) is Goal.NONE
        rows.append(
            MetricRow(
                name=name,
                last=format_value(run.metrics.last(name)[1]),
                best="" if neutral else format_value(best),
                best_step="" if neutral else str(best_step),
                values=str(len(run.metrics.series(name))),
            )
        )
    return rows


def _headlines(run: RunFolder) -> list[tuple[str, Compared]]:
    """The few metrics that a reader looks for first: what should rise, of validation if there is one, and the loss."""
    names = [name for name in run.metrics.names if goal_of(name) is not Goal.NONE]
    judged = [name for name in names if not name.startswith("train/")] or names
    rising = [name for name in judged if goal_of(name) is Goal.HIGH]
    losses = [name for name in judged if name.split("/", 1)[-1] == "loss"]
    chosen = [*rising[: _HEADLINES - 1 if losses else _HEADLINES], *losses[:1]] or judged[:_HEADLINES]
    return [(name, _cell(run, name)) for name in chosen]


def _cell(run: RunFolder, name: str) -> Compared:
    """The best value with the last one as a note; of a metric without better or worse, the last."""
    if name not in run.metrics.names:
        return Compared(format_value(run.final[name])) if name in run.final else Compared("")
    last_step, last = run.metrics.last(name)
    if goal_of(name) is Goal.NONE:
        return Compared(format_value(last), f"last, step {last_step}")
    step, best = run.metrics.best(name)
    note = f"step {step}, the last" if step == last_step else f"step {step} · last {format_value(last)}"
    return Compared(format_value(best), note)


def _all_names(views: Sequence[RunView]) -> dict[str, None]:
    return dict.fromkeys(name for view in views for name in view.run.metrics.names or view.run.final)


def _has(view: RunView, name: str) -> bool:
    return name in view.run.metrics.names


def _compared(views: Sequence[RunView], name: str) -> list[Compared]:
    """A row of the side-by-side table; the best is marked unless all are equal or nothing is better."""
    cells = [_cell(view.run, name) for view in views]
    values = [_best_value(view.run, name) for view in views]
    finite = [value for value in values if math.isfinite(value)]
    goal = goal_of(name)
    if goal is Goal.NONE or len(set(finite)) < 2:
        return cells
    winner = min(finite) if goal is Goal.LOW else max(finite)
    return [Compared(c.text, c.note, value == winner) for c, value in zip(cells, values, strict=True)]


def _best_value(run: RunFolder, name: str) -> float:
    return run.metrics.best(name)[1] if name in run.metrics.names else run.final.get(name, math.nan)


def _differences(runs: Sequence[Mapping[str, str]]) -> list[Difference]:
    keys = dict.fromkeys(key for run in runs for key in run)
    texts = {key: tuple(run.get(key, "") for run in runs) for key in keys}
    return [Difference(key, row) for key, row in texts.items() if len(set(row)) > 1]


def _identity(views: Sequence[RunView]) -> Identity:
    without = [view.label for view in views if not view.job_letter]
    if without:
        return Identity("unsure", f"Unknown: no job digest for {', '.join(without)}.")
    letters = {view.job_letter for view in views}
    if len(letters) > 1:
        groups = [(letter, [v.label for v in views if v.job_letter == letter]) for letter in sorted(letters)]
        members = "; ".join(f"{letter}: {', '.join(labels)}" for letter, labels in groups)
        return Identity("neutral", f"No, {len(letters)} different jobs. {members}.")
    unpinned = sorted({channel for view in views for channel in view.run.unpinned})
    if unpinned:
        return Identity(
            "unsure",
            f"Yes, as far as it is pinned: the data of {', '.join(unpinned)} has no fingerprint and may differ.",
        )
    return Identity("good", "Yes: all runs have the same job digest.")


def _sampled(rows: Sequence[Row]) -> list[Row]:
    every = math.ceil(len(rows) / _MOST_ROWS) or 1
    return [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]


def _tone(run: RunFolder) -> str:
    try:
        return _TONES.get(State(run.state), "neutral")
    except ValueError:
        return "neutral"


def _moment(seconds: float | None) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index - 25}"
