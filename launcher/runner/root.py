"""Where the job's folders stand on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launcher.contract import DEFAULT_ROOT, MIRROR, OUTPUT_FOLDERS, JobFile, Layout
from launcher.errors import SpecError
from launcher.stores import file_uri, join_uri, path_of

__all__ = ["choose_root", "in_place", "make_folders", "run_folder", "scratch_folder", "writable"]


def in_place(job: JobFile) -> bool:
    """Whether the root *is* the run's folder, so that nothing is uploaded."""
    return job.movers.get("output") == "in_place"


def run_folder(job: JobFile, layout: Layout) -> str:
    """URI of the run's folder, as the runner reaches it."""
    if in_place(job):
        return file_uri(layout.root)
    if job.movers.get("output") == "platform":
        return file_uri(layout.root / MIRROR)
    return join_uri(job.output, job.run_id)


def choose_root(job: JobFile, environ: Mapping[str, str]) -> tuple[Layout, str]:
    """(layout, what to say about it). SpecError if no folder can be written.

    In place, `$CVLAUNCH_ROOT` counts (a container sees the run's folder elsewhere), then the output's folder.
    """
    if in_place(job):
        return Layout(_in_place_root(job, environ)), ""
    wanted = Path(environ.get("CVLAUNCH_ROOT") or DEFAULT_ROOT)
    if "platform" in job.movers.values():
        _check_taken_folders(wanted)
    if writable(wanted):
        return Layout(wanted), ""
    instead = Path(environ.get("TMPDIR") or "/tmp") / "cvlaunch" / job.run_id  # noqa: S108 - named in the contract
    if writable(instead):
        return Layout(instead), f"{wanted} can't be written by uid {os.getuid()}; the root is {instead}"
    raise SpecError(f"neither {wanted} nor {instead} can be written by uid {os.getuid()}; set CVLAUNCH_ROOT")


def _check_taken_folders(root: Path) -> None:
    """SpecError if a folder can't be written from which the platform takes results: it looks nowhere else."""
    folder = next((path for path in (root, *(root / name for name in OUTPUT_FOLDERS)) if not writable(path)), None)
    if folder:
        raise SpecError(
            f"uid {os.getuid()} can't write to {folder}, and what is written elsewhere is lost on this platform, whose "
            "folders are root's: let the image's USER be root (`USER 0` at the end of its Dockerfile, or of one that "
            "begins FROM it)"
        )


def _in_place_root(job: JobFile, environ: Mapping[str, str]) -> Path:
    if environ.get("CVLAUNCH_ROOT"):
        return Path(environ["CVLAUNCH_ROOT"])
    local = job.output.startswith(("file://", "/"))
    return path_of(job.output) / job.run_id if local else Path(DEFAULT_ROOT)


def writable(folder: Path) -> bool:
    """Tried, not asked: read-only mounts, quotas and network file systems answer `access` wrongly."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def make_folders(layout: Layout) -> None:
    """SpecError where the platform made a folder on the way to a mount point, and made it its own."""
    for folder in (layout.job.parent, layout.stop.parent, layout.checkpoints, layout.model, layout.output):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            above = next(path for path in folder.parents if path.exists())
            raise SpecError(
                f"uid {os.getuid()} can't make {folder}: {above} belongs to uid {above.stat().st_uid}. "
                "Where data is mounted below the root, its folders have to be there first, or be volumes too"
            ) from error


def scratch_folder(layout: Layout) -> Path:
    """A new folder for caches and torchrun's files; below the root where there is no writable /tmp."""
    try:
        return Path(tempfile.mkdtemp(prefix="cvlaunch-"))
    except OSError:
        layout.root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".scratch-", dir=layout.root))
