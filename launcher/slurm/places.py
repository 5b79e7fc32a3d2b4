"""Where things stand on a cluster, below the target's `root`. Paths are POSIX paths of the cluster, as text."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from launcher._version import __version__
from launcher.contract import sha256_file
from launcher.paths import trainer_folder

__all__ = ["environment", "image", "images", "library", "lock_hash", "python_of", "record", "runs"]


def library(root: str) -> str:
    """Our own package, as jobs import it: a link to a folder that is named after its content."""
    return f"{root}/cvlaunch-{__version__}"


def environment(root: str, requirements: Path | None = None) -> str:
    """The environment of a lock: the trainer image's, or one of the user's own."""
    return f"{root}/env-{lock_hash(requirements)}"


def lock_hash(requirements: Path | None = None) -> str:
    return sha256_file(requirements or trainer_folder() / "requirements.lock")[:12]


def python_of(environment: str) -> str:
    return f"{environment}/bin/python"


def images(root: str) -> str:
    return f"{root}/images"


def image(root: str, reference: str, *, digest: str | None, ending: str) -> str:
    """The file or folder of an image: named after its digest, or, where that is not known, after its name.

    ending: `.sif`, `.sqsh`, or empty for a folder.
    """
    name = digest.removeprefix("sha256:")[:16] if digest else hashlib.sha256(reference.encode()).hexdigest()[:16]
    slug = re.sub(r"[^a-z0-9]+", "-", reference.partition("@")[0].rpartition("/")[2].lower()).strip("-")
    return f"{images(root)}/{slug}-{name}{ending}"


def record(root: str, run_id: str) -> str:
    """What is kept of a job beside its results: the script, SLURM's ids, its output, how it ended."""
    return f"{root}/jobs/{run_id}"


def runs(root: str) -> str:
    return f"{root}/runs"
