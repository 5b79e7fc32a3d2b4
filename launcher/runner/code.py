"""The user's code: unpacked at `<root>/code`, its requirements at `<root>/site`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path

from launcher import contract
from launcher.contract import Code, Layout, sha256_file
from launcher.errors import IntegrityError, SpecError
from launcher.stores import Store
from launcher.tarfiles import extract_tar

__all__ = ["install_requirements", "unpack_code"]


def unpack_code(code: Code, store: Store, layout: Layout, *, mounted: Path | None = None) -> None:
    """The archive in the store, or the one that the platform mounted.

    IntegrityError if the archive is missing, is another than was submitted, or wants to write elsewhere.

    The folder appears by rename, so one that is there is complete.
    """
    if layout.code.is_dir():
        return
    archive = mounted or _fetch(store, layout)
    if not archive.is_file():
        raise IntegrityError(f"the code archive {archive} is missing")
    if sha256_file(archive) != code.sha256:
        raise IntegrityError(f"the code archive {mounted or f'{store.uri}/{contract.CODE}'} is not the one submitted")
    part = layout.root / f".code.{os.uname().nodename}.{os.getpid()}.part"
    try:
        with tarfile.open(archive) as tar:
            extract_tar(tar, part)
    except tarfile.TarError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise IntegrityError(f"the code archive can't be unpacked: {error}") from error
    _into_place(part, layout.code)


def _fetch(store: Store, layout: Layout) -> Path:
    archive = layout.root / contract.CODE
    if store.local_path(contract.CODE) != archive:
        try:
            store.download(contract.CODE, archive)
        except FileNotFoundError:
            raise IntegrityError(f"the code archive {store.uri}/{contract.CODE} is missing") from None
    return archive


def install_requirements(code: Code, layout: Layout, env: Mapping[str, str], abort: threading.Event) -> Path | None:
    """Folder of the installed packages, None if none are wanted. SpecError with pip's last words if it fails."""
    if not code.requirements:
        return None
    site = layout.root / "site"
    if site.is_dir():
        return site
    part = layout.root / f".site.{os.uname().nodename}.{os.getpid()}.part"
    wanted = layout.code / code.requirements
    _pip(["--target", str(part), "-r", str(wanted)], env, abort, part.with_suffix(".log"))
    part.mkdir(exist_ok=True)  # pip makes none for an empty list
    _into_place(part, site)
    return site


def _pip(arguments: list[str], env: Mapping[str, str], abort: threading.Event, log: Path) -> None:
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", *arguments],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while pip.poll() is None:
            if abort.wait(0.1):
                pip.kill()
    words = log.read_text(errors="replace").strip()[-600:]
    log.unlink()
    if pip.returncode:
        raise SpecError(f"the requirements can't be installed: {words}")


def _into_place(part: Path, folder: Path) -> None:
    """Another node on the same disk may have been faster."""
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.is_dir():
            raise
