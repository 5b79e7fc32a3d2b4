"""Where no store is reached: what the runner keeps, put where the platform packs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.contract import JOB, MIRROR, PACKED, STARTED, is_marker
from launcher.runner.place import Place
from launcher.stores import is_part_file

__all__ = ["DATA", "pack"]

DATA = "output/data"
"""What SageMaker packs into output.tar.gz, and what the command keeps there is the command's own."""


def pack(place: Place) -> None:
    """This node's part of the run's folder to `output/data/.cvlaunch/`, by hard links where that can be."""
    mirror, packed = place.layout.root / MIRROR, place.layout.root / DATA / PACKED
    shutil.rmtree(packed, ignore_errors=True)
    for path in _kept(mirror / place.where, first=place.first):
        to = packed / path.relative_to(mirror)
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, to)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, to)


def _kept(home: Path, *, first: bool) -> Iterator[Path]:
    files = (STARTED, JOB) if first else (STARTED,)
    yield from (home / name for name in files if (home / name).is_file())
    for path in (home / "output").rglob("*"):
        if path.is_file() and not is_part_file(path.name) and not is_marker(path.name):
            yield path
