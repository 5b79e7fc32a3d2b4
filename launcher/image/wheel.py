"""This installation's own wheel, without a build backend: the same bytes for the same content, wherever it is made.

The files are those that pyproject.toml gives to hatchling, from a checkout and from an installed wheel alike. They are
stored, not compressed, because compressors differ; the layer of the image that holds them is compressed anyway.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.paths import templates_folder, trainer_folder

__all__ = ["make_wheel"]

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = ("_templates", "_trainer_image")
_TIME = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file can say."""
_WHEEL = "Wheel-Version: 1.0\nGenerator: cvlaunch\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(folder: Path) -> Path:
    """Writes `cvlaunch-<version>-py3-none-any.whl` into `folder`; returns its path."""
    distribution = importlib.metadata.distribution("cvlaunch")
    info = f"cvlaunch-{distribution.version}.dist-info"
    content = dict(_package()) | {f"{info}/{name}": data for name, data in _metadata(distribution).items()}
    content[f"{info}/RECORD"] = _record(content, f"{info}/RECORD")
    path = folder / f"cvlaunch-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(_entry(name), data)
    return path


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.external_attr = 0o100644 << 16
    entry.create_system = 3  # Unix, on Windows, too
    return entry


def _package() -> Iterator[tuple[str, bytes]]:
    """(name in the wheel, bytes), sorted."""
    parts = {
        "launcher": _PACKAGE,
        "launcher/_templates": templates_folder(),
        "launcher/_trainer_image": trainer_folder(),
    }
    found = {
        f"{prefix}/{name}": root / name
        for prefix, root in parts.items()
        for name in _files(root)
        if prefix != "launcher" or name.partition("/")[0] not in _SHIPPED
    }
    yield from ((name, found[name].read_bytes()) for name in sorted(found))


def _files(root: Path) -> set[str]:
    """In a checkout those that git does not ignore, as hatchling takes them; else all but what Python leaves behind."""
    listed = _known_to_git(root) if (_PACKAGE.parent / ".git").exists() else None
    if listed is not None:
        return {name for name in listed if (root / name).is_file()}
    return set(_walk(root))


def _walk(root: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and not name.endswith((".pyc", ".pyo", "~")):
                yield Path(parent, name).relative_to(root).as_posix()


def _known_to_git(root: Path) -> list[str] | None:
    """None without git, and where it does not trust the repository."""
    command = ["git", "--no-optional-locks", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    except OSError:
        return None
    return None if done.returncode else [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _metadata(distribution: importlib.metadata.Distribution) -> Mapping[str, bytes]:
    """Without the description, which is the README: a word changed there makes no other image."""
    headers = (distribution.read_text("METADATA") or "").partition("\n\n")[0].rstrip()
    texts = {
        "METADATA": f"{headers}\n",
        "WHEEL": _WHEEL,
        "entry_points.txt": distribution.read_text("entry_points.txt"),
    }
    licenses = {f"licenses/{name}": distribution.read_text(f"licenses/{name}") for name in ("LICENSE", "NOTICE")}
    return {name: text.encode() for name, text in (texts | licenses).items() if text}


def _record(content: Mapping[str, bytes], own: str) -> bytes:
    """https://packaging.python.org/en/latest/specifications/recording-installed-packages/#the-record-file"""
    lines = [f"{name},sha256={_hash(data)},{len(data)}" for name, data in content.items()]
    return "".join(f"{line}\n" for line in [*lines, f"{own},,"]).encode()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
