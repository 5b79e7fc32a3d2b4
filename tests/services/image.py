"""The trainer image as the tests use it: the real Dockerfile and lock on the base of `base.py`.

`python -m tests.services.image` builds both, and prints times and layers.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launcher.engine import find_engine
from launcher.image import BASE_VARIABLE, OPTIONS_VARIABLE, Built, build, trainer_recipe
from tests.services.base import base_image
from tests.services.podman import locked, podman, podman_works

__all__ = ["build_environment", "host_options", "layers", "main", "trainer_image"]


def trainer_image() -> Built:
    """Built where it is not there yet, by one process of several."""
    recipe = trainer_recipe(base=base_image(), options=host_options())
    with locked("images"):
        return build(recipe, find_engine("podman"), say=lambda line: None)


def build_environment() -> dict[str, str]:
    """With these variables `cvlaunch image build` makes, and `image: cvlaunch-trainer` is, that same image."""
    return {
        "CVLAUNCH_ENGINE": "podman",
        BASE_VARIABLE: base_image(),
        OPTIONS_VARIABLE: shlex.join(host_options()),
    }


@functools.cache
def host_options() -> tuple[str, ...]:
    """So that a build downloads nothing twice, and trusts whom this machine trusts.

    The cache is mounted on a folder that every base has: another mount point would stay behind in the image.
    """
    uv = Path(sys.executable).with_name("uv")
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    Path(cache).mkdir(parents=True, exist_ok=True)
    bundle = os.environ.get("SSL_CERT_FILE")
    trust = [f"--secret=id=ca-bundle,src={bundle}"] if bundle else []
    return ("--network=host", f"--volume={cache}:/mnt", "--build-arg=UV_CACHE_DIR=/mnt", *trust)


def layers(reference: str) -> list[tuple[int, str]]:
    """(bytes, the instruction) of each layer that has any, the lowest first."""
    history = json.loads(podman("history", "--format=json", reference))
    return [(entry["size"], entry["CreatedBy"]) for entry in reversed(history) if entry["size"]]


def main() -> None:
    if not (podman_works() and shutil.which("debootstrap")):
        print("no trainer image: that needs root, podman and debootstrap")
        return
    start = time.monotonic()
    print(f"base: {base_image()}, {time.monotonic() - start:.0f} s")
    built = trainer_image()
    print(f"trainer image: {built.reference}, {f'{built.seconds:.0f} s' if built.rebuilt else 'unchanged'}")
    for size, instruction in layers(built.reference):
        print(f"{size / 1e6:10.1f} MB  {instruction.partition('/bin/sh -c ')[2].removeprefix('#(nop) ')[:90]}")


if __name__ == "__main__":
    main()
