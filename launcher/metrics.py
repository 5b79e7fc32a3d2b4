"""Metrics of a run: `output/metrics.jsonl`, one object a line.

    {"step": 64, "epoch": 2, "time": 1763766000.5, "split": "val", "values": {"loss": 0.31, "accuracy": 0.94}}

A run that resumes appends again from its checkpoint, so of each (split, step, name) the last line counts.
A value that is no number (null, NaN, Infinity) is kept: that a loss became NaN is news.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from launcher.errors import SpecError, UnsupportedError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Goal", "Metrics", "Point", "Reader", "Row", "format_value", "goal_of", "parse_lines"]

Mode = Literal["auto", "min", "max"]

_LARGEST_STEP = 2**53
_LOW = re.compile(r"(?:^|[^a-z])(?:loss|losses|error|errors|err|mae|mse|rmse|nll|perplexity)(?:$|[^a-z])|loss$|error$")
_NONE = re.compile(r"(?:^|[^a-z])(?:lr|lrs|rate|learning_rate|epoch|step|time|seconds?|memory|momentum)(?:$|[^a-z])")
_COLUMNS = ("step", "epoch", "time", "split")


class Goal(StrEnum):
    """Which values of a metric are better. NONE: neither, such as a learning rate."""

    LOW = "low"
    HIGH = "high"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Point:
    """Values of one split at one step. time: Unix seconds. A value may be NaN or infinite."""

    step: int
    epoch: int | None
    time: float
    split: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """The last values of an epoch, by full name (`val/loss`). step: the last one of the epoch.

    epoch is None in a run that writes no epochs; its rows are steps.
    """

    epoch: int | None
    step: int
    values: Mapping[str, float]


def goal_of(name: str) -> Goal:
    """Judged by the last part of the name: loss and error are better low, rates and times neither, all else high."""
    word = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.rsplit("/", 1)[-1]).lower()
    if _LOW.search(word):
        return Goal.LOW
    return Goal.NONE if _NONE.search(word) or "/lr/" in name else Goal.HIGH


def format_value(value: float) -> str:
    """Four significant digits: `0.9833`, `1.2e-05`, `512`, `NaN`, `∞`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def parse_lines(data: bytes | str) -> list[Point]:
    """The points in file order, repeated ones included. What is no point, such as a torn last line, is left out."""
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    return [point for line in raw.split(b"\n") if (point := _parse_line(line)) is not None]


@dataclass(frozen=True)
class Metrics:
    """All values of a run: `points` has one point for each (step, split), by step.

    Build it with `of`, `from_file` or `from_bytes`, which merge.
    """

    points: tuple[Point, ...] = ()

    @classmethod
    def of(cls, points: Iterable[Point]) -> Metrics:
        """Merges points in the order in which they were written: the last value of each (split, step, name) stays."""
        merged: dict[tuple[int, str], Point] = {}
        for point in points:
            key = (point.step, point.split)
            earlier = merged.get(key)
            merged[key] = _merge(earlier, point) if earlier else point
        return cls(tuple(sorted(merged.values(), key=lambda p: p.step)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Metrics:
        return cls.of(parse_lines(data))

    @classmethod
    def from_file(cls, path: Path | str) -> Metrics:
        """OSError if the file can't be read."""
        return cls.from_bytes(Path(path).read_bytes())

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, float]]]:
        series: dict[str, list[tuple[int, float]]] = {}
        for point in self.points:
            for name, value in point.values.items():
                series.setdefault(f"{point.split}/{name}", []).append((point.step, value))
        return series

    @property
    def names(self) -> tuple[str, ...]:
        """Full names in order of appearance: `train/loss`, `val/accuracy`."""
        return tuple(self._series)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) by step. SpecError for an unknown name."""
        if name not in self._series:
            known = ", ".join(self.names[:10]) or "none"
            raise SpecError(f"{name!r} is not a metric of this run{nearest(name, self.names)} (there are: {known})")
        return list(self._series[name])

    def last(self, name: str) -> tuple[int, float]:
        """(step, value) of the highest step."""
        return self.series(name)[-1]

    def best(self, name: str, mode: Mode = "auto") -> tuple[int, float]:
        """(step, value) of the best finite value, the earliest if several are; the last one if none is finite.

        auto: `goal_of(name)`, where NONE counts as high.
        """
        series = self.series(name)
        finite = [pair for pair in series if math.isfinite(pair[1])]
        if not finite:
            return series[-1]
        low = goal_of(name) is Goal.LOW if mode == "auto" else mode == "min"
        return min(finite, key=lambda pair: pair[1] if low else -pair[1])

    def summary(self) -> dict[str, float]:
        """Full name → last value."""
        return {name: series[-1][1] for name, series in self._series.items()}

    def by_epoch(self) -> list[Row]:
        """One row an epoch; points without one are left out, unless none has one: then one row a step."""
        epochs = any(point.epoch is not None for point in self.points)
        rows: dict[int, tuple[int, dict[str, float]]] = {}
        for point in self.points:
            if epochs and point.epoch is None:
                continue
            key = point.step if point.epoch is None else point.epoch
            values = rows[key][1] if key in rows else {}
            values.update((f"{point.split}/{name}", value) for name, value in point.values.items())
            rows[key] = (point.step, values)
        return [
            Row(key if epochs else None, step, MappingProxyType(values)) for key, (step, values) in sorted(rows.items())
        ]

    def to_json(self) -> str:
        """A JSON array of points as in the file; what is no finite number is null, so that every reader takes it."""
        return json.dumps([_as_json(point) for point in self.points], allow_nan=False)

    def to_csv(self) -> str:
        """A table: step, epoch, time, split, then a column a value name; empty where a point has no such value."""
        columns = self._value_columns()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_COLUMNS, *columns.values()])
        for point in self.points:
            epoch = "" if point.epoch is None else point.epoch
            writer.writerow([point.step, epoch, point.time, point.split, *(point.values.get(n, "") for n in columns)])
        return text.getvalue()

    def to_pandas(self) -> pd.DataFrame:
        """The table of `to_csv` as a pandas DataFrame. UnsupportedError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise UnsupportedError("to_pandas needs pandas: pip install 'cvlaunch[report]'") from error
        columns = self._value_columns()
        frame = {
            "step": pd.array([p.step for p in self.points], dtype="int64"),
            "epoch": pd.array([p.epoch for p in self.points], dtype="Int64"),
            "time": pd.array([p.time for p in self.points], dtype="float64"),
            "split": [p.split for p in self.points],
        }
        for name, column in columns.items():
            frame[column] = [p.values.get(name, math.nan) for p in self.points]
        return pd.DataFrame(frame)

    def _value_columns(self) -> dict[str, str]:
        """Value name → column; a value called `step` becomes `values/step`."""
        names = dict.fromkeys(name for point in self.points for name in point.values)
        return {name: f"values/{name}" if name in _COLUMNS else name for name in names}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td>"
            f"<td>{format_value(self.last(name)[1])}</td><td>{format_value(self.best(name)[1])}</td>"
            f"<td>{self.best(name)[0]}</td><td>{len(series)}</td></tr>"
            for name, series in self._series.items()
        )
        head = "<tr><th>metric</th><th>last</th><th>best</th><th>at step</th><th>values</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


class Reader:
    """Follows a growing file: `feed` it what was appended, in pieces of any size, and get the points now complete."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Point]:
        complete, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._rest += data
            return []
        points = parse_lines(self._rest + complete)
        self._rest = rest
        return points


def _merge(earlier: Point, later: Point) -> Point:
    epoch = earlier.epoch if later.epoch is None else later.epoch
    return Point(later.step, epoch, later.time, later.split, {**earlier.values, **later.values})


def _as_json(point: Point) -> dict[str, object]:
    values = {name: value if math.isfinite(value) else None for name, value in point.values.items()}
    return {"step": point.step, "epoch": point.epoch, "time": point.time, "split": point.split, "values": values}


def _parse_line(line: bytes) -> Point | None:
    line = line.strip()
    if not line:
        return None
    point = _parse_object(line)
    # A killed writer leaves half a line, and its successor's first line follows on the same one.
    start = 0
    for _ in range(3):
        if point is not None or (start := line.find(b"{", start + 1)) < 0:
            break
        point = _parse_object(line[start:])
    return point


def _parse_object(line: bytes) -> Point | None:
    try:
        raw = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("values"), dict):
        return None
    step = _whole(raw.get("step"))
    if step is None:
        return None
    values = {_clean(name): v for name, value in raw["values"].items() if (v := _value(value)) is not None}
    split = raw.get("split")
    time = _value(raw.get("time"))
    return Point(
        step=step,
        epoch=_whole(raw.get("epoch")),
        time=time if time is not None and math.isfinite(time) else 0.0,
        split=_clean(split) if isinstance(split, str) and split else "train",
        values=values,
    )


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_STEP:
        return None
    return int(value)


def _value(value: object) -> float | None:
    """A float for a number, NaN for null, None for what was never a number."""
    if type(value) is float:  # nearly always
        return value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can spell and no file or terminal can take."""
    return text if text.isascii() else text.encode(errors="replace").decode()
