"""output/environment.json: the image, the code, the packages and the machine that a run had."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher._version import __version__
from launcher.contract import ENVIRONMENT, JobFile
from launcher.runner.machine import describe_machine

__all__ = ["BAKED_PACKAGES", "PackageChanges", "describe_environment", "package_changes", "packages"]

BAKED_PACKAGES = Path("/opt/cvlaunch/packages.json")
"""Name → version of what was in the image when it was built."""

_LISTED = 12
_VERSION_LINE = re.compile(r"^(__version__|cuda)\b[^=\n]*= *'([^'\n]*)'", re.MULTILINE)


@dataclass(frozen=True)
class PackageChanges:
    """What is otherwise than in the image's list: name → version; of changed ones, (in the image, now)."""

    added: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        changed = [f"{name} {before} → {now}" for name, (before, now) in self.changed.items()]
        added = [f"{name} {version} added" for name, version in self.added.items()]
        removed = [f"{name} {version} removed" for name, version in self.removed.items()]
        words = [*changed, *added, *removed]
        more = [f"{len(words) - _LISTED} more, all in {ENVIRONMENT}"] if len(words) > _LISTED else []
        return ", ".join((*words[:_LISTED], *more))


def describe_environment(job: JobFile, environ: Mapping[str, str], *, site: Path | None = None) -> dict[str, object]:
    """JSON values. site: folder of the packages that the job itself brought, which go before all others.

    torch is not imported, which would take seconds; what is not installed as a package is None.
    """
    folders = _folders(site)
    found = packages(folders)
    changes = package_changes(site)
    torch = _torch_facts(folders)
    return {
        "cvlaunch": __version__,
        "kind": "container" if job.image else "process",
        "image": dict(job.image) if job.image else None,
        "code": {"sha256": job.code.sha256, "commit": job.code.commit, "dirty": job.code.dirty} if job.code else None,
        "python": sys.version.split()[0],
        "torch": torch.get("__version__"),
        "cuda": torch.get("cuda"),
        "cudnn": _version_of("nvidia-cudnn", found),
        "nccl": _version_of("nvidia-nccl", found),
        **describe_machine(environ),
        "packages_changed": asdict(changes) if changes else None,
        "packages": found,
    }


def packages(folders: Sequence[Path] | None = None) -> dict[str, str]:
    """Canonical name → version, sorted, of what `folders` hold, the first one first; all that this Python sees.

    By the names of the metadata folders; reading the files in them takes 100 times as long.
    """
    found: dict[str, str] = {}
    for folder in _folders(None) if folders is None else folders:
        for path in folder.glob("*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items()))


def package_changes(site: Path | None = None, *, baked: Path = BAKED_PACKAGES) -> PackageChanges | None:
    """None where there is no list of the image, as for a process. str() of it is fit for the log."""
    try:
        before = json.loads(baked.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    now = packages(_folders(site))
    return PackageChanges(
        added={name: version for name, version in now.items() if name not in before},
        changed={n: (before[n], version) for n, version in now.items() if before.get(n, version) != version},
        removed={name: version for name, version in before.items() if name not in now},
    )


def _folders(site: Path | None) -> list[Path]:
    return [*([site] if site else ()), *(Path(path) for path in sys.path if path)]


def _torch_facts(folders: Sequence[Path]) -> dict[str, str]:
    """`__version__` and `cuda` (what it was built for; not in a build for CPUs) of torch/version.py."""
    for folder in folders:
        try:
            text = (folder / "torch/version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        return dict(_VERSION_LINE.findall(text))
    return {}


def _version_of(library: str, found: Mapping[str, str]) -> str | None:
    """Of a library that NVIDIA packages for each CUDA: nvidia-cudnn-cu13."""
    return next(_versions(library, found), None)


def _versions(library: str, found: Mapping[str, str]) -> Iterator[str]:
    return (version for name, version in found.items() if re.fullmatch(rf"{library}(-cu\d+)?", name))
