"""Draws 320 scenes of 96 px with circles, squares and triangles, labelled in YOLO's format.

    python examples/shapes/make_data.py            # into examples/shapes/data
    data/train, data/val    256 and 64 scenes: images/*.png, labels/*.txt, data.yaml

A scene has one to four shapes of any colour on a grainy ground. The same files come out each time.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
CLASSES = ("circle", "square", "triangle")
COUNTS = {"train": 256, "val": 64}

Box = tuple[int, int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the shapes example's scenes")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "data")
    folder = parser.parse_args().folder
    write_shapes(folder, COUNTS)
    print(f"{folder}: " + ", ".join(f"{split} {count} scenes" for split, count in COUNTS.items()))


def write_shapes(folder: Path, counts: dict[str, int]) -> None:
    """counts: split → scenes. Earlier content of these folders is replaced."""
    for number, (split, count) in enumerate(counts.items()):
        shutil.rmtree(folder / split, ignore_errors=True)
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        (folder / split / "data.yaml").write_text(f"names: [{', '.join(CLASSES)}]\n")
        for index in range(count):
            picture, labels = draw_scene(np.random.default_rng((number, index)))
            picture.save(folder / split / "images" / f"{index:04}.png")
            (folder / split / "labels" / f"{index:04}.txt").write_text("".join(f"{label}\n" for label in labels))


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """The picture, and `class x y width height` of each shape, relative to the picture."""
    ground = rng.normal(rng.uniform(40, 215), 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(ground)
    labels: list[str] = []
    boxes: list[Box] = []
    for _ in range(rng.integers(1, 5)):
        box = free_box(rng, boxes)
        if box is None:
            continue
        boxes.append(box)
        shape = int(rng.integers(len(CLASSES)))
        draw_shape(picture, shape, box=box, colour=contrast(rng, ground.mean()))
        left, top, right, bottom = (edge / SIDE for edge in box)
        place = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        labels.append(f"{shape} " + " ".join(f"{value:.6f}" for value in place))
    return picture, labels


def free_box(rng: np.random.Generator, taken: Sequence[Box]) -> Box | None:
    """A square box that touches no other, None after twenty tries."""
    for _ in range(20):
        size = int(rng.integers(24, 44))
        left, top = (int(value) for value in rng.integers(1, SIDE - size - 1, 2))
        box = (left, top, left + size, top + size)
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken):
            return box
    return None


def contrast(rng: np.random.Generator, ground: float) -> tuple[int, ...]:
    """A colour that stands off from a ground of that brightness (0 to 255)."""
    while True:
        colour = rng.integers(0, 256, 3)
        if abs(colour.mean() - ground) > 50:
            return tuple(int(value) for value in colour)


def draw_shape(picture: Image.Image, shape: int, *, box: Box, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    pen = ImageDraw.Draw(picture)
    match CLASSES[shape]:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "square":
            pen.rectangle(box, fill=colour)
        case _:
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


if __name__ == "__main__":
    main()
