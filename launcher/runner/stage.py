"""Brings in what the platform didn't mount: channels, the newest checkpoint, what earlier attempts measured."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from launcher.contract import (
    COMPLETE,
    MANIFEST,
    METRICS,
    Channel,
    JobFile,
    Layout,
    check_checkpoint,
    newest_checkpoint,
)
from launcher.errors import IntegrityError, SpecError
from launcher.quantities import format_size
from launcher.stores import StorageOptions, Store, check_path, open_store, path_inside, path_of, require_room
from launcher.sync import MODEL_ARCHIVE, OUTPUT_ARCHIVE, read_appended, unpack_tar

__all__ = ["check_room", "restore_checkpoint", "restore_metrics", "stage_channels"]

_AT_ONCE = 16
_DIFFERENCES_SHOWN = 3

Say = Callable[[str], None]


def check_room(job: JobFile, layout: Layout) -> None:
    """CapacityError if what is still to be staged doesn't fit on the disk."""
    need = sum(max((c.size or 0) - _size_of(layout.channel(c.name)), 0) for c in job.channels if c.access == "staged")
    require_room(layout.root, need, what="the job's data")


def _size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def stage_channels(job: JobFile, layout: Layout, scratch: Path, *, abort: threading.Event, say: Say) -> dict[str, Path]:
    """Every channel at `<root>/input/data/<name>` and equal to its fingerprint. IntegrityError if one differs.

    Returned: name → folder below `scratch` of those that were an archive, as platforms pack a run's model.
    """
    options, places = StorageOptions.from_mapping(job.storage), dict[str, Path]()
    for channel in job.channels:
        folder = layout.channel(check_path(channel.name))
        if channel.access == "staged":
            _download(channel, open_store(channel.uri, options), folder, abort, say)
        elif channel.access == "path":
            _link(channel, folder)
        elif not folder.is_dir():
            raise SpecError(f"channel {channel.name}: the platform mounted nothing at {folder}")
        if abort.is_set():
            break
        if channel.fingerprint:
            _check(channel, folder)
        elif archive := _packed_model(folder):
            places[channel.name] = scratch / "channels" / channel.name
            say(f"channel {channel.name}: unpacking {archive.name}")
            unpack_tar(archive, places[channel.name])
    return places


def _packed_model(folder: Path) -> Path | None:
    """The archive, if nothing else stands there but the run's other one."""
    archive = folder / MODEL_ARCHIVE
    if not archive.is_file():
        return None
    return None if {path.name for path in folder.iterdir()} - {MODEL_ARCHIVE, OUTPUT_ARCHIVE} else archive


def _link(channel: Channel, folder: Path) -> None:
    source = path_of(channel.uri)
    if not source.is_dir():
        raise SpecError(f"channel {channel.name}: {source} is not a folder of this machine")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() and folder.readlink() != source:
        folder.unlink()
    with contextlib.suppress(FileExistsError):
        folder.symlink_to(source, target_is_directory=True)
    if folder.resolve() != source.resolve():
        raise SpecError(f"channel {channel.name}: {folder} is in the way; remove it")


def _download(channel: Channel, store: Store, folder: Path, abort: threading.Event, say: Say) -> None:
    """What is there with the right size stays, so that a second start goes on where the first one ended."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = list(store.list())
    if {entry.path for entry in entries} == {MODEL_ARCHIVE, OUTPUT_ARCHIVE}:  # of a run: its model is wanted
        entries = [entry for entry in entries if entry.path == MODEL_ARCHIVE]
    if not entries:
        raise SpecError(f"channel {channel.name}: {channel.uri} is empty")
    missing = [e.path for e in entries if e.path == MANIFEST or not _there(folder / e.path, e.size)]
    size = sum(e.size for e in entries)
    say(
        f"channel {channel.name}: {len(missing)} of {len(entries)} files from {channel.uri}, {format_size(size)} in all"
    )
    _download_all(store, missing, folder, abort)


def _there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download_all(store: Store, paths: Iterable[str], folder: Path, abort: threading.Event) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(path: str) -> None:
        if not abort.is_set():
            store.download(path, path_inside(folder, path))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(one, path) for path in paths]:
            try:
                done.result()
            except BaseException:
                abort.set()
                raise


def _check(channel: Channel, folder: Path) -> None:
    from launcher.manifest import check_staged

    if not (folder / MANIFEST).is_file():
        raise IntegrityError(
            f"channel {channel.name}: {folder} has no {MANIFEST}, but the data had one when the job was submitted: "
            "bring it along, or submit again"
        )
    differences = check_staged(folder, channel)
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        shown = "; ".join(differences[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise IntegrityError(f"channel {channel.name} is not the data of the job: {shown}")


# -- what earlier attempts left ---------------------------------------------------------------------------------------


def restore_checkpoint(store: Store, layout: Layout, abort: threading.Event, say: Say) -> str | None:
    """The step of the newest complete checkpoint in the store, now here too; None if there is none, or one here.

    A damaged one is passed over.
    """
    if newest_checkpoint(layout.checkpoints) is not None:
        return None
    steps = {
        parts[1] for e in store.list("checkpoints") if len(parts := e.path.split("/")) > 2 and parts[1].isdecimal()
    }
    for step in sorted(steps, key=int, reverse=True):
        if abort.is_set():
            return None
        if _fetch_checkpoint(store, step, layout.checkpoints, abort):
            say(f"resuming from checkpoint {step} of the output store")
            return step
    return None


def _fetch_checkpoint(store: Store, step: str, checkpoints: Path, abort: threading.Event) -> bool:
    part = checkpoints / f".{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        complete = store.read(f"checkpoints/{step}/{COMPLETE}")
        names = [f"checkpoints/{step}/{check_path(name)}" for name in json.loads(complete)["files"]]
        _download_all(store, names, part, abort)
        folder = part / "checkpoints" / step
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPLETE).write_bytes(complete)
        if check_checkpoint(folder) is None:
            return False
        shutil.rmtree(checkpoints / step, ignore_errors=True)  # an unfinished one of the same step
        folder.rename(checkpoints / step)
    except (FileNotFoundError, ValueError, KeyError, TypeError, SpecError):
        return False
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def restore_metrics(store: Store, layout: Layout) -> dict[str, int]:
    """Path → bytes that the store has of it; the local file begins with them. The store stays as it is."""
    data, _ = read_appended(store, METRICS)
    here = layout.metrics.read_bytes() if layout.metrics.exists() else b""
    if not here.startswith(data):
        layout.metrics.parent.mkdir(parents=True, exist_ok=True)
        layout.metrics.write_bytes(data)
    return {METRICS: len(data)} if data else {}
