"""Checkpoints as the contract wants them: a folder a step, complete or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.contract import check_checkpoint, complete_checkpoint

__all__ = ["best_step", "prune", "save"]

_KEPT = 2


def save(root: Path, step: int, write: Callable[[Path], None], *, epoch: int, metric: float | None) -> None:
    """`write(folder)` fills the checkpoint of `step`. One that is already complete is left alone.

    It may be uploaded by then, and what the two would hold differs at most by an evaluation that a resume repeats.
    """
    target = root / str(step)
    if check_checkpoint(target) is not None:
        return
    part = root / f".{step}.part"
    for folder in (target, part):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    complete_checkpoint(part, step=step, epoch=epoch, metric=metric)
    part.rename(target)


def best_step(root: Path) -> int | None:
    """The step with the highest metric among the complete checkpoints, None without any."""
    found = {int(path.name): check_checkpoint(path) for path in root.glob("[0-9]*")}
    metrics = {step: facts["metric"] for step, facts in found.items() if facts and facts.get("metric") is not None}
    return max(metrics, key=metrics.__getitem__, default=None)


def prune(root: Path, *, best: int | None) -> None:
    """Keeps the last two and the best; removes what a killed process left half written."""
    steps = sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())
    kept = {*steps[-_KEPT:], best}
    for step in steps:
        if step not in kept:
            shutil.rmtree(root / str(step))
    for part in root.glob(".*.part"):
        shutil.rmtree(part)
