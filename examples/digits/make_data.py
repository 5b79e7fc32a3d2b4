"""Writes scikit-learn's bundled digits (1,797 scans of 8 × 8 px, UCI 1998) as class folders of 32 px PNGs.

    python examples/digits/make_data.py            # into examples/digits/data
    data/train, data/val            1,433 and 364 images, a fixed split with the same share of each digit
    data/tiny-train, data/tiny-val  240 and 60 of them

Nothing is downloaded. The same files come out each time.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
VAL_SHARE = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="write the digits example's images")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "data")
    folder = parser.parse_args().folder
    counts = write_digits(folder)
    print(f"{folder}: " + ", ".join(f"{split} {count} images" for split, count in counts.items()))


def write_digits(folder: Path) -> dict[str, int]:
    """Images per split. Earlier content of the four folders is replaced."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits: dict[str, list[int]] = {"train": [], "val": [], "tiny-train": [], "tiny-val": []}
    for label in range(10):
        order = np.random.default_rng(label).permutation(np.flatnonzero(digits.target == label))
        val, train = order[::VAL_SHARE], np.delete(order, np.s_[::VAL_SHARE])
        splits["train"] += train.tolist()
        splits["val"] += val.tolist()
        splits["tiny-train"] += train[:24].tolist()
        splits["tiny-val"] += val[:6].tolist()
    for split, indices in splits.items():
        write_split(folder / split, indices, images=digits.images, labels=digits.target)
    return {split: len(indices) for split, indices in splits.items()}


def write_split(folder: Path, indices: Iterable[int], *, images: np.ndarray, labels: np.ndarray) -> None:
    """images: [n, 8, 8], ink 0 to 16."""
    shutil.rmtree(folder, ignore_errors=True)
    for index in indices:
        ink = np.round(images[index] * (255 / 16)).astype(np.uint8)
        picture = Image.fromarray(ink).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


if __name__ == "__main__":
    main()
