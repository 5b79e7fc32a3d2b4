"""The trainer image as the tests use it: the real Dockerfile and lock on the base of `base.py`.

`python -m tests.services.image` builds both, and prints times and layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.services.base import base_image
from tests.services.podman import CACHE, image_exists, locked, podman, podman_works

__all__ = ["CONTEXT_FILES", "build", "host_options", "layers", "main", "trainer_image"]

_ROOT = Path(__file__).parents[2]
_REPOSITORY = "localhost/cvlaunch-test-trainer"
CONTEXT_FILES = ("Dockerfile", "requirements.lock")


def trainer_image() -> str:
    """Its reference; the tag says what went in. Built where it is not there yet, by one process of several."""
    base = base_image()
    with locked("trainer-image"), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        context = _context(Path(scratch))
        inputs = [path.read_bytes() for path in sorted(context.iterdir())]
        digest = hashlib.sha256(b"\0".join([base.encode(), *inputs])).hexdigest()
        reference = f"{_REPOSITORY}:{digest[:12]}"
        if not image_exists(reference):
            build(context, reference, options=[f"--build-arg=BASE={base}", *host_options()])
        return reference


def _context(folder: Path) -> Path:
    """A folder with all that the build sees."""
    subprocess.run([_uv(), "build", "--quiet", "--wheel", "--out-dir", folder, _ROOT], check=True)
    (folder / ".gitignore").unlink(missing_ok=True)
    for name in CONTEXT_FILES:
        shutil.copy(_ROOT / "trainer_image" / name, folder / name)
    return folder


def _uv() -> Path:
    return Path(sys.executable).with_name("uv")


def host_options() -> list[str]:
    """So that a build downloads nothing twice, and trusts whom this machine trusts.

    The cache is mounted on a folder that every base has: another mount point would stay behind in the image.
    """
    cache = subprocess.run([_uv(), "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    Path(cache).mkdir(parents=True, exist_ok=True)
    options = ["--network=host", f"--volume={cache}:/mnt", "--build-arg=UV_CACHE_DIR=/mnt"]
    bundle = os.environ.get("SSL_CERT_FILE")
    return [*options, f"--secret=id=ca-bundle,src={bundle}"] if bundle else options


def build(context: Path, reference: str, *, options: Sequence[str] = (), target: str | None = None) -> str:
    """What podman printed. target: a stage of the Dockerfile, instead of the last one."""
    stage = [f"--target={target}"] if target else []
    return podman("build", "--layers", *options, *stage, f"--tag={reference}", context)


def layers(reference: str) -> list[tuple[int, str]]:
    """(bytes, the instruction) of each layer that has any, the lowest first."""
    history = json.loads(podman("history", "--format=json", reference))
    return [(entry["size"], entry["CreatedBy"]) for entry in reversed(history) if entry["size"]]


def main() -> None:
    if not (podman_works() and shutil.which("debootstrap")):
        print("no trainer image: that needs root, podman and debootstrap")
        return
    for name, make in (("base", base_image), ("trainer image", trainer_image)):
        start = time.monotonic()
        reference = make()
        print(f"{name}: {reference}, {time.monotonic() - start:.0f} s")
    for size, instruction in layers(reference):
        print(f"{size / 1e6:10.1f} MB  {instruction.partition('/bin/sh -c ')[2].removeprefix('#(nop) ')[:90]}")


if __name__ == "__main__":
    main()
