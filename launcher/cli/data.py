"""`data`: what a folder holds, its fingerprint, and bringing it to a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import complete_targets, json_option
from launcher.cli.out import Out
from launcher.errors import SpecError

if TYPE_CHECKING:
    from launcher.manifest import Manifest
    from launcher.stores import Store

__all__ = ["data"]

target_option = click.option(
    "--target", shell_complete=complete_targets, metavar="NAME", help="Whose store settings to use."
)


@click.group()
def data() -> None:
    """Check, fingerprint and push data folders."""


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--task", type=click.Choice(["classify", "detect"]), help="What it is meant for; else it is judged by its form."
)
@json_option
def check(*, folder: Path, task: str | None, out: Out) -> None:
    """Say what a data folder holds, and whether a job could train on it."""
    from launcher.dataset import Unknown, inspect_folder

    if task is not None:
        _check_channels(folder, task)
    try:
        found = inspect_folder(folder)
    except OSError as error:
        raise SpecError(f"{error.filename or folder} can't be read: {error.strerror}") from error
    if isinstance(found, Unknown) and task is None:
        raise SpecError(found.reason)
    facts = {"folder": str(folder), "task": task, **_facts(found)}
    if out.as_json:
        out.document(facts)
    else:
        out.fields({key: _shown(value) for key, value in facts.items()})


def _check_channels(folder: Path, task: str) -> None:
    """`folder` is a channel itself, or holds the channels train and val."""
    from launcher.dataset import check_channel
    from launcher.spec import ClassifyConfig, DetectConfig

    config = ClassifyConfig(task="classify") if task == "classify" else DetectConfig(task="detect")
    parts = [name for name in ("train", "val") if (folder / name).is_dir()]
    for name in parts:
        check_channel(folder / name, config, channel=name)
    if not parts:
        check_channel(folder, config, channel="train")


def _facts(found: object) -> dict[str, Any]:
    from launcher.dataset import ClassFolders, YoloData

    if isinstance(found, ClassFolders):
        classes = dict(found.classes)
        return {
            "task": "classify",
            "train": str(found.train),
            "val": str(found.val) if found.val else None,
            "classes": classes,
        }
    if isinstance(found, YoloData):
        return {"task": "detect", "train": str(found.train), "val": str(found.val), "classes": list(found.names)}
    return {}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"{len(value)}, {sum(value.values())} images: " + _cut([f"{k} ({n})" for k, n in value.items()])
    if isinstance(value, list):
        return f"{len(value)}: " + _cut([str(item) for item in value])
    return "" if value is None else str(value)


def _cut(texts: list[str], most: int = 10) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


@data.command()
@click.argument("place", metavar="FOLDER_OR_URI")
@target_option
@json_option
def fingerprint(*, place: str, target: str | None, out: Out) -> None:
    """Write the manifest of a folder, or read that of a store; print the fingerprint.

    A folder is read and hashed anew. Of a store, only the manifest that `data push` wrote is read.
    """
    from launcher import manifest
    from launcher.stores import is_uri, path_of, scheme

    if is_uri(place) and scheme(place) != "file":
        found = manifest.read(_store(place, target))
        if found is None:
            through = f" --target {target}" if target else ""
            push = f"cvlaunch data push FOLDER {place}{through}"
            raise SpecError(f"{place} has no manifest; bring the data there with: {push}")
    else:
        folder = path_of(place) if is_uri(place) else Path(place)
        if not folder.is_dir():
            raise SpecError(f"no folder {folder}")
        with out.progress("hashing") as progress:
            found = manifest.scan(folder, progress=progress)
        manifest.write(_store(str(folder.absolute()), target), found)
    _print(place, found, out)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("uri")
@target_option
@click.option("--prune", is_flag=True, help="Delete files that URI has and FOLDER hasn't.")
@json_option
def push(*, folder: Path, uri: str, target: str | None, prune: bool, out: Out) -> None:
    """Make URI hold what FOLDER holds, manifest included.

    Sends only what differs; may be interrupted and repeated.
    """
    from launcher import manifest

    if not folder.is_dir():
        raise SpecError(f"no folder {folder}")
    with out.progress(f"pushing {folder}") as progress:
        found = manifest.push(folder, _store(uri, target), progress=progress, prune=prune)
    _print(uri, found, out)


def _store(place: str, target: str | None) -> Store:
    """As a target reaches it, if one is given."""
    from launcher.stores import open_store
    from launcher.targets import load_targets

    if target is None:
        return open_store(place)
    return load_targets(Path.cwd()).select(target=target).store(place)


def _print(place: str, found: Manifest, out: Out) -> None:
    from launcher.quantities import format_size

    if out.as_json:
        out.document({"place": place, "fingerprint": found.fingerprint, "files": found.count, "size": found.size})
    else:
        out.data(found.fingerprint)
        out.note(f"{place}: {found.count} files, {format_size(found.size)}")
