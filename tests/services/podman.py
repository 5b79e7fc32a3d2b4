"""Podman as the tests use it: as root, with the configuration beside this file."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["CACHE", "SERVICES", "configure", "image_exists", "locked", "podman", "podman_works"]

SERVICES = Path(__file__).parent
CACHE = SERVICES.parents[1] / ".cache/services"
"""In the checkout, not in the cache folder of the user, which each test has anew."""

LISTS = ("images", "ps")
"""What Podman 4.3 fails at ("image not known") while another process removes one of those listed."""


def configure() -> None:
    """For this process and all that it starts; what is set already counts."""
    if os.geteuid() == 0 and shutil.which("podman"):
        os.environ.setdefault("CONTAINERS_CONF", str(SERVICES / "containers.conf"))


@functools.cache
def podman_works() -> bool:
    if os.geteuid() != 0 or not shutil.which("podman"):
        return False
    configure()
    return subprocess.run(["podman", "info"], capture_output=True, check=False).returncode == 0


def podman(*arguments: str | Path, env: Mapping[str, str] = {}, check: bool = True) -> str:
    """What it prints on stdout, without the line end. AssertionError with what it said if it fails."""
    environ = {**os.environ, **env}
    for _ in range(20):
        done = subprocess.run(["podman", *arguments], env=environ, capture_output=True, text=True, check=False)
        if not (done.returncode and arguments[0] in LISTS and "not known" in done.stderr):
            break
    assert not check or done.returncode == 0, f"podman {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
    return done.stdout.rstrip("\n")


def image_exists(reference: str) -> bool:
    return subprocess.run(["podman", "image", "exists", reference], check=False).returncode == 0


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time, of all that test this checkout. Not to be nested.

    `images` is for building and removing images: Podman 4.3 fails a build ("layer not known") while another process
    removes one.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
