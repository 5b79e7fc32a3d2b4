"""Checkpoints as the contract wants them: a folder a step, complete or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from launcher.contract import being_uploaded, check_checkpoint, complete_checkpoint

__all__ = ["best_step", "prune", "save"]

_KEPT = 2
_TRIES = 5


def save(root: Path, step: int, write: Callable[[Path], None], *, epoch: int, metric: float | None) -> None:
    """`write(folder)` fills the checkpoint of `step`. One that is already complete is left alone.

    It may be uploaded by then, and what the two would hold differs at most by an evaluation that a resume repeats.
    """
    target = root / str(step)
    if check_checkpoint(target) is not None:
        return
    part = root / f".{step}.part"
    for folder in (target, part):
        _remove(folder)
    part.mkdir(parents=True, exist_ok=True)
    write(part)
    complete_checkpoint(part, step=step, epoch=epoch, metric=metric)
    part.rename(target)


def best_step(root: Path) -> int | None:
    """The step with the highest metric among the complete checkpoints, None without any."""
    found = {int(path.name): check_checkpoint(path) for path in root.glob("[0-9]*") if path.name.isdecimal()}
    metrics = {step: facts["metric"] for step, facts in found.items() if facts and facts.get("metric") is not None}
    return max(metrics, key=metrics.__getitem__, default=None)


def prune(root: Path, *, best: int | None) -> None:
    """Keeps the last two and the best; removes what a killed process left half written, or a platform half restored.

    What the platform is still sending stays until the next time.
    """
    steps = sorted((p for p in root.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name), reverse=True)
    whole = (folder for folder in steps if check_checkpoint(folder, read=False) is not None)
    kept = {*islice(whole, _KEPT), root / str(best)}
    for folder in (*steps, *root.glob(".*.part")):
        if folder not in kept and not being_uploaded(folder):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Again, as a platform that uploads it may put a marker there meanwhile; what is left then is for the next time."""
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
