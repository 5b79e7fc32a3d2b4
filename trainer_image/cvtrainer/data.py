"""Images in class folders: `<channel>/<class>/**/<image>`.

What is random about a sample depends on (seed, epoch, index) alone, never on workers or on what came before, so that a
run resumed in the middle of an epoch replays it exactly.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate

from cvtrainer.run import UserError
from launcher.errors import nearest
from launcher.shm import Loading

__all__ = [
    "AUGMENTATIONS",
    "Batches",
    "BrokenImage",
    "ClassFolders",
    "Samples",
    "load",
    "read_class_folders",
    "same_classes",
]

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MANY_SHOWN = 5

Resampling = Image.Resampling
Augmentation = Callable[[Image.Image, int, Resampling, np.random.Generator], Image.Image]
Item = tuple[int, int]
"""(epoch, index)"""


@dataclass(frozen=True)
class ClassFolders:
    """paths[i] shows classes[labels[i]]."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]


def read_class_folders(root: Path) -> ClassFolders:
    """Folder names in code point order are the classes. UserError names the folder that can't be used."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected class folders: <class>/<image>")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        what = "holds images but no class folders" if any(_images_below(root)) else "is empty"
        raise UserError(f"{root} {what}; expected class folders: <class>/<image>")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(folders):
        found = sorted(_images_below(root / name))
        if not found:
            raise UserError(f"{root / name} holds no images; remove the folder, or add {', '.join(_IMAGES)} files")
        paths += found
        labels += [label] * len(found)
    return ClassFolders(tuple(folders), tuple(paths), tuple(labels))


def _images_below(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if not name.startswith(".") and name.lower().endswith(_IMAGES):
                yield str(Path(parent, name))


def same_classes(val: ClassFolders, train: ClassFolders, *, root: Path) -> ClassFolders:
    """`val` with the label numbers of `train`. A class that `train` doesn't have is a UserError."""
    number = {name: label for label, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in number]
    if unknown:
        shown = ", ".join(unknown[:_MANY_SHOWN]) + (", …" if len(unknown) > _MANY_SHOWN else "")
        raise UserError(f"{root} has classes that the channel train lacks: {shown}{nearest(unknown[0], number)}")
    labels = tuple(number[val.classes[label]] for label in val.labels)
    return ClassFolders(train.classes, val.paths, labels)


def _whole(image: Image.Image, size: int, resampling: Resampling, _: np.random.Generator) -> Image.Image:
    """The largest centred square, at `size`: what evaluation sees."""
    return ImageOps.fit(image, (size, size), resampling)


def _shift(image: Image.Image, size: int, resampling: Resampling, rng: np.random.Generator) -> Image.Image:
    """Up to 10 % aside, 10 degrees round, 10 % larger or smaller; black comes in from outside."""
    square = ImageOps.fit(image, (size, size), resampling)
    angle, scale = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    aside = rng.uniform(-0.1, 0.1, 2) * size
    cos, sin, middle = np.cos(angle) / scale, np.sin(angle) / scale, size / 2
    x, y = middle + aside[0], middle + aside[1]
    matrix = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    return square.transform((size, size), Image.Transform.AFFINE, matrix, Resampling.BILINEAR)


def _crop_and_flip(image: Image.Image, size: int, resampling: Resampling, rng: np.random.Generator) -> Image.Image:
    """A box of 35 to 100 % of the area and 3:4 to 4:3 in shape, mirrored half of the time.

    ImageNet's usual 8 % is meant for hundreds of epochs; fine-tuning has ten.
    """
    area, ratio = rng.uniform(0.35, 1) * image.width * image.height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = min(np.sqrt(area * ratio), image.width), min(np.sqrt(area / ratio), image.height)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    crop = image.resize((size, size), resampling, box=(left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


AUGMENTATIONS: dict[str, Augmentation] = {"none": _whole, "shift": _shift, "standard": _crop_and_flip}


@dataclass(frozen=True)
class BrokenImage:
    """Returned, not raised: an exception leaves a worker process as a page of traceback."""

    path: str
    problem: str


@dataclass(frozen=True)
class Samples:
    """[(epoch, index)] → (uint8 image [3, size, size], label).

    Images stay uint8 until they are on the device: a quarter of the shared memory, and of the bus.
    """

    folders: ClassFolders
    size: int
    resampling: Resampling
    augment: str
    seed: int

    def __len__(self) -> int:
        return len(self.folders.paths)

    def __getitem__(self, item: Item) -> tuple[torch.Tensor, int] | BrokenImage:
        epoch, index = item
        path = self.folders.paths[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            with Image.open(path) as image:
                square = AUGMENTATIONS[self.augment](image.convert("RGB"), self.size, self.resampling, rng)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return BrokenImage(path, str(error) or type(error).__name__)
        return torch.from_numpy(np.array(square).transpose(2, 0, 1).copy()), self.folders.labels[index]


@dataclass(frozen=True)
class Batches:
    """The batches of one rank in one epoch, as lists of (epoch, index), from batch `start` on.

    Shuffled: a permutation seeded by (seed, epoch), the last incomplete step dropped. In order: every index exactly
    once over all ranks, and the ranks' counts may differ by one batch.
    """

    count: int
    size: int
    rank: int
    world: int
    seed: int = 0
    epoch: int = 0
    start: int = 0
    shuffle: bool = False

    @property
    def steps(self) -> int:
        """Batches of a whole epoch, the same on each rank when shuffled."""
        if self.shuffle:
            return self.count // (self.size * self.world)
        return -(-len(range(self.rank, self.count, self.world)) // self.size)

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)

    def __iter__(self) -> Iterator[list[Item]]:
        order: Sequence[int] | np.ndarray = range(self.count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        mine = order[self.rank :: self.world]
        for batch in range(self.start, self.steps):
            yield [(self.epoch, int(index)) for index in mine[batch * self.size : (batch + 1) * self.size]]


def load(
    samples: Samples, batches: Batches, *, loading: Loading, pin: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(uint8 images [n, 3, size, size], int64 labels [n]). UserError names the first image that can't be read."""
    workers = min(loading.workers, len(batches))
    loader: DataLoader[object] = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=loading.prefetch if workers else None,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
    )
    for batch in loader:
        if isinstance(batch, BrokenImage):
            raise UserError(f"{batch.path} can't be read as an image ({batch.problem}); repair or remove it")
        yield batch


def _collate(items: list[tuple[torch.Tensor, int] | BrokenImage]) -> tuple[torch.Tensor, torch.Tensor] | BrokenImage:
    """torch's own collation puts a worker's batch into shared memory at once, so that a full /dev/shm is an error of
    the worker. Left to the queue's thread, the batch would be lost and training would wait for it for ever."""
    good = [item for item in items if not isinstance(item, BrokenImage)]
    if len(good) < len(items):
        return next(item for item in items if isinstance(item, BrokenImage))
    images, labels = default_collate([(image, torch.tensor(label)) for image, label in good])
    return images, labels


def _outlive_signals(_: int) -> None:
    """A signal to the process group must not take the workers from under a step that is to be finished."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
