"""The first job file for a data folder, with values that suit it and comments that say what else there is."""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from launcher import gpus
from launcher.dataset import ClassFolders, Unknown, YoloData, images_below, inspect_folder
from launcher.errors import SpecError
from launcher.jobfile import validate
from launcher.spec import JobSpec
from launcher.yamlfile import Document, parse_yaml

__all__ = ["image_shape", "starter_job"]

_GENERIC = ("data", "dataset", "datasets")
"""Folder names that say nothing about the job."""
_LOOKED_AT = 25
"""Images whose size is read; only the headers of PNG and JPEG."""


@dataclass(frozen=True)
class _Facts:
    """images: for training. side: the usual longer side in pixels, None if unknown."""

    images: int
    side: int | None


def starter_job(folder: Path, *, name: str | None, relative_to: Path) -> str:
    """The text of a job file that will stand in `relative_to`. SpecError if nothing can be trained on the folder.

    folder: or a YOLO data.yaml. name: None takes the folder's.
    """
    try:
        found = inspect_folder(folder)
        text = _text(found, folder, name=name, relative_to=relative_to)
    except OSError as error:
        raise SpecError(f"{error.filename or folder} can't be read: {error.strerror}") from error
    content, lines = parse_yaml(text)
    validate(JobSpec, Document(relative_to / "job.yaml", content, lines))
    return text


def _text(found: ClassFolders | YoloData | Unknown, folder: Path, *, name: str | None, relative_to: Path) -> str:
    if isinstance(found, Unknown):
        raise SpecError(found.reason)
    if found.val is None:
        raise SpecError(_how_to_split(folder, found.classes if not found.split else ()))
    train = _classify(found) if isinstance(found, ClassFolders) else _detect(found)
    name = _name_of(folder) if name is None else name
    return "\n".join((_head(name), train, _data(found.train, found.val, relative_to), _REST.format(gpus=_gpus())))


# ---- the parts of the file

_HEAD = """\
# yaml-language-server: $schema=job.schema.json
# The line above lets an editor complete and check keys; `cvlaunch schema > job.schema.json` writes the file it names.
# Try it here:  cvlaunch submit job.yaml --backend local --follow
"""

_CLASSIFY = """\
# {classes} classes, {images} images to train on.
train:
  task: classify
  model: {model}  # any timm model: resnet50, convnext_tiny, vit_small_patch16_224 …
  pretrained: {pretrained}  # true starts from timm's published weights, which needs network; false: from scratch
  image_size: {image_size}  # pixels; {why_size}
  epochs: {epochs}
  batch: {batch}  # images per step; less if memory runs out
  augment: {augment}  # none; shift: small moves and turns; standard: random crops and mirroring
  # learning_rate: 0.001
  # patience: 5  # stop after so many epochs without a better result
  # seed: 0
"""

_DETECT = """\
# {classes} classes, {images} images to train on.
train:
  task: detect
  model: yolo11n  # yolo11s, yolo11m … are larger, slower and better
  pretrained: true  # starts from Ultralytics' published weights, which needs network; false: from scratch
  image_size: {image_size}  # pixels, a multiple of 32; {why_size}
  epochs: {epochs}
  batch: {batch}  # images per step; less if memory runs out
  classes:  # by class id, from 0
{names}
  # patience: 20  # stop after so many epochs without a better result
  # seed: 0
"""

_DATA = """\
# Folders, relative to this file. For other machines put them in a store (cvlaunch data push FOLDER s3://BUCKET/PREFIX)
# and write s3://BUCKET/PREFIX here; or give a dataset a name in targets.yaml, with a place for each machine.
data:
  train: {train}
  val: {val}{note}
"""

_REST = """\
resources:
  {gpus}
  # gpu: [A100, L40S]  # acceptable models, best first
  # cpus: 8
  # memory: 32GB
  # timeout: 12h  # running time, restarts included
  # max_wait: 2h  # longest time in a queue
  # spot: true  # interruptible machines cost less; the job resumes from its checkpoints

# retries: 1  # restarts after a crash
# tags: {{project: demo}}

# The same file goes to every place: `cvlaunch targets` lists them, `cvlaunch render job.yaml` shows what would be sent.
# Your own program, instead of train:
# command: [python, train.py, "${{CVLAUNCH_DATA_TRAIN}}"]
# code: {{root: .}}
"""


def _head(name: str) -> str:
    return f"{_HEAD}\nname: {_scalar(name)}\n"


def _classify(found: ClassFolders) -> str:
    facts = _facts(sum(found.classes.values()), found.train)
    small = facts.side is not None and facts.side <= 64
    return _CLASSIFY.format(
        classes=len(found.classes),
        images=facts.images,
        model="resnet10t" if small else "resnet18",
        pretrained="false" if small else "true",
        image_size=_image_size(facts.side, usual=224, least=32),
        why_size=_why(facts.side),
        epochs=_by_count(facts.images, (2_000, 20), (20_000, 10), otherwise=5),
        batch=_by_count(facts.images, (100, 8), (400, 16), (20_000, 32), otherwise=64),
        augment="shift" if small else "standard",
    )


def _detect(found: YoloData) -> str:
    facts = _facts(sum(1 for _ in images_below(found.train / "images")), found.train / "images")
    return _DETECT.format(
        classes=len(found.names),
        images=facts.images,
        image_size=_image_size(facts.side, usual=640, least=64),
        why_size=_why(facts.side),
        epochs=_by_count(facts.images, (500, 100), (5_000, 50), otherwise=30),
        batch=_by_count(facts.images, (64, 8), otherwise=16),
        names="\n".join(f"    - {_scalar(name)}" for name in found.names),
    )


def _data(train: Path, val: Path, relative_to: Path) -> str:
    note = (
        "  # there is no folder val, so test serves; results on it are no longer independent"
        if val.name == "test"
        else ""
    )
    return _DATA.format(train=_place(train, relative_to), val=_place(val, relative_to), note=note)


def _gpus() -> str:
    count = gpus.count()
    if count == 0:
        return "gpus: 0  # per machine; this one has none, so the job trains on the CPU; 1 where there is a GPU"
    return f"gpus: 1  # per machine; this one has {count}; 0 trains on the CPU"


# ---- values


def _facts(images: int, folder: Path) -> _Facts:
    shapes = (image_shape(Path(path)) for path in islice(images_below(folder), _LOOKED_AT))
    sides = [max(shape) for shape in shapes if shape]
    return _Facts(images, round(statistics.median(sides)) if sides else None)


def _image_size(side: int | None, *, usual: int, least: int) -> int:
    """A multiple of 32, for images smaller than usual."""
    return usual if side is None or side >= usual else min(usual, max(least, math.ceil(side / 32) * 32))


def _why(side: int | None) -> str:
    return "the usual size" if side is None else f"the longer side of these images is about {side}"


def _by_count(count: int, *steps: tuple[int, int], otherwise: int) -> int:
    """The value of the first step (below, value) that `count` is below."""
    return next((value for below, value in steps if count < below), otherwise)


def _name_of(folder: Path) -> str:
    path = folder.absolute()
    path = path.parent if path.is_file() else path
    path = path.parent if path.name in _GENERIC and path.parent.name else path
    text = "".join(c for c in path.name if c.isprintable()).strip()[:100]
    return text if any(c.isalnum() for c in text) else "job"


def _place(folder: Path, relative_to: Path) -> str:
    """`./train`, not `train`, which could be the name of a dataset."""
    here, base = os.path.abspath(folder), os.path.abspath(relative_to)  # noqa: PTH100 links stay as they are
    if not Path(here).is_relative_to(base):
        here, base = os.path.realpath(here), os.path.realpath(base)
    written = Path(os.path.relpath(here, base)).as_posix()
    return _scalar(written if written.startswith("../") else f"./{written}")


def _scalar(text: str) -> str:
    """One line of YAML that reads back as this text."""
    style = None if text.isprintable() else '"'
    written = yaml.safe_dump(text, allow_unicode=True, width=math.inf, default_style=style)
    return written.removesuffix("\n").removesuffix("\n...")


def _how_to_split(folder: Path, classes: Iterable[str]) -> str:
    """Nothing is guessed: a result on images that were trained on would say nothing. The commands take every fifth."""
    gather = f"mkdir train && mv -- {' '.join(shlex.quote(name) for name in classes)} train/ && " if classes else ""
    move = (
        'for d in train/*/; do c=$(basename "$d"); mkdir -p "val/$c"; '
        'find "$d" -type f | sort | awk "NR % 5 == 1" | while IFS= read -r f; do mv "$f" "val/$c/"; done; done'
    )
    return (
        f"{folder} has class folders but no val/ to measure the result on. This moves every fifth image of each class "
        f"there; then run cvlaunch init again:\n  cd {shlex.quote(str(folder))} && {gather}{move}"
    )


# ---- headers of image files


def image_shape(path: Path) -> tuple[int, int] | None:
    """(width, height) of a PNG or a JPEG, from its header; None for anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 18)
    except OSError:
        return None
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    return _jpeg_shape(head) if head[:2] == b"\xff\xd8" else None


def _jpeg_shape(head: bytes) -> tuple[int, int] | None:
    """Walks the segments to the start of the frame (ITU-T T.81, B.2.2): FF C0..CF but C4, C8 and CC."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(head[at + 7 : at + 9]), int.from_bytes(head[at + 5 : at + 7])
        at += 1 if marker == 0xFF else 2 + length
    return None
