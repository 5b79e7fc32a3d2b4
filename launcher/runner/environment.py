"""output/environment.json: the machine and the packages that a run had."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher._version import __version__
from launcher.contract import JobFile
from launcher.shm import shm_size

__all__ = ["describe_environment"]

_GPU_FIELDS = ("name", "memory.total", "driver_version", "uuid")


def describe_environment(job: JobFile, environ: Mapping[str, str]) -> dict[str, object]:
    """JSON values. Sizes in bytes; a GPU's memory as nvidia-smi prints it."""
    system = os.uname()
    return {
        "cvlaunch": __version__,
        "python": sys.version.split()[0],
        "platform": f"{system.sysname} {system.release} {system.machine}",
        "hostname": socket.gethostname(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "shm": shm_size(),
        "gpus": _gpus(),
        "image": environ.get("CVLAUNCH_IMAGE"),
        "code": {"sha256": job.code.sha256, "commit": job.code.commit, "dirty": job.code.dirty} if job.code else None,
        "packages": _packages(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _memory() -> int | None:
    """Of the machine, or of the control group if that is less (cgroup v2)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return machine


def _gpus() -> list[dict[str, str]]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


def _packages() -> dict[str, str]:
    """Name → version by the names of the metadata folders; reading the files in them takes 100 times as long."""
    found: dict[str, str] = {}
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob("*.dist-info")):
            name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
            found.setdefault(name.replace("_", "-").lower(), version)
    return found
