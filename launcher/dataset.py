"""What a data folder holds: class folders, YOLO data or neither; and whether a channel fits the training.

    channel of classify:   <class>/**/<image>
    channel of detect:     images/**/<image>     labels/**/<name of the image>.txt

Names that start with a dot don't count, as in manifests; links to folders are followed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import SpecError
from launcher.spec import ClassifyConfig, DetectConfig

__all__ = ["IMAGE_SUFFIXES", "ClassFolders", "Unknown", "YoloData", "check_channel", "images_below", "inspect_folder"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "test")
_MAX_YAML = 1 << 20
_SHOWN = 5


@dataclass(frozen=True)
class ClassFolders:
    """classes: class → its images in `train`. val: None if there is no second part to validate on.

    train: the folder that holds the class folders; `split` is false where that is the inspected folder itself.
    """

    classes: Mapping[str, int]
    train: Path
    val: Path | None
    split: bool


@dataclass(frozen=True)
class YoloData:
    """names: by class id. train, val: folders that hold images/ and labels/."""

    yaml: Path
    names: tuple[str, ...]
    train: Path
    val: Path


@dataclass(frozen=True)
class Unknown:
    """Nothing to train on as it stands; `reason` says what is missing and the way out."""

    reason: str


# ---- a channel, before a job is submitted


def check_channel(path: Path, train: ClassifyConfig | DetectConfig, *, channel: str) -> None:
    """SpecError if `path` can't be the channel `train` or `val`. Stops at the first image of each class."""
    key = f"data.{channel}"
    try:
        problem = _no_folder(path) or (
            _not_classes(path, channel) if isinstance(train, ClassifyConfig) else _not_yolo(path)
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SpecError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}", key=key) from error
    if problem:
        raise SpecError(problem, key=key)


def _no_folder(path: Path) -> str | None:
    if not path.exists():
        return f"no folder {path}"
    if not path.is_dir():
        return f"{path} is a file; a channel is a folder"
    return None if any(_entries(path)) else f"{path} is empty"


def _not_classes(path: Path, channel: str) -> str | None:
    classes = sorted(entry.name for entry in _entries(path) if entry.is_dir())
    if not classes:
        what = "images but no class folders" if any(images_below(path)) else "no class folders"
        return f"{path} holds {what}; classify expects <class>/<image>, a folder for each class"
    empty = [name for name in classes if not any(images_below(path / name))]
    if len(empty) == len(classes):
        return f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})"
    if empty:
        return f"the class folder {_listed(empty)} in {path} holds no images; remove it, or add {_suffixes()} files"
    if len(classes) == 1 and channel == "train":
        return f"{path} holds one class, {classes[0]!r}; telling classes apart needs at least two{_one_up(path)}"
    return None


def _one_up(path: Path) -> str:
    """The commonest reason for one class: the folder around the split was given."""
    inner = [name for name in _TRAIN_NAMES if (path / name).is_dir()]
    return f"; is it {path / inner[0]} that you mean?" if inner else ""


def _not_yolo(path: Path) -> str | None:
    images, labels = path / "images", path / "labels"
    if not images.is_dir():
        return f"{path} has no folder images/; detect expects images/<name>.jpg and labels/<name>.txt"
    if not any(images_below(images)):
        return f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})"
    if not labels.is_dir():
        return f"{path} has no folder labels/; detect expects images/<name>.jpg and labels/<name>.txt"
    if not any(name.endswith(".txt") for name in _files_below(labels)):
        return f"{labels} holds no .txt files; detect expects labels/<name>.txt beside images/<name>.jpg"
    return None


# ---- a folder, when a job file is begun


def inspect_folder(path: Path) -> ClassFolders | YoloData | Unknown:
    """What the folder, or the data.yaml, holds. Counts images, so it reads every name once. OSError if it can't."""
    if path.is_file():
        return _yolo(path) if path.suffix in (".yaml", ".yml") else Unknown(f"{path} is a file; give a data folder")
    if not path.is_dir():
        return Unknown(f"no folder {path}")
    described = _data_yaml(path)
    return _yolo(described) if described else _yolo_channels(path) or _class_folders(path)


def _class_folders(path: Path) -> ClassFolders | Unknown:
    train = _first_folder(path, _TRAIN_NAMES)
    base = train or path
    if _is_channel(base) or _is_channel(path):
        return Unknown(f"{path} holds images/ and labels/ but no data.yaml; write one with train, val and names")
    folders = sorted(entry.name for entry in _entries(base) if entry.is_dir())
    counts = {name: sum(1 for _ in images_below(base / name)) for name in folders}
    classes = {name: count for name, count in counts.items() if count}
    if len(classes) < 2:
        return Unknown(_no_classes(base, classes))
    if train is None:
        return ClassFolders(classes, path, None, split=False)
    return _with_val(classes, train, _first_folder(path, _VAL_NAMES))


def _with_val(classes: Mapping[str, int], train: Path, val: Path | None) -> ClassFolders | Unknown:
    if val is None:
        return ClassFolders(classes, train, None, split=True)
    found = [entry.name for entry in _entries(val) if entry.is_dir()]
    strange = sorted(name for name in found if name not in classes)
    if strange:
        return Unknown(f"{val} has the class {_listed(strange)}, which {train} lacks; both need the same class folders")
    if not found:
        return Unknown(f"{val} has no class folders; it needs the same ones as {train}")
    return ClassFolders(classes, train, val, split=True)


def _no_classes(base: Path, classes: Mapping[str, int]) -> str:
    if classes:
        return f"{base} holds one class, {next(iter(classes))!r}; telling classes apart needs at least two"
    what = "holds images but no class folders" if any(images_below(base)) else "holds no images"
    return (
        f"{base} {what}; expected train/<class>/<image> and val/<class>/<image> for classification, "
        "or a YOLO data.yaml for detection"
    )


def _first_folder(path: Path, names: Iterable[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


# ---- YOLO's data.yaml: path, train, val, names (https://docs.ultralytics.com/datasets/detect/)


def _data_yaml(folder: Path) -> Path | None:
    """data.yaml, or the one YAML file that has train and names, as coco128.yaml."""
    found = sorted(e.name for e in _entries(folder) if e.name.endswith((".yaml", ".yml")) and e.is_file())
    fitting = [
        name for name in found if name in ("data.yaml", "data.yml") or {"train", "names"} <= _keys(folder / name)
    ]
    return folder / min(fitting, key=lambda name: (not name.startswith("data."), name)) if fitting else None


def _yolo_channels(path: Path) -> YoloData | None:
    """Folders that are channels already: each with images/ and labels/, and the names in the data.yaml of train."""
    train, val = _first_folder(path, _TRAIN_NAMES), _first_folder(path, _VAL_NAMES)
    if not (train and val and all(_is_channel(folder) for folder in (train, val))):
        return None
    file = train / "data.yaml"
    content = _read(file) if file.is_file() else {}
    names = None if isinstance(content, Unknown) else _names(content.get("names"))
    return YoloData(file, names, train, val) if names else None


def _is_channel(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _keys(file: Path) -> set[str]:
    content = _read(file)
    return set() if isinstance(content, Unknown) else set(content)


def _read(file: Path) -> Mapping[str, Any] | Unknown:
    with file.open("rb") as opened:
        data = opened.read(_MAX_YAML + 1)
    try:
        content = yaml.safe_load(data.decode()) if len(data) <= _MAX_YAML else None
    except (yaml.YAMLError, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        content = None  # broken in one of the ways that PyYAML knows; UnicodeDecodeError is a ValueError
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        return content
    return Unknown(f"{file} can't be read as YAML with the keys train, val and names")


def _yolo(file: Path) -> YoloData | Unknown:
    content = _read(file)
    if isinstance(content, Unknown):
        return content
    names = _names(content.get("names"))
    if names is None:
        return Unknown(f"{file}: names must be a list of class names, or class ids from 0 with a name each")
    train, val = (_channel(file, content, key) for key in ("train", "val"))
    if isinstance(train, Unknown):
        return train
    return val if isinstance(val, Unknown) else YoloData(file, names, train, val)


def _channel(file: Path, content: Mapping[str, Any], key: str) -> Path | Unknown:
    images = _images_folder(file, content, key)
    return images if isinstance(images, Unknown) else _channel_of(images)


def _names(value: object) -> tuple[str, ...] | None:
    """`[cat, dog]` or `{0: cat, 1: dog}`. A bare yes or no, which YAML makes a truth value, is nobody's class."""
    if isinstance(value, dict):
        if set(value) != set(range(len(value))):
            return None
        value = [value[i] for i in range(len(value))]
    if not isinstance(value, list) or not value:
        return None
    fine = all(isinstance(name, str) or (type(name) in (int, float) and abs(name) < 1e9) for name in value)
    return tuple(str(name) for name in value) if fine else None


def _images_folder(file: Path, content: Mapping[str, Any], key: str) -> Path | Unknown:
    """Ultralytics' rules: below `path`, which is relative to the file; `../train/images` may mean `train/images`."""
    written = content.get(key) or (content.get("validation") if key == "val" else None)
    if not isinstance(written, str):
        found = "is missing" if written is None else "is not one folder"
        return Unknown(f"{file}: {key} {found}; expected {key}: {key}/images")
    root = file.parent / str(content.get("path") or "")
    bases = (root, file.parent) if root != file.parent else (root,)
    for base in bases:
        for relative in (written, written.removeprefix("../")):
            if (base / relative).is_dir():
                return Path(os.path.normpath(base / relative))
    return Unknown(f"{file}: {key} points to {bases[0] / written}, and there is no such folder")


def _channel_of(images: Path) -> Path | Unknown:
    """The folder that holds images/ and labels/. `images/train` beside `labels/train` has no such folder."""
    if _is_channel(images):
        return images
    if images.name == "images" and (images.parent / "labels").is_dir():
        return images.parent
    root, split = images.parent.parent, images.name
    if images.parent.name != "images" or not (root / "labels" / split).is_dir():
        return Unknown(f"{images} has no folder labels/ beside it; expected images/<name>.jpg and labels/<name>.txt")
    return root / split if _is_channel(root / split) else Unknown(_how_to_arrange(root, split))


def _how_to_arrange(root: Path, split: str) -> str:
    splits = sorted(e.name for e in _entries(root / "images") if (root / "labels" / e.name).is_dir())
    quoted = [shlex.quote(name) for name in splits]
    commands = [f"cd {shlex.quote(str(root))}"]
    commands += [f"mkdir {s} && cp -rl images/{s} {s}/images && cp -rl labels/{s} {s}/labels" for s in quoted]
    lines = "\n".join(f"  {command}" for command in commands)
    return (
        f"{root} has images/{split} and labels/{split}; a channel is one folder with images/ and labels/ in it.\n"
        f"These commands add that form with hard links, which take no space, and leave yours as it is:\n{lines}"
    )


# ---- names on disk


def images_below(folder: Path) -> Iterator[str]:
    """Paths of images at any depth, lazily, in the order of the disk."""
    return (name for name in _files_below(folder) if name.lower().endswith(IMAGE_SUFFIXES))


def _files_below(folder: Path) -> Iterator[str]:
    """Every folder once, so that a link to a folder above ends; an unreadable folder raises."""
    seen: set[tuple[int, int]] = set()
    stack = [str(folder)]
    while stack:
        here = stack.pop()
        facts = os.stat(here)  # noqa: PTH116 a million Path objects take seconds
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        for entry in _entries(here):
            if entry.is_dir():
                stack.append(entry.path)
            else:
                yield entry.path


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _suffixes() -> str:
    return " or ".join((".jpg", ".png"))
