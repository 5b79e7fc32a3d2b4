"""The confusion matrix of a classifier: counts, quality of each class, and what is drawn of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from launcher.metrics import format_value

__all__ = ["Cell", "ClassRow", "Confusion", "HeatMap", "Pair"]

_TABLE_UP_TO = 25
"""Classes: beyond, counts don't fit a screen and a heat map with tooltips is drawn."""
_MAP_UP_TO = 250
_PAIRS = 15
_CELL = 8.0
_LABEL_WIDTH = 92.0
_LONGEST_LABEL = 18
_FAINTEST = 10
"""Per cent of colour: a single confusion among thousands must still be seen."""


@dataclass(frozen=True)
class Cell:
    """One cell. kind: `hit` on the diagonal, else `miss`, `zero` if empty.

    shade: per cent of colour. Of a hit its share of the row; of a miss the root of it, as misses are small shares.
    """

    text: str
    shade: int
    kind: str
    title: str
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class ClassRow:
    """Quality of one class, as text; a ratio with nothing to divide by is `–`. bar: recall in per cent."""

    name: str
    support: str
    precision: str
    recall: str
    f1: str
    bar: int


@dataclass(frozen=True)
class Pair:
    """`count` images of class `true` were taken for `predicted`: `share` of that class."""

    true: str
    predicted: str
    count: str
    share: str


@dataclass(frozen=True)
class HeatMap:
    """An SVG of cells without text, for many classes. labels: (short name, position) along both axes."""

    size: float
    left: float
    cell: float
    cells: tuple[Cell, ...]
    labels: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Confusion:
    """counts[i][j]: images of class i that were taken for class j."""

    classes: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]

    @classmethod
    def from_csv(cls, data: bytes) -> Confusion:
        """Header row with an empty cell, then the classes; a row for each true class. ValueError if it isn't so."""
        try:
            rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
        except csv.Error as error:
            raise ValueError(f"not a CSV table: {error}") from error
        if len(rows) < 2:
            raise ValueError("expected a header row and a row for each class")
        classes = tuple(rows[0][1:])
        if tuple(row[0] for row in rows[1:]) != classes:
            raise ValueError("rows and columns name different classes")
        return cls(classes, tuple(_counts(row, len(classes)) for row in rows[1:]))

    @cached_property
    def _true(self) -> list[float]:
        return [sum(row) for row in self.counts]

    @cached_property
    def _predicted(self) -> list[float]:
        return [sum(column) for column in zip(*self.counts, strict=True)]

    @property
    def accuracy(self) -> str:
        return _percent(sum(self.counts[i][i] for i in range(len(self.classes))), sum(self._true))

    @property
    def images(self) -> str:
        return format_value(sum(self._true))

    @property
    def as_table(self) -> bool:
        return len(self.classes) <= _TABLE_UP_TO

    @property
    def as_map(self) -> bool:
        return _TABLE_UP_TO < len(self.classes) <= _MAP_UP_TO

    @property
    def rows(self) -> list[tuple[str, list[Cell]]]:
        """(true class, its cells)."""
        return [(name, [self._cell(i, j) for j in range(len(self.classes))]) for i, name in enumerate(self.classes)]

    @property
    def heat_map(self) -> HeatMap:
        n = len(self.classes)
        cells = [self._cell(i, j) for i in range(n) for j in range(n) if self.counts[i][j]]
        every = math.ceil(n / 110)
        labels = [(_short(name), (i + 0.5) * _CELL) for i, name in enumerate(self.classes) if i % every == 0]
        return HeatMap(n * _CELL, _LABEL_WIDTH, _CELL, tuple(cells), tuple(labels))

    @property
    def class_rows(self) -> list[ClassRow]:
        """In the order of the classes; with more than fit a screen, the worst recall first."""
        order: Sequence[int] = range(len(self.classes))
        if not self.as_table:
            order = sorted(order, key=lambda i: self.counts[i][i] / self._true[i] if self._true[i] else 2.0)
        return [self._class_row(i) for i in order]

    @property
    def worst_pairs(self) -> list[Pair]:
        """The largest confusions by count."""
        n = range(len(self.classes))
        pairs = [(self.counts[i][j], i, j) for i in n for j in n if i != j and self.counts[i][j]]
        pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
        return [
            Pair(self.classes[i], self.classes[j], format_value(count), _percent(count, self._true[i]))
            for count, i, j in pairs[:_PAIRS]
        ]

    def _cell(self, i: int, j: int) -> Cell:
        count = self.counts[i][j]
        share = count / self._true[i] if self._true[i] else 0.0
        shade = round(100 * (share if i == j else math.sqrt(share)))
        kind = "zero" if not count else "hit" if i == j else "miss"
        what = "right" if i == j else f"taken for {self.classes[j]}"
        title = f"{self.classes[i]}: {format_value(count)} of {format_value(self._true[i])} {what} ({share:.0%})"
        return Cell(format_value(count), max(shade, _FAINTEST) if count else 0, kind, title, j * _CELL, i * _CELL)

    def _class_row(self, i: int) -> ClassRow:
        hits, true, predicted = self.counts[i][i], self._true[i], self._predicted[i]
        return ClassRow(
            name=self.classes[i],
            support=format_value(true),
            precision=_percent(hits, predicted),
            recall=_percent(hits, true),
            f1=_percent(2 * hits, true + predicted),
            bar=round(100 * hits / true) if true else 0,
        )


def _counts(row: list[str], n: int) -> tuple[float, ...]:
    if len(row) != n + 1:
        raise ValueError(f"the row of {row[0][:40]!r} has {len(row) - 1} counts, expected {n}")
    counts = tuple(float(text) for text in row[1:])
    if not all(0 <= count <= 1e15 for count in counts):
        raise ValueError(f"the row of {row[0][:40]!r} holds a count that is not a number from 0")
    return counts


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
