"""The images' base without a registry: Debian from its own mirror, by debootstrap, about as debian:12-slim is."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.services.podman import CACHE, image_exists, locked, podman

__all__ = ["base_image"]

_SUITE, _MIRROR = "bookworm", "http://deb.debian.org/debian"
_REPOSITORY = "localhost/cvlaunch-test-base"
_NEEDLESS = (
    "var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*", "var/log/*.log", "var/log/apt",
    "var/cache/debconf/*-old", "var/cache/ldconfig/aux-cache",
    "usr/share/doc/*", "usr/share/man/*", "usr/share/info/*", "usr/share/locale/*",
)  # fmt: skip


@functools.cache
def base_image() -> str:
    """Its reference; the tag says what it was made from. Built once, and kept."""
    recipe = "\n".join([_SUITE, _MIRROR, *_NEEDLESS])
    reference = f"{_REPOSITORY}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not image_exists(reference):
        with locked("images"):
            if not image_exists(reference):
                _build(reference)
    return reference


def _build(reference: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch) / "root"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", _SUITE, folder, _MIRROR], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise RuntimeError(f"debootstrap failed: {(made.stdout + made.stderr)[-1000:]}")
        for pattern in _NEEDLESS:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        archive = Path(scratch) / "root.tar"
        subprocess.run(
            ["tar", "--create", "--file", archive, "--numeric-owner", "--directory", folder, "--exclude=./dev/*", "."],
            check=True,
        )
        podman("import", "--quiet", "--change", 'CMD ["bash"]', archive, reference)
