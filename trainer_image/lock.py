"""Writes requirements.lock, the packages of the trainer image: `make lock`; `make lock UPGRADE=1` takes the newest.

The file has parts that the Dockerfile cuts apart, because each is a layer of its own: what installs the rest, torch
and all that it needs, everything else. Hashes are of all files of a version, so that any index may serve them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["LOCK", "main", "packages", "parts"]

LOCK = Path(__file__).with_name("requirements.lock")
_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_EXTRAS = ("trainer", "s3", "gcs")
_TOOLS = ("uv",)
_TORCH = ("torch", "torchvision")
_MORE = ("pip", "opencv-python-headless")
"""pip installs a job's own requirements. opencv-python needs libGL, which a container has no use for."""
_INSTEAD = "opencv-python ; sys_platform == 'none'\n"
_HEAD = """\
# The packages of the trainer image, for Python 3.11 on Linux x86_64. Written by `make lock`; not to be edited.
# The Dockerfile cuts this file at the lines that begin with "# --- ".
"""


def packages(lines: Iterable[str]) -> dict[str, str]:
    """Name → version of each pinned requirement."""
    found = (re.match(r"([a-z0-9-]+)==([^\s;\\]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def parts(lock: str) -> dict[str, str]:
    """Name of a part → its lines."""
    found = re.split(r"^# --- (\w+)\n", lock, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def main(upgrade: bool) -> None:
    known = "" if upgrade or not LOCK.exists() else LOCK.read_text()
    with tempfile.TemporaryDirectory() as folder:
        tools = _resolve(Path(folder), list(_TOOLS), known=known)
        every = _resolve(Path(folder), list(_MORE), known=known, project=True)
        torch = _resolve(
            Path(folder), [f"{name}=={packages(every.splitlines())[name]}" for name in _TORCH], known=every
        )
    below = packages(torch.splitlines())
    _check(every, below)
    entries = re.split(r"^(?=[a-z0-9])", every, flags=re.MULTILINE)
    first = [entry for entry in entries if packages([entry]).keys() <= below.keys()]
    rest = [entry for entry in entries if entry not in first]
    texts = {"tools": tools, "torch": "".join(first), "packages": "".join(rest)}
    LOCK.write_text(_HEAD + "".join(f"# --- {name}\n{text}" for name, text in texts.items()))


def _resolve(folder: Path, wanted: list[str], *, known: str, project: bool = False) -> str:
    """Pinned requirements with hashes, one after the other. known: pins to keep where they fit."""
    listed, instead, output = folder / "wanted.in", folder / "instead.txt", folder / "output.txt"
    listed.write_text("\n".join(wanted))
    instead.write_text(_INSTEAD)
    output.write_text(known)
    sources = [str(listed), *([str(_PROJECT), *(f"--extra={name}" for name in _EXTRAS)] if project else [])]
    target = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_28", f"--override={instead}"]
    form = ["--generate-hashes", "--no-annotate", "--no-header", "--quiet", f"--output-file={output}"]
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "pip", "compile", "--no-config", *sources, *target, *form], env=_environment(), check=True)
    return output.read_text()


def _environment() -> dict[str, str]:
    """Without this machine's own wheels: a CPU build of torch among them would be taken."""
    return {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "UV_TORCH_BACKEND")}


def _check(every: str, below: Mapping[str, str]) -> None:
    """Torch has to be the build with CUDA, which is what the package index serves for Linux."""
    pinned = packages(every.splitlines())
    local = [f"{name}=={version}" for name, version in pinned.items() if "+" in version]
    if local or not any(name.startswith("nvidia-cudnn") for name in below):
        raise SystemExit(f"the index in use serves a torch without CUDA: {', '.join(local) or pinned['torch']}")
    if stray := below.items() - pinned.items():
        raise SystemExit(f"torch alone resolves to other versions than torch with the rest: {sorted(stray)}")


if __name__ == "__main__":
    main("--upgrade" in sys.argv[1:])
