"""Confusion matrix and per-class table, as CSV to compute with and PNG to look at."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["write_confusion", "write_per_class"]

_NUMBERS_UP_TO = 20
_NAMES_UP_TO = 200


def write_confusion(folder: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """`confusion_matrix.csv` and `.png`. matrix: [true, predicted] counts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "confusion_matrix.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.astype(int).tolist(), strict=True))
    _draw(folder / "confusion_matrix.png", matrix, names)


def write_per_class(folder: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """`per_class.csv`: how often it is there, precision, recall and F1. Precision of a class never predicted is empty.

    matrix: [true, predicted]; rows and columns beyond `names`, a detector's background, count as mistakes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    right, true, predicted = (counts[: len(names)] for counts in (np.diag(matrix), matrix.sum(1), matrix.sum(0)))
    with (folder / "per_class.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "count", "precision", "recall", "f1"])
        for name, hits, there, claims in zip(names, right, true, predicted, strict=True):
            shares = (_share(hits, claims), _share(hits, there), _share(2 * hits, there + claims))
            writer.writerow([name, int(there), *shares])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.6f}" if whole else ""


def _draw(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Rows are coloured by the root of their shares, so that rare classes and rare mistakes show."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # without pyplot: half a second less, and no global state

    count = len(names)
    side = min(max(4.5, 2 + 0.42 * count if count <= _NUMBERS_UP_TO else 6 + 0.12 * count), 30)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if count <= _NAMES_UP_TO:
        size = float(np.clip(40 * side / count, 4, 9))
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= _NUMBERS_UP_TO:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, int(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=110)
