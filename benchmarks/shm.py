"""How much shared memory the classifier's loader takes at most, beside the formula that plans and the runner go by.

    python benchmarks/shm.py

As root in a tmpfs of its own, else by the use of this machine's /dev/shm, which others may change meanwhile. Exits
with 1 if a peak is more than a tenth away from (workers × prefetch + 1) × batch bytes.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = [(1, 2, 32, 224), (2, 2, 32, 224), (4, 2, 32, 224), (8, 2, 32, 224), (8, 1, 32, 224), (3, 1, 64, 256)]
"""(workers, prefetch, batch, image size)"""
LIMIT = 0.1
IMAGES = 32
ROOT = Path(__file__).parent.parent
MOUNT = 'mount -t tmpfs -o size=2g shm /dev/shm && exec "$@"'


def main() -> int:
    if "--measure" in sys.argv:
        return measure_all()
    prefix = ["unshare", "--mount", "sh", "-c", MOUNT, "sh"] if os.geteuid() == 0 else []
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'trainer_image'}", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([*prefix, sys.executable, __file__, "--measure"], env=environ, check=False).returncode


def measure_all() -> int:
    from launcher.shm import image_batch_bytes, loader_need

    far = False
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder) / "thing")
        for workers, prefetch, batch, size in CASES:
            peak = measure(Path(folder), workers, prefetch=prefetch, batch=batch, size=size)
            need = loader_need(workers, prefetch, batch_bytes=image_batch_bytes(batch, size))
            far |= abs(peak / need - 1) > LIMIT
            print(
                f"{workers} workers, prefetch {prefetch}, batch {batch}×3×{size}×{size}: peak {peak / 2**20:6.1f} MiB, "
                f"formula {need / 2**20:6.1f} MiB   × {peak / need:.2f}",
                flush=True,
            )
    return int(far)


def draw_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    pixels = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def measure(folder: Path, workers: int, *, prefetch: int, batch: int, size: int) -> int:
    """Most bytes in use while a slow training step holds one batch and the workers fill up the rest."""
    from cvtrainer.data import Samples, load, read_class_folders
    from PIL import Image

    from launcher.shm import Loading

    folders = read_class_folders(folder)
    samples = Samples(folders, size, Image.Resampling.BILINEAR, "none", 0)
    batches: Any = [[(0, index % IMAGES) for index in range(batch)]] * (4 * workers * prefetch)
    before = used()
    peak = 0
    loader = load(samples, batches, loading=Loading(workers, prefetch), pin=False)
    for _ in itertools.islice(loader, 3):
        peak = max(peak, fullest() - before)
    return peak


def fullest() -> int:
    """Bytes in use when they have not grown for half a second."""
    most, since = used(), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.01)
        if used() > most:
            most, since = used(), time.monotonic()
    return most


def used() -> int:
    stat = os.statvfs("/dev/shm")
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


if __name__ == "__main__":
    sys.exit(main())
